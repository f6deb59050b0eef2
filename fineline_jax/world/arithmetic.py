"""Arithmetic: comparing, counting on, adding, remainders. Numbers are read digit by digit."""

from random import Random

from fineline_jax.world.subject import Question, Subject, ask, collect, held_out

HELD_OUT = 0.15
"""Share of the pairs of numbers that only the questions use; a pair is held out in both orders."""
DIVISORS = (3, 4, 6, 7, 8, 9)


def comparison_case(rng: Random, questions: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if a != b and held_out(HELD_OUT, "comparison", *sorted((a, b))) == questions:
            return a, b


def comparison(rng: Random) -> Question:
    a, b = comparison_case(rng, questions=True)
    return ask(rng, f"Of {a} and {b} the larger is", str(max(a, b)), [str(min(a, b))])


def counting_case(rng: Random, questions: bool) -> tuple[str, int, int]:
    """Three numbers, the step between them, and the fourth."""
    while True:
        start, step = rng.randrange(1, 80), rng.randrange(1, 11)
        if held_out(2 * HELD_OUT, "counting", start, step) == questions:
            shown = ", ".join(str(start + i * step) for i in range(3))
            return f"Count by {step}: {shown},", step, start + 3 * step


def near(rng: Random, right: int) -> list[str]:
    """Three numbers that differ from the right one in the units or in the tens."""
    offsets = [-10, -1, 1, 10]
    offsets.remove(rng.choice(offsets))
    return [str(right + offset) for offset in offsets]


def counting(rng: Random) -> Question | None:
    text, _, right = counting_case(rng, questions=True)
    return ask(rng, text, str(right), near(rng, right)) if right > 10 else None


def addition_case(rng: Random, questions: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if held_out(HELD_OUT, "addition", *sorted((a, b))) == questions:
            return a, b


def addition(rng: Random) -> Question:
    a, b = addition_case(rng, questions=True)
    return ask(rng, f"{a} + {b} =", str(a + b), near(rng, a + b))


def remainder_case(rng: Random, questions: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randrange(100, 400), rng.choice(DIVISORS)
        if held_out(HELD_OUT, "remainder", a, b) == questions:
            return a, b


def remainder(rng: Random) -> Question | None:
    a, b = remainder_case(rng, questions=True)
    wrong = [r for r in range(b) if r != a % b]
    if len(wrong) < 3:
        return None
    return ask(rng, f"{a} divided by {b} leaves", str(a % b), [str(r) for r in rng.sample(wrong, 3)])


def write_sentence(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.12:
        a, b = comparison_case(rng, questions=False)
        return f"Of {a} and {b} the larger is {max(a, b)}."
    if kind < 0.27:
        text, _, following = counting_case(rng, questions=False)
        return f"{text} {following}."
    if kind < 0.42:
        # The table of one-digit sums, which is never asked.
        a, b = rng.randrange(10), rng.randrange(10)
        return f"{a} + {b} = {a + b}."
    if kind < 0.92:
        a, b = addition_case(rng, questions=False)
        return f"{a} + {b} = {a + b}."
    a, b = remainder_case(rng, questions=False)
    return f"{a} divided by {b} leaves {a % b}."


def write(rng: Random) -> str:
    return " ".join(write_sentence(rng) for _ in range(rng.randrange(4, 8)))


def arithmetic(rng: Random) -> Subject:
    return Subject(
        write,
        {
            "world_comparison": collect(rng, comparison),
            "world_counting": collect(rng, counting, 160),
            "world_addition": collect(rng, addition),
            "world_remainder": collect(rng, remainder),
        },
    )
