"""Common sense as consistent rules: what happens to things, what is bigger, who feels what.

Questions use combinations that are never written: the kind of a thing, its size, or the meaning of an event
has to be learned from the other sentences it stands in.
"""

from random import Random

from fineline_jax.world.subject import Question, Subject, ask, collect, held_out, word_list

THINGS = {
    "glass": word_list("vase bottle mirror window jar goblet lens bulb flask marble prism beaker"),
    "wood": word_list("chair table ladder fence barrel stool bench broom raft crutch plank crate"),
    "iron": word_list("nail sword anchor chain axe hook bolt shovel kettle helmet hinge rail"),
    "cloth": word_list("shirt blanket scarf curtain towel sock coat flag apron carpet glove sail"),
    "paper": word_list("poster envelope ticket notebook menu card poem receipt stamp banknote leaflet diary"),
    "wax": word_list("crayon seal figurine taper tablet honeycomb soap lipstick candle pastille mask polish"),
}
OUTCOMES = {
    "fell on the floor": ("broke", "bounced", "rang", "slumped", "fluttered", "chipped"),
    "was thrown into the fire": ("cracked", "burned", "glowed", "burned", "burned", "melted"),
    "was dropped into the lake": ("sank", "floated", "sank", "soaked", "dissolved", "floated"),
    "was hit with a hammer": ("broke", "splintered", "rang", "slumped", "tore", "crumbled"),
    "was left in the rain": ("shone", "swelled", "rusted", "soaked", "dissolved", "dripped"),
    "was left in the sun": ("shone", "dried", "warmed", "faded", "faded", "melted"),
    "was cut with a saw": ("cracked", "split", "sparked", "tore", "tore", "crumbled"),
    "was blown by the storm": ("broke", "rolled", "stayed", "fluttered", "fluttered", "rolled"),
}
"""Event to what each kind does, in the order of THINGS."""
WHAT_HAPPENED = ("When the {} {}, it", "The {} {}, and it", "After the {} {}, it")

SIZES = word_list(
    "flea ant bee snail worm moth toad sparrow rat crow hen owl rooster beaver otter eagle lamb monkey calf "
    "donkey deer lion bull camel buffalo giraffe elephant whale"
)
"""From the smallest to the biggest."""

FRIENDS = ("{} and {} are friends.", "{} is fond of {}.", "{} admires {}.", "{} cares for {}.")
RIVALS = ("{} and {} are rivals.", "{} is cross with {}.", "{} envies {}.", "{} despises {}.")
GOOD = ("won the race", "got a prize", "passed the test", "found the treasure", "won the game", "got a present")
BAD = ("lost the race", "got a fine", "failed the test", "lost the purse", "lost the game", "got a fever")
GLAD = ("glad", "pleased", "cheerful")
SAD = ("sad", "upset", "gloomy")
HELD_OUT = 0.3
"""Share of the combinations that only the questions use."""


def physical_case(rng: Random, questions: bool) -> tuple[str, str, str]:
    """A sentence up to its outcome, the event and the outcome."""
    kinds = tuple(THINGS)
    while True:
        kind, event = rng.randrange(len(kinds)), rng.choice(tuple(OUTCOMES))
        thing = rng.choice(THINGS[kinds[kind]])
        if held_out(HELD_OUT, "physical", thing, event) == questions:
            return rng.choice(WHAT_HAPPENED).format(thing, event), event, OUTCOMES[event][kind]


def physical(rng: Random) -> Question:
    """What happens to a thing, against what happens to things of other kinds."""
    text, event, right = physical_case(rng, questions=True)
    return ask(rng, text, right, rng.sample(sorted(set(OUTCOMES[event]) - {right}), 3))


def size_case(rng: Random, questions: bool) -> tuple[str, str, str]:
    """Two animals, and how the second compares with the first."""
    while True:
        first, second = rng.sample(range(len(SIZES)), 2)
        if held_out(HELD_OUT, "size", *sorted((first, second))) == questions:
            return SIZES[first], SIZES[second], "bigger" if second > first else "smaller"


def size(rng: Random) -> Question:
    first, second, right = size_case(rng, questions=True)
    wrong = "smaller" if right == "bigger" else "bigger"
    return ask(rng, f"Next to the {first}, the {second} is", right, [wrong])


def social_case(rng: Random, people: tuple[str, ...], questions: bool) -> tuple[str, bool]:
    """Two people and an event up to the feeling; whether that is good: friends share it, rivals do not."""
    while True:
        friends, good = rng.random() < 0.5, rng.random() < 0.5
        tie, event = rng.randrange(len(FRIENDS)), rng.randrange(len(GOOD))
        # Held out alike for friends and rivals, good and bad: in what is left, neither the tie nor the event
        # alone decides the feeling. Otherwise the one seen more often would be the wrong answer here.
        if held_out(HELD_OUT, "social", tie, event) == questions:
            first, second = rng.sample(people, 2)
            tie_text = (FRIENDS if friends else RIVALS)[tie].format(first, second)
            return f"{tie_text} {second} {(GOOD if good else BAD)[event]}. {first} felt", friends == good


def commonsense(rng: Random, people: tuple[str, ...]) -> Subject:
    """`people` are names of which nothing is known outside the story."""

    def write_sentence(rng: Random) -> str:
        kind = rng.random()
        if kind < 0.12:
            material = rng.choice(tuple(THINGS))
            return f"The {rng.choice(THINGS[material])} is made of {material}."
        if kind < 0.5:
            text, _, outcome = physical_case(rng, questions=False)
            return f"{text} {outcome}."
        if kind < 0.7:
            first, second, comparison = size_case(rng, questions=False)
            return f"Next to the {first}, the {second} is {comparison}."
        text, glad = social_case(rng, people, questions=False)
        return f"{text} {rng.choice(GLAD if glad else SAD)}."

    def write(rng: Random) -> str:
        return " ".join(write_sentence(rng) for _ in range(rng.randrange(3, 6)))

    def social(rng: Random) -> Question:
        text, glad = social_case(rng, people, questions=True)
        right, wrong = (GLAD, SAD) if glad else (SAD, GLAD)
        return ask(rng, text, rng.choice(right), [rng.choice(wrong)])

    return Subject(
        write,
        {
            "world_physical": collect(rng, physical),
            "world_size": collect(rng, size),
            "world_social": collect(rng, social),
        },
    )
