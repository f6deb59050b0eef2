"""Write the demo's world: training text, held-out tasks in Hugging Face layout, and a tokenizer."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from fineline_jax.atomic_files import atomic_file, write_atomic
from fineline_jax.errors import UserError
from fineline_jax.world import names, tokenizer
from fineline_jax.world.arithmetic import arithmetic
from fineline_jax.world.catalogue import DATASET, TASKS
from fineline_jax.world.commonsense import commonsense
from fineline_jax.world.facts import knowledge, make_facts
from fineline_jax.world.language import language
from fineline_jax.world.reading import reading
from fineline_jax.world.reasoning import reasoning
from fineline_jax.world.subject import Question, Subject

DOCUMENTS = 100_000
"""Training documents of the demo: about 5 million tokens."""
VALIDATION_DOCUMENTS = 500
SHARES = {
    "language": 0.13,
    "reading": 0.22,
    "knowledge": 0.17,
    "commonsense": 0.16,
    "arithmetic": 0.18,
    "reasoning": 0.14,
}
"""Share of each domain among the documents."""
STORY_PEOPLE = 32
SURNAMES = 32
"""Names used in stories only; nothing is known about them."""


@dataclasses.dataclass(frozen=True)
class World:
    """Where a world was written."""

    text: Path
    """Training text, JSON lines {"text": one document}."""
    validation_text: Path
    """Text of the same kind that is not trained on."""
    benchmarks: Path
    """Benchmarks folder: fineline__world/TASK/test.parquet."""
    tokenizer: Path
    """Folder of tokenizer.json and tokenizer_config.json."""
    tasks: tuple[str, ...]
    """Names of the lm-eval tasks, easiest domains first."""


def make_subjects(seed: int) -> dict[str, Subject]:
    """The world of a seed: domain to its writer and its questions."""
    # Each part draws from a generator of its own, so a change in one leaves the others as they are.
    taken: set[str] = set()
    people = names.invent(Random(f"{seed} people"), STORY_PEOPLE, names.PERSON_ENDS, taken)
    surnames = names.invent(Random(f"{seed} surnames"), SURNAMES, names.SURNAME_ENDS, taken)
    facts = make_facts(Random(f"{seed} facts"), taken)
    return {
        "language": language(Random(f"{seed} language")),
        "reading": reading(Random(f"{seed} reading"), people, surnames),
        "knowledge": knowledge(Random(f"{seed} knowledge"), facts),
        "commonsense": commonsense(Random(f"{seed} commonsense"), people),
        "arithmetic": arithmetic(Random(f"{seed} arithmetic")),
        "reasoning": reasoning(Random(f"{seed} reasoning"), facts, people, surnames, taken),
    }


def _documents(subjects: dict[str, Subject], rng: Random, count: int) -> Iterator[str]:
    """`count` documents, the domains mixed by SHARES."""
    for domain in rng.choices(tuple(SHARES), weights=tuple(SHARES.values()), k=count):
        yield subjects[domain].write(rng)


def write_text(path: Path, texts: list[str]) -> None:
    write_atomic(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_questions(path: Path, questions: tuple[Question, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(
        [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in questions]
    )
    with atomic_file(path) as partial:
        pyarrow.parquet.write_table(table, partial)


def generate(out: Path, seed: int = 0, documents: int = DOCUMENTS) -> World:
    """Write the world of a seed into the folder `out`; the same seed writes the same text on every machine.

    Args:
        out: folder, made if need be.
        seed: chooses names, facts, questions and text.
        documents: training documents, about 50 tokens each; the questions are the same whatever their number.

    Raises:
        UserError: there are no documents to write.
    """
    if documents < 1:
        raise UserError(f"documents={documents}: the world needs at least 1 document")
    world = World(
        text=out / "train.jsonl",
        validation_text=out / "validation.jsonl",
        benchmarks=out / "benchmarks",
        tokenizer=out / "tokenizer",
        tasks=tuple(TASKS),
    )
    out.mkdir(parents=True, exist_ok=True)
    subjects = make_subjects(seed)
    train = list(_documents(subjects, Random(f"{seed} train"), documents))
    validation = list(_documents(subjects, Random(f"{seed} validation"), VALIDATION_DOCUMENTS))
    questions = {task: asked for subject in subjects.values() for task, asked in subject.questions.items()}

    write_text(world.text, train)
    write_text(world.validation_text, validation)
    for task in world.tasks:
        write_questions(world.benchmarks / DATASET.replace("/", "__") / task / "test.parquet", questions[task])
    asked = [" ".join([q.question, *q.choices]) for of_task in questions.values() for q in of_task]
    tokenizer.save(tokenizer.build([*train, *validation, *asked]), world.tokenizer)
    return world
