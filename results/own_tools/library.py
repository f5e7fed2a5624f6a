"""Three tools over a library, as a user would write them, and tasks for them."""

import random

from steptool_jax.simulators.functions import NotFound, Result

_COLOURS = (
  "red",
  "blue",
  "green",
  "silver",
  "golden",
  "black",
  "white",
  "amber",
  "scarlet",
  "ivory",
)
_THINGS = tuple(
  name + end
  for name in ("River", "Mountain", "Garden", "Lantern", "Harbour", "Mirror", "Castle", "Island")
  for end in ("", "s", " Song", " House", " Road")
)
_rng = random.Random(7)
_TITLES = [f"The {c.capitalize()} {t}" for c in _COLOURS for t in _THINGS]
_rng.shuffle(_TITLES)
BOOKS = {
  f"b{number}": {
    "title": title,
    "copies": _rng.randrange(2, 60),
    "shelf": f"{_rng.choice('ABCDEFGH')}{_rng.randrange(1, 40)}",
  }
  for number, title in zip(_rng.sample(range(100, 999), len(_TITLES)), _TITLES, strict=True)
}


def make_tools():
  books = {number: dict(book) for number, book in BOOKS.items()}

  def book_of(number):
    if number not in books:
      raise NotFound(f"no book {number}")
    return books[number]

  def find_book(title: str) -> dict:
    """Finds the id of a book by its title."""
    for number, book in books.items():
      if book["title"] == title:
        return {"id": number}
    raise NotFound(f"no book {title!r}")

  def get_book(id: str) -> dict:
    """Copies and shelf of a book."""
    book = book_of(id)
    return {"copies": book["copies"], "shelf": book["shelf"]}

  def lend_book(id: str, copies: int) -> Result:
    """Lends some copies of a book; says how many are left."""
    book = book_of(id)
    if not 0 < copies <= book["copies"]:
      return Result({"error": "not so many copies"})
    book["copies"] -= copies
    return Result({"left": book["copies"]}, changed=True)

  return [find_book, get_book, lend_book]


def tasks(rng):
  """(about whom, query, calls, answer) of every task."""
  for number, book in BOOKS.items():
    title, copies, some = book["title"], book["copies"], rng.randrange(1, book["copies"])
    find, get = ("find_book", {"title": title}), ("get_book", {"id": number})
    lend = ("lend_book", {"id": number, "copies": some})
    asked = rng.choice((f"How many copies of {title} are there?", f"Count the copies of {title}."))
    yield number, asked, [find, get], copies
    asked = rng.choice((f"Where is {title}?", f"On which shelf does {title} stand?"))
    yield number, asked, [find, get], book["shelf"]
    asked = rng.choice(
      (
        f"Lend {some} copies of {title}. How many are left?",
        f"{some} of {title} go out: what stays?",
      )
    )
    yield number, asked, [find, lend], copies - some
