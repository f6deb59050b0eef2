"""Invented names of people and places, each one word."""

from random import Random

ONSETS = ("b", "br", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
MIDDLES = ("l", "m", "n", "r", "s", "d", "v", "ll", "nd", "rk")
PERSON_ENDS = ("a", "o", "in", "el", "ar", "is", "ek", "una")
TOWN_ENDS = ("ford", "ton", "ham", "wick", "burg", "dale")
LAND_ENDS = ("land", "mark", "reich", "stan")
VILLAGE_ENDS = ("by", "thorpe", "hof", "ley")
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
