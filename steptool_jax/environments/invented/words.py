"""What invented worlds are worded with: English words, made-up words, names, codes, questions.

Made-up words and names of train and held-out tasks are disjoint; English words are shared.
"""

import random
from collections.abc import Callable

from steptool_jax.environments import names
from steptool_jax.environments.base import Split


def _words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


KINDS = _words(
  """account actor album animal apartment article artist author battery bike bill boat book bottle
  box branch bridge building bus cable camera candidate car card case channel chapter city
  client club coin company contract country course crew customer dataset delivery department
  device dish doctor document dog driver employee engine event exam farm field file film
  flight folder game garden gate group guest hotel house image invoice island item job key
  lake lesson letter library license line list loan locker machine map market match meal
  meeting member message meter mission model module motor movie museum note nurse office order
  package painting parcel park part partner patient payment person pet phone photo plan planet
  plant player playlist policy port post printer product profile project queue radio recipe
  record region rental report request reservation river road robot room route sample school
  seat sensor server service session sheet shelf ship shop show song species staff stage
  station store story street student supplier system table tank task teacher team ticket tool
  tower toy track train tree trip truck unit user vehicle vendor video village visit warehouse
  watch wheel worker zone"""
)
# Fields that hold a name or a key of something else.
LINKS = _words(
  """agent author boss branch buyer captain carrier chair client coach contact creator doctor
  driver editor family friend guide home host keeper leader maker manager mentor neighbour
  origin owner parent partner place president producer publisher reader reviewer seller sender
  sister source sponsor station successor supervisor supplier target teacher team tenant
  vendor winner writer next_stop last_order main_office best_friend head_nurse home_town
  first_author"""
)
# Field -> what its values are, and questions that do not name it ({x}: what is asked about).
FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
  "price": ("number", ("what does {x} cost?", "how much is {x}?", "how expensive is {x}?")),
  "age": ("number", ("how old is {x}?",)),
  "weight": ("number", ("how heavy is {x}?", "what does {x} weigh?")),
  "height": ("number", ("how tall is {x}?", "how high is {x}?")),
  "length": ("number", ("how long is {x}?",)),
  "stock": ("number", ("how many of {x} are left?", "how many of {x} do we have?")),
  "balance": ("number", ("how much money has {x}?", "what does {x} have?")),
  "distance": ("number", ("how far is {x}?",)),
  "speed": ("number", ("how fast is {x}?",)),
  "size": ("number", ("how big is {x}?", "how large is {x}?")),
  "copies": ("number", ("how many copies of {x} are there?",)),
  "seats": ("number", ("how many people fit into {x}?",)),
  "score": ("number", ("how well did {x} do?",)),
  "year": ("number", ("in which year was {x} made?", "how old a thing is {x}?")),
  "temperature": ("number", ("how warm is {x}?", "how cold is {x}?")),
  "rating": ("decimal", ("how good is {x}?",)),
  "rate": ("decimal", ()),
  "city": ("place", ("where is {x}?", "where does one find {x}?", "in which town is {x}?")),
  "place": ("place", ("where is {x}?", "where do i find {x}?")),
  "address": ("place", ("where does {x} live?", "where is {x}?")),
  "status": ("word", ("how is {x} going?", "what about {x}?")),
  "state": ("word", ("in what shape is {x}?",)),
  "color": ("word", ("what does {x} look like?",)),
  "type": ("word", ("what sort of thing is {x}?",)),
  "language": ("word", ("what does {x} speak?",)),
  "topic": ("word", ("what is {x} about?",)),
  "material": ("word", ("what is {x} made of?",)),
  "due_date": ("date", ("when is {x} due?", "when must {x} be back?")),
  "date": ("date", ("when is {x}?", "when was {x}?", "on which day is {x}?")),
  "birthday": ("date", ("when was {x} born?",)),
  "start": ("time", ("when does {x} begin?", "when does {x} start?")),
  "end": ("time", ("when is {x} over?", "until when is {x}?")),
  "opening": ("time", ("from when on is {x} open?",)),
  "email": ("email", ("how do i reach {x}?", "how do i write to {x}?")),
  "phone": ("phone", ("how do i call {x}?",)),
  "code": ("code", ()),
  "shelf": ("code", ("where does {x} stand?",)),
  "gate": ("code", ("from where does {x} leave?",)),
  "number": ("code", ()),
  "nickname": ("person", ("how do friends call {x}?",)),
}
VALUES = _words(
  """red blue green black white open closed ready broken new old late early lost found paid free
  busy empty full small large warm cold dark light north south east west spring summer winter
  gold silver iron wood stone glass paper water fire wind rain snow sun moon star night day
  king queen silent hidden broken long last first secret wild golden river forest mountain
  road bridge island house garden dream winter shadow storm ocean valley letter song dance
  heart world time year history music physics chess tennis football english german french
  spanish active pending sent done delayed shipped berlin paris london rome madrid oslo vienna
  prague tokyo cairo"""
)
GETS = _words("get find show lookup read fetch check search query load view see list tell")
SETS = _words("set change update put edit write store assign")
ADDS = _words("add pay give increase raise charge deposit")

_ONSETS = _words(
  "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kn pl pr qu sh sl sn st th tr"
)
_VOWELS = _words("a e i o u a e i o u ai ea ee oo ou ia y")
_CODAS = ("", "", "", *_words("n r l s t m d k x ck ll nd ng nt rd rk rn ss st th"))


def made_up(rng: random.Random, split: Split) -> str:
  """A word that is none, of one to three syllables, of this split."""
  while True:
    syllables = rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    word += rng.choice(_CODAS)
    if len(word) > 3 and names.belongs(word, split):
      return word


def _word(rng: random.Random, split: Split) -> str:
  return rng.choice(VALUES) if rng.random() < 0.4 else made_up(rng, split)


def person(rng: random.Random, split: Split) -> str:
  words = [made_up(rng, split).capitalize() for _ in range(rng.choice((1, 1, 2)))]
  return " ".join(words)


def title(rng: random.Random, split: Split) -> str:
  words = [_word(rng, split) for _ in range(rng.choice((1, 2, 2, 3)))]
  if all(word in VALUES for word in words):  # else train and held-out tasks could share it
    words[-1] = made_up(rng, split)
  if rng.random() < 0.7:
    words = [word.capitalize() for word in words]
  return " ".join(["The", *words] if rng.random() < 0.2 else words)


def code(rng: random.Random, split: Split) -> str:
  del split  # there are too few short ones to part them
  letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((1, 1, 2, 3))))
  letters = letters.upper() if rng.random() < 0.5 else letters
  return (
    letters + rng.choice(("", "", "-", "_")) + str(rng.randrange(10 ** rng.choice((1, 2, 3, 4))))
  )


def _date(rng: random.Random, split: Split) -> str:
  del split
  year, month, day = rng.randint(1990, 2030), rng.randint(1, 12), rng.randint(1, 28)
  return rng.choice((f"{year}-{month:02d}-{day:02d}", f"{day}.{month}.{year}", f"{month}/{day}"))


MAKERS: dict[str, Callable[[random.Random, Split], object]] = {
  "number": lambda rng, _: rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 4, 5))),
  "decimal": lambda rng, _: round(rng.uniform(0, 10 ** rng.choice((1, 2))), rng.choice((1, 2))),
  "word": _word,
  "place": title,
  "person": person,
  "code": code,
  "date": _date,
  "time": lambda rng, _: f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}",
  "email": lambda rng, split: (
    f"{made_up(rng, split)}@{made_up(rng, split)}.{rng.choice(('com', 'org'))}"
  ),
  "phone": lambda rng, _: f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}",
}

# {f}: the field in words; {x}: what is asked about.
READ_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "what is the {f} of {x}?",
    "what's the {f} of {x}?",
    "tell me the {f} of {x}.",
    "i need the {f} of {x}.",
    "give me the {f} of {x}.",
    "find the {f} of {x}.",
    "look up the {f} of {x}.",
    "{f} of {x}?",
    "{x}: what {f}?",
    "which {f} does {x} have?",
    "what {f} has {x}?",
    "do you know the {f} of {x}?",
    "can you find out the {f} of {x}?",
    "for {x}, which {f} is it?",
    "i am asking for the {f} of {x}.",
  ),
  "heldout": (
    "for {x}, what is the {f}?",
    "i need you to look up the {f} of {x}.",
    "can you tell me which {f} {x} has?",
    "what {f} is it for {x}?",
  ),
}
SET_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "set the {f} of {x} to {v}.",
    "change the {f} of {x} to {v}.",
    "{x} gets {v} as {f}.",
    "make {v} the {f} of {x}.",
    "please put {v} as the {f} of {x}.",
    "the {f} of {x} must be {v}.",
  ),
  "heldout": ("the {f} of {x} should be {v} now.", "please change the {f} of {x}: it must be {v}."),
}
ADD_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "add {v} to the {f} of {x}.",
    "raise the {f} of {x} by {v}.",
    "{x} gets {v} more {f}.",
    "put {v} on top of the {f} of {x}.",
  ),
  "heldout": ("please add {v} to what {x} has as {f}.",),
}
# {v}: another thing, which the first one is given to.
GIVES = _words("lend give sell send assign move rent book connect attach hand bring link ship")
GIVE_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "{g} {x} to {v}.",
    "please {g} {x} to {v}.",
    "can you {g} {x} to {v}?",
    "to {v}, {g} {x}.",
  ),
  "heldout": ("i need you to {g} {x} to {v}.", "{g} {x} to {v} now."),
}
THEN_TELL = ("what is it then?", "how much is it then?", "tell me what it is then.", "and then?")
GREETINGS = ("", "", "", "", "hi, ", "hello! ", "please: ", "question: ", "hey, ")
