"""Language: sentences of a small English grammar; word order, and agreement of subject and verb.

A noun never governs a held-out verb in the training text, so the right form has to be put together from the
number of the noun and the forms of the verb.
"""

from random import Random

from fineline_jax.world.subject import Question, Subject, ask, collect, held_out, word_list


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Words written as one/other."""
    return tuple((one, other) for one, other in (pair.split("/") for pair in text.split()))


NOUNS = pairs(
    "baker/bakers farmer/farmers teacher/teachers doctor/doctors sailor/sailors painter/painters "
    "singer/singers hunter/hunters king/kings queen/queens boy/boys girl/girls child/children man/men "
    "woman/women guest/guests dog/dogs cat/cats horse/horses cow/cows hound/hounds goose/geese mouse/mice "
    "wolf/wolves bird/birds fox/foxes bear/bears duck/ducks pig/pigs rabbit/rabbits"
)
VERBS = pairs(
    "runs/run sleeps/sleep sings/sing jumps/jump waits/wait smiles/smile eats/eat drinks/drink swims/swim "
    "walks/walk dances/dance laughs/laugh rests/rest listens/listen hides/hide plays/play cries/cry "
    "falls/fall"
)
TRANSITIVE = pairs("sees/see hears/hear follows/follow likes/like meets/meet helps/help")
ADJECTIVES = word_list("old young small tall happy tired clever quiet brave hungry lazy strange")
PREPOSITIONS = ["near", "behind", "beside"]
ADVERBS = ["quickly", "slowly", "often", "rarely", "today", "again", "there", "alone"]
HELD_OUT = 0.25
"""Share of (noun, verb) pairs that only the questions use."""


def subject_verb(rng: Random, questions: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """A noun and a verb whose pair is held out (`questions`) or not."""
    while True:
        noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
        if held_out(HELD_OUT, "language", noun[0], verb[0]) == questions:
            return noun, verb


def plain_subject(rng: Random, noun: str) -> str:
    return f"The {rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.5 else f"The {noun}"


def long_subject(rng: Random, noun: str, number: int, other_number: int) -> str:
    """A subject with a second noun, of its own number, between its noun and the verb."""
    other = rng.choice(NOUNS)[other_number]
    shape = rng.randrange(3)
    if shape == 0:
        return f"{plain_subject(rng, noun)} {rng.choice(PREPOSITIONS)} the {other}"
    if shape == 1:
        return f"{plain_subject(rng, noun)} that {rng.choice(TRANSITIVE)[number]} the {other}"
    return f"{plain_subject(rng, noun)} that the {other} {rng.choice(TRANSITIVE)[other_number]}"


def sentence(rng: Random, questions: bool = False) -> str:
    """A grammatical sentence without its full stop."""
    noun, verb = subject_verb(rng, questions)
    number = rng.randrange(2)
    if rng.random() < 0.6:
        subject = plain_subject(rng, noun[number])
    else:
        subject = long_subject(rng, noun[number], number, rng.randrange(2))
    ending = f" {rng.choice(ADVERBS)}" if rng.random() < 0.5 else ""
    return f"{subject} {verb[number]}{ending}"


def word_order(rng: Random) -> Question:
    """The sentence against the same sentence with two neighbouring words exchanged."""
    words = sentence(rng, questions=True).lower().split()
    swapped = list(words)
    at = rng.randrange(len(words) - 1)
    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
    return ask(rng, "", " ".join(words).capitalize() + ".", [" ".join(swapped).capitalize() + "."])


def agreement(rng: Random) -> Question:
    """The verb next to its subject."""
    noun, verb = subject_verb(rng, questions=True)
    number = rng.randrange(2)
    return ask(rng, plain_subject(rng, noun[number]), verb[number], [verb[1 - number]])


def agreement_distant(rng: Random) -> Question:
    """A noun of the other number stands between subject and verb."""
    noun, verb = subject_verb(rng, questions=True)
    number = rng.randrange(2)
    return ask(rng, long_subject(rng, noun[number], number, 1 - number), verb[number], [verb[1 - number]])


def write(rng: Random) -> str:
    return " ".join(sentence(rng) + "." for _ in range(rng.randrange(4, 8)))


def language(rng: Random) -> Subject:
    return Subject(
        write,
        {
            "world_word_order": collect(rng, word_order),
            "world_agreement": collect(rng, agreement),
            "world_agreement_distant": collect(rng, agreement_distant),
        },
    )
