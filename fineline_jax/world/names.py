"""Invented names of people and places, each one word."""

from random import Random

ONSETS = ("b", "br", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
MIDDLES = ("l", "m", "n", "r", "s", "d", "v", "ll", "nd", "rk")
PERSON_ENDS = ("a", "o", "in", "el", "ar", "is", "ek", "una")
TOWN_ENDS = ("ford", "ton", "ham", "wick", "burg", "dale")
LAND_ENDS = ("land", "mark", "reich", "stan")
VILLAGE_ENDS = ("by", "thorpe", "hof", "ley")
SURNAME_ENDS = ("son", "sen", "man", "er")
ISLAND_ENDS = ("oy", "holm", "sund", "ness")


def invent(rng: Random, count: int, ends: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """`count` new capitalised names; they are added to `taken`, which holds lower-case words."""
    names: list[str] = []
    while len(names) < count:
        word = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(MIDDLES) + rng.choice(ends)
        if word not in taken:
            taken.add(word)
            names.append(word.capitalize())
    return tuple(names)


def full_names(rng: Random, people: tuple[str, ...], surnames: tuple[str, ...], count: int) -> list[str]:
    """`count` different people, each with a surname drawn for this one text.

    A surname that comes back behind its first name is the simplest thing to find further up in a text.
    """
    return [
        f"{first} {last}" for first, last in zip(rng.sample(people, count), rng.sample(surnames, count), strict=True)
    ]
