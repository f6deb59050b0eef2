"""Reading: short stories of things put into places; the answer stands in the story, not in the weights."""

from random import Random

from fineline_jax.world.subject import Question, Subject, ask, collect, held_out

THINGS = "coin lamp letter ring book apple brush knife ball candle map watch doll button comb flute".split()
PLACES = "drawer chest basket cupboard kitchen garden cellar barn attic tent cart shed".split()
HELD_OUT = 0.15
"""Share of (person, thing, place) triples that only the questions use."""


def place_of(rng: Random, person: str, thing: str, free: list[str], questions: bool = False) -> str | None:
    """A place out of `free` whose triple is held out (`questions`) or not; None if there is none."""
    places = [place for place in free if held_out(HELD_OUT, "reading", person, thing, place) == questions]
    return rng.choice(places) if places else None


def story(rng: Random, people: tuple[str, ...], moves: int, questions: bool) -> tuple[list[str], dict[str, list[str]]]:
    """Sentences, and the places each thing has been in, the last one last.

    With `questions` the last place of the first thing is a held-out one.
    """
    while True:
        things = rng.sample(THINGS, 2 if rng.random() < 0.5 else 3)
        free = list(PLACES)
        lines: list[str] = []
        places: dict[str, list[str]] = {thing: [] for thing in things}
        events = [(thing, "put", "in") for thing in rng.sample(things, len(things))]
        # Questions are about the first thing: it is the one moved, if any is.
        events += [(things[0] if questions else rng.choice(things), "moved", "to") for _ in range(moves)]
        last = max(i for i, event in enumerate(events) if event[0] == things[0])
        for i, (thing, verb, preposition) in enumerate(events):
            person = rng.choice(people)
            place = place_of(rng, person, thing, free, questions and i == last)
            if place is None:
                break
            free.remove(place)
            places[thing].append(place)
            lines.append(f"{person} {verb} the {thing} {preposition} the {place}.")
        else:
            return lines, places


def reading(rng: Random, people: tuple[str, ...]) -> Subject:
    """`people` are names of which nothing is known outside the story."""

    def write(rng: Random) -> str:
        lines, places = story(rng, people, rng.randrange(3), questions=False)
        for thing in rng.sample(list(places), len(places)):
            place = places[thing][-1]
            verb = "found" if rng.random() < 0.5 else ""
            lines.append(
                f"{rng.choice(people)} {verb} the {thing} in the {place}." if verb else f"The {thing} is in the {place}."
            )
        return " ".join(lines)

    def cloze(rng: Random) -> Question:
        lines, places = story(rng, people, 0, questions=True)
        thing = next(iter(places))
        return Question(f"{' '.join(lines)} {rng.choice(people)} found the {thing} in the", (places[thing][-1],), 0)

    def tracking(rng: Random) -> Question:
        lines, places = story(rng, people, 1, questions=True)
        thing, other = list(places)[:2]
        right, before, elsewhere = places[thing][-1], places[thing][-2], places[other][-1]
        unmentioned = rng.choice([p for p in PLACES if not any(p in seen for seen in places.values())])
        return ask(rng, f"{' '.join(lines)} The {thing} is in the", right, [before, elsewhere, unmentioned])

    return Subject(write, {"world_cloze": collect(rng, cloze), "world_tracking": collect(rng, tracking)})
