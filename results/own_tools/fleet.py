"""Three tools over the cars of a firm: a driver's car, a car's state, and filling it up."""

import random

from steptool_jax.simulators.functions import NotFound, Result

_FIRST = [
  "Anna",
  "Boris",
  "Chiara",
  "David",
  "Elif",
  "Farid",
  "Greta",
  "Hugo",
  "Ines",
  "Jonas",
  "Kofi",
  "Lena",
  "Mateo",
  "Nadia",
  "Omar",
]
_LAST = [
  "Abel",
  "Baker",
  "Costa",
  "Dietrich",
  "Evans",
  "Fischer",
  "Garcia",
  "Hoffmann",
  "Ivanov",
  "Jensen",
  "Keller",
  "Lopez",
]
_rng = random.Random(11)
_DRIVERS = [f"{first} {last}" for first in _FIRST for last in _LAST]
_rng.shuffle(_DRIVERS)
CARS = {
  f"{_rng.choice('KLMNP')}{_rng.choice('ABCD')}-{number}": {
    "driver": driver,
    "litres": _rng.randrange(1, 40),
    "city": _rng.choice(
      ["Berlin", "Lisbon", "Oslo", "Warsaw", "Dublin", "Athens", "Ghent", "Turin", "Lyon", "Bergen"]
    ),
  }
  for number, driver in zip(_rng.sample(range(100, 999), len(_DRIVERS)), _DRIVERS, strict=True)
}


def make_tools():
  cars = {plate: dict(car) for plate, car in CARS.items()}

  def car_of(plate):
    if plate not in cars:
      raise NotFound(f"no car {plate}")
    return cars[plate]

  def plate_of_driver(driver: str) -> str:
    """The plate of the car that somebody drives."""
    for plate, car in cars.items():
      if car["driver"] == driver:
        return plate
    raise NotFound(f"no driver {driver!r}")

  def locate(plate: str) -> dict:
    """The city that a car is in."""
    return {"city": car_of(plate)["city"]}

  def refuel(plate: str, litres: int) -> Result:
    """Fills some litres into a car; says what it has then."""
    car_of(plate)["litres"] += litres
    return Result({"tank": cars[plate]["litres"]}, changed=litres != 0)

  return [plate_of_driver, locate, refuel]


def tasks(rng):
  """(about whom, query, calls, answer) of every task."""
  for plate, car in CARS.items():
    driver, some = car["driver"], rng.randrange(5, 50)
    find = ("plate_of_driver", {"driver": driver})
    asked = rng.choice((f"What does {driver} drive?", f"Which car has {driver}?"))
    yield plate, asked, [find], plate
    asked = rng.choice((f"Where is {driver} now?", f"In which town is the car of {driver}?"))
    yield plate, asked, [find, ("locate", {"plate": plate})], car["city"]
    asked = rng.choice(
      (
        f"Fill {some} litres into {driver}'s car. What is in the tank?",
        f"{driver} takes {some} litres.",
      )
    )
    yield plate, asked, [find, ("refuel", {"plate": plate, "litres": some})], car["litres"] + some
