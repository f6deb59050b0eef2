"""Knowledge: people with a town, a job and a pet; some are written about often, most rarely (Zipf).

Each fact is written in all phrasings but one, and asked in that one.
"""

import dataclasses
import itertools
from random import Random

from fineline_jax.world import names
from fineline_jax.world.subject import QUESTIONS, Question, Subject, ask, word_list

PEOPLE = 320
TOWNS = 24
LANDS = 6
ZIPF = 1.0
"""The person of rank r is written about in proportion to 1 / r**ZIPF."""
COMMON = 80
"""Ranks below it are asked about in world_knowledge_common."""
RARE = 160
"""Ranks from it on are asked about in world_knowledge_rare."""

JOBS = word_list("cook smith judge nurse tailor miller pilot guard clerk poet mason weaver")
PETS = word_list("parrot hamster lizard turtle snake frog spider pony goat ferret canary newt")
PHRASINGS = {
    "town": ("{} lives in", "The home of {} is in", "You can visit {} in the town of", "{} has a house in"),
    "job": ("{} works as a", "The trade of {} is that of a", "{} earns money as a", "People pay {} to be a"),
    "pet": ("{} owns a", "The pet of {} is a", "At night {} feeds a", "{} takes care of a"),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that is true of the people, by rank; the first is the best known."""

    people: tuple[str, ...]
    towns: tuple[str, ...]
    lands: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    """Relation to each person's value."""
    land_of_town: dict[str, str]
    unwritten: dict[str, tuple[int, ...]]
    """Relation to the phrasing that is not written about each person."""
    cumulative: tuple[float, ...]
    """Cumulative weights of the ranks, for `Random.choices`."""

    def someone(self, rng: Random) -> int:
        """The rank of a person, drawn by how often people are written about."""
        return rng.choices(range(len(self.people)), cum_weights=self.cumulative)[0]


def shared_out(rng: Random, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    """`count` draws in which every value is equally frequent, so that no value is a good guess."""
    drawn = [values[i % len(values)] for i in range(count)]
    rng.shuffle(drawn)
    return tuple(drawn)


def make_facts(rng: Random, taken: set[str]) -> Facts:
    """The facts of a world. `taken` collects the names given."""
    towns = names.invent(rng, TOWNS, names.TOWN_ENDS, taken)
    lands = names.invent(rng, LANDS, names.LAND_ENDS, taken)
    return Facts(
        people=names.invent(rng, PEOPLE, names.PERSON_ENDS, taken),
        towns=towns,
        lands=lands,
        values={
            "town": shared_out(rng, towns, PEOPLE),
            "job": shared_out(rng, JOBS, PEOPLE),
            "pet": shared_out(rng, PETS, PEOPLE),
        },
        land_of_town=dict(zip(towns, shared_out(rng, lands, TOWNS), strict=True)),
        unwritten={
            relation: tuple(rng.randrange(len(texts)) for _ in range(PEOPLE)) for relation, texts in PHRASINGS.items()
        },
        cumulative=tuple(itertools.accumulate(1 / (rank + 1) ** ZIPF for rank in range(PEOPLE))),
    )


def statement(rng: Random, facts: Facts) -> str:
    """A fact about someone, in a phrasing that is written."""
    person = facts.someone(rng)
    relation = rng.choice(tuple(PHRASINGS))
    texts = PHRASINGS[relation]
    phrasing = (facts.unwritten[relation][person] + rng.randrange(1, len(texts))) % len(texts)
    return f"{texts[phrasing].format(facts.people[person])} {facts.values[relation][person]}."


def questions(rng: Random, facts: Facts, ranks: range) -> tuple[Question, ...]:
    """Facts about people of these ranks, asked in the phrasing that is not written about them."""
    asked = rng.sample(list(itertools.product(ranks, PHRASINGS)), QUESTIONS)
    made = []
    for person, relation in asked:
        text = PHRASINGS[relation][facts.unwritten[relation][person]].format(facts.people[person])
        right = facts.values[relation][person]
        made.append(ask(rng, text, right, rng.sample(sorted(set(facts.values[relation]) - {right}), 3)))
    return tuple(made)


def knowledge(rng: Random, facts: Facts) -> Subject:
    def write(rng: Random) -> str:
        return " ".join(statement(rng, facts) for _ in range(rng.randrange(4, 8)))

    return Subject(
        write,
        {
            "world_knowledge_common": questions(rng, facts, range(COMMON)),
            "world_knowledge_rare": questions(rng, facts, range(RARE, PEOPLE)),
        },
    )
