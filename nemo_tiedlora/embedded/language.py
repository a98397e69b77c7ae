"""The language of the built-in base: short lists and questions about them, written from a seed.

A document shows one list and then exercises the base's three skills on it, several times and in random order:

    In line: Emma Ben Vera Leo.  Again: Emma Ben Vera Leo  Backwards: Leo Vera Ben Emma  After Ben comes Vera

Copying is what makes a small transformer grow induction heads, and look-ups come almost for free once it has them.
Trained on questions alone, such a model still guesses when the time for pre-training is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

PEOPLE = tuple(
    "Anna Ben Carl Dora Emma Fred Greta Hugo Ida Jack Kate Leo Mary Nora Otto Paul Rosa Sam Tom Vera".split()
)
THINGS = tuple("cup lamp book coin key ball hat map ring shoe box pen clock bag rope bell".split())
PLACES = tuple("market harbour station museum park school bridge church garden castle forest tower".split())
#: How a list is introduced, and what it may contain.
LISTS = {"In line:": PEOPLE, "On the table:": THINGS, "On the way:": PLACES}
SHORTEST, LONGEST = 4, 8
#: What comes after the last of a list.
NONE = "nobody"


@dataclass(frozen=True)
class Listing:
    """A list of different items under its heading."""

    heading: str
    items: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.heading} {' '.join(self.items)}."


@dataclass(frozen=True)
class Exercise:
    """A question and its answer; after the answer the text ends (end-of-sequence token)."""

    question: str
    answer: str


def listing(draw: Random) -> Listing:
    """A random list."""
    heading, items = draw.choice(tuple(LISTS.items()))
    return Listing(heading, tuple(draw.sample(items, draw.randint(SHORTEST, LONGEST))))


def again(items: tuple[str, ...], draw: Random) -> Exercise:
    """The list once more."""
    return Exercise("Again:", " ".join(items))


def backwards(items: tuple[str, ...], draw: Random) -> Exercise:
    """The list from its end."""
    return Exercise("Backwards:", " ".join(reversed(items)))


def after(items: tuple[str, ...], draw: Random) -> Exercise:
    """Who or what follows one of the items."""
    at = draw.randrange(len(items))
    return Exercise(f"After {items[at]} comes", (*items, NONE)[at + 1])


#: The skills of the base, and how often one document exercises each.
SKILLS = {again: 1, backwards: 1, after: 4}


def document(draw: Random) -> tuple[Listing, list[Exercise]]:
    """One list with exercises about it."""
    about = listing(draw)
    skills = [skill for skill, times in SKILLS.items() for _ in range(times)]
    draw.shuffle(skills)
    return about, [skill(about.items, draw) for skill in skills]


def documents(seed: int) -> Iterator[tuple[Listing, list[Exercise]]]:
    """Documents without end; equal seeds give equal documents."""
    draw = Random(f"{__name__} {seed}")
    while True:
        yield document(draw)
