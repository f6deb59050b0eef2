"""Two hops: person to town to land, once over the facts in the weights, once over facts in the text.

Which land a person belongs to is written for some people only; for the others it follows from their town.
"""

from random import Random

from fineline_jax.world import names
from fineline_jax.world.facts import Facts
from fineline_jax.world.subject import QUESTIONS, Question, Subject, ask, collect, held_out

TOWN_IN_LAND = ("{} lies in", "The town of {} belongs to", "On the map {} is part of")
CITIZEN = ("{} is a citizen of", "The homeland of {} is", "{} pays taxes to", "{} holds a passport of")
INFERRED = 0.35
"""Share of the people whose land is never written."""
HELD_OUT = 0.15
"""Share of (person, village, island) triples that only the questions use."""


def reasoning(
    rng: Random, facts: Facts, people: tuple[str, ...], surnames: tuple[str, ...], taken: set[str]
) -> Subject:
    """`people` are names of which nothing is known outside the text at hand."""
    villages = names.invent(rng, 16, names.VILLAGE_ENDS, taken)
    islands = names.invent(rng, 8, names.ISLAND_ENDS, taken)
    land_of = [facts.land_of_town[town] for town in facts.values["town"]]
    inferred = [person for person in facts.people if held_out(INFERRED, "citizen", person)]

    def statement(rng: Random) -> str:
        if rng.random() < 0.25:
            town = rng.choice(facts.towns)
            return f"{rng.choice(TOWN_IN_LAND).format(town)} {facts.land_of_town[town]}."
        person = facts.someone(rng)
        while held_out(INFERRED, "citizen", facts.people[person]):
            person = facts.someone(rng)
        return f"{rng.choice(CITIZEN).format(facts.people[person])} {land_of[person]}."

    def journey(rng: Random, questions: bool) -> tuple[list[str], list[tuple[str, str, str]]]:
        """Sentences, and (person, village, island) of two people; with `questions` the first is held out."""
        while True:
            cast = names.full_names(rng, people, surnames, 2)
            chains = list(zip(cast, rng.sample(villages, 2), rng.sample(islands, 2), strict=True))
            kept = [
                held_out(HELD_OUT, "journey", person.split()[0], village, island) for person, village, island in chains
            ]
            if kept == [questions, False]:
                break
        first = [f"{person} sleeps in {village}." for person, village, _ in chains]
        second = [f"{village} is on the island of {island}." for _, village, island in chains]
        rng.shuffle(first)
        rng.shuffle(second)
        return first + second, chains

    def write(rng: Random) -> str:
        if rng.random() < 0.4:
            return " ".join(statement(rng) for _ in range(rng.randrange(4, 8)))
        lines, chains = journey(rng, questions=False)
        rng.shuffle(chains)
        return " ".join([*lines, *(f"{person} wakes up on {island}." for person, _, island in chains)])

    def memory(rng: Random) -> Question:
        name = rng.choice(inferred)
        right = land_of[facts.people.index(name)]
        wrong = rng.sample([land for land in facts.lands if land != right], 3)
        return ask(rng, rng.choice(CITIZEN).format(name), right, wrong)

    def context(rng: Random) -> Question:
        lines, chains = journey(rng, questions=True)
        (person, _, right), (_, _, other) = chains
        wrong = [other, *rng.sample([island for island in islands if island not in (right, other)], 2)]
        return ask(rng, f"{' '.join(lines)} {person} wakes up on", right, wrong)

    return Subject(
        write,
        {
            "world_two_hop_memory": collect(rng, memory, QUESTIONS),
            "world_two_hop_context": collect(rng, context, QUESTIONS),
        },
    )
