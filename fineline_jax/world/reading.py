"""Reading: short stories of things put into places; the answer stands in the story, not in the weights.

Some documents only say words again (`echo`): with every word of the second half given before, they are what a
model learns to look back from; the stories then need it to look for the right thing.
"""

from random import Random

from fineline_jax.world.names import full_names
from fineline_jax.world.subject import Question, Subject, ask, collect, held_out, word_list

THINGS = word_list("coin lamp letter ring book apple brush knife ball pencil map watch doll button comb flute")
PLACES = word_list("drawer chest basket cupboard kitchen garden cellar barn attic tent cart shed")
ECHOES = 0.4
"""Share of the documents that only say words again."""
HELD_OUT = 0.15
"""Share of (person, thing, place) triples that only the questions use."""


def place_of(rng: Random, person: str, thing: str, free: list[str], questions: bool = False) -> str | None:
    """A place out of `free` whose triple is held out (`questions`) or not; None if there is none."""
    places = [place for place in free if held_out(HELD_OUT, "reading", person.split()[0], thing, place) == questions]
    return rng.choice(places) if places else None


def story(rng: Random, cast: list[str], moves: int, questions: bool) -> tuple[list[str], dict[str, list[str]]]:
    """Sentences, and the places each thing has been in, the last one last.

    With `questions` the last place of the first thing is a held-out one.
    """
    while True:
        things = rng.sample(THINGS, 2 if rng.random() < 0.5 else 3)
        free = list(PLACES)
        lines: list[str] = []
        places: dict[str, list[str]] = {thing: [] for thing in things}
        events = [(thing, "put") for thing in rng.sample(things, len(things))]
        # Questions are about the first thing: it is the one moved, if any is.
        events += [(things[0] if questions else rng.choice(things), "moved") for _ in range(moves)]
        last = max(i for i, event in enumerate(events) if event[0] == things[0])
        for i, (thing, verb) in enumerate(events):
            person = rng.choice(cast)
            place = place_of(rng, person, thing, free, questions and i == last)
            if place is None:
                break
            free.remove(place)
            places[thing].append(place)
            lines.append(f"{person} {verb} the {thing} into the {place}.")
        else:
            return lines, places


def echo(rng: Random, people: tuple[str, ...]) -> str:
    """One person's words said again by another: the second says nothing new."""
    caller, answerer = rng.sample(people, 2)
    words = " ".join(rng.sample(THINGS + PLACES, rng.randrange(5, 12)))
    return f"{caller} calls: {words}. {answerer} answers: {words}."


def reading(rng: Random, people: tuple[str, ...], surnames: tuple[str, ...]) -> Subject:
    """`people` are names of which nothing is known outside the story."""

    def write(rng: Random) -> str:
        if rng.random() < ECHOES:
            return echo(rng, people)
        cast = full_names(rng, people, surnames, 2)
        lines, places = story(rng, cast, rng.randrange(3), questions=False)
        # "into" names a new place and "in" a known one, so that a text shows early when to look back.
        found = [f"{rng.choice(cast)} found the {thing} in the {seen[-1]}." for thing, seen in places.items()]
        lying = [f"The {thing} is in the {seen[-1]}." for thing, seen in places.items()]
        lines += rng.sample(found + lying, 2 * len(places))
        return " ".join(lines)

    def cloze(rng: Random) -> Question:
        cast = full_names(rng, people, surnames, 2)
        lines, places = story(rng, cast, 0, questions=True)
        thing = next(iter(places))
        return Question(f"{' '.join(lines)} {rng.choice(cast)} found the {thing} in the", (places[thing][-1],), 0)

    def tracking(rng: Random) -> Question:
        lines, places = story(rng, full_names(rng, people, surnames, 2), 1, questions=True)
        thing, other = list(places)[:2]
        right, before, elsewhere = places[thing][-1], places[thing][-2], places[other][-1]
        unmentioned = rng.choice([p for p in PLACES if not any(p in seen for seen in places.values())])
        return ask(rng, f"{' '.join(lines)} The {thing} is in the", right, [before, elsewhere, unmentioned])

    return Subject(write, {"world_cloze": collect(rng, cloze), "world_tracking": collect(rng, tracking)})
