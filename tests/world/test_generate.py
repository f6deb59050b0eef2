"""The embedded world: the same bytes from the same seed, questions held out, chance level as stated."""

import hashlib
import json
from pathlib import Path
from random import Random

import pyarrow.parquet
import pytest

from fineline_jax.errors import UserError
from fineline_jax.world.catalogue import TASKS
from fineline_jax.world.commonsense import social_case
from fineline_jax.world.facts import make_facts
from fineline_jax.world.generate import DOCUMENTS, SHARES, World, generate, make_subjects
from fineline_jax.world.subject import held_out

TEXT_SHA256 = "0478c6a48c8582d3181ed36239e80b747a25b1317a68732b2976fec1a5329d55"
QUESTIONS_SHA256 = "dbb39394b922a00bc8d9ecad6a72e5cc968ae8982cf3a85119c9a311dd2269c1"
"""Of seed 0 with 1,000 documents; they change with the world and with nothing else."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return generate(tmp_path_factory.mktemp("world"), seed=0, documents=1000)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def questions(world: World, task: str) -> list[dict]:
    return pyarrow.parquet.read_table(world.benchmarks / "fineline__world" / task / "test.parquet").to_pylist()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_world_of_a_seed_is_the_same_on_every_machine(world: World) -> None:
    asked = json.dumps([questions(world, task) for task in world.tasks]).encode()
    assert sha256(world.text.read_bytes()) == TEXT_SHA256
    assert sha256(asked) == QUESTIONS_SHA256


def test_the_same_seed_writes_the_same_files_and_another_seed_others(world: World, tmp_path: Path) -> None:
    again, other = generate(tmp_path / "a", 0, 1000), generate(tmp_path / "b", 1, 1000)
    for name in ("train.jsonl", "validation.jsonl", "tokenizer/tokenizer.json"):
        here = (world.text.parent / name).read_bytes()
        assert (again.text.parent / name).read_bytes() == here
        assert (other.text.parent / name).read_bytes() != here


def test_questions_do_not_depend_on_the_amount_of_text(world: World, tmp_path: Path) -> None:
    small = generate(tmp_path, 0, 10)
    assert all(questions(small, task) == questions(world, task) for task in world.tasks)
    assert texts(small.validation_text) == texts(world.validation_text)


def test_every_domain_has_at_least_two_tasks_and_writes_text() -> None:
    domains = [task.domain for task in TASKS.values()]
    assert set(domains) == set(SHARES)
    assert all(domains.count(domain) >= 2 for domain in SHARES)
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_well_formed(world: World, task: str) -> None:
    found = questions(world, task)
    assert 150 <= len(found) <= 400
    for q in found:
        assert len(set(q["choices"])) == len(q["choices"])
        assert 0 <= q["answer"] < len(q["choices"])
        assert q["question"] == q["question"].strip()
        assert all(choice == choice.strip() != "" for choice in q["choices"])
    assert len({(q["question"], q["choices"][q["answer"]]) for q in found}) == len(found)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "world_cloze"])
def test_guessing_scores_chance(world: World, task: str) -> None:
    found = questions(world, task)
    choices = len(found[0]["choices"])
    assert TASKS[task].chance == 1 / choices
    # Always naming one position is right in the share of chance, within five standard errors.
    for position in range(choices):
        share = sum(q["answer"] == position for q in found) / len(found)
        assert abs(share - 1 / choices) < 5 * (1 / choices * (1 - 1 / choices) / len(found)) ** 0.5


def verbatim(world: World) -> list[str]:
    """Questions with their answer, and questions alone, that stand in the training text."""
    # One string of all documents, searched by the four words a question ends with before the slow search.
    train = texts(world.text)
    spans: dict[tuple[str, ...], list[int]] = {}
    for i, text in enumerate(train):
        words = text.replace(".", "").replace(",", "").split()
        for at in range(len(words) - 2):
            spans.setdefault(tuple(words[at : at + 3]), []).append(i)
    found = []
    for task in world.tasks:
        for q in questions(world, task):
            answered = f"{q['question']} {q['choices'][q['answer']]}".strip()
            # A subject such as "The dogs" may be written; with this verb behind it, it may not.
            for asked in (answered,) if TASKS[task].domain == "language" else (answered, q["question"]):
                ending = tuple(asked.replace(".", "").replace(",", "").split()[-3:])
                found += [f"{task}: {asked}" for i in spans.get(ending, ()) if asked in train[i]]
    return found


def test_no_question_stands_in_the_training_text(world: World) -> None:
    assert verbatim(world) == []


@pytest.mark.slow
def test_no_question_stands_in_the_training_text_of_the_demo(tmp_path: Path) -> None:
    assert verbatim(generate(tmp_path, 0, DOCUMENTS)) == []


def test_the_search_for_questions_in_the_text_finds_one(world: World, tmp_path: Path) -> None:
    q = questions(world, "world_physical")[0]
    leaked = generate(tmp_path, 0, 10)
    with leaked.text.open("a") as lines:
        lines.write(json.dumps({"text": f"Yes. {q['question']} {q['choices'][q['answer']]}. No."}) + "\n")
    assert len(verbatim(leaked)) == 2


def test_the_land_of_people_asked_about_is_never_written(world: World) -> None:
    train = " ".join(texts(world.text))
    assert all(q["question"] not in train for q in questions(world, "world_two_hop_memory"))


def test_no_value_of_a_fact_is_much_more_frequent_than_another() -> None:
    facts = make_facts(Random("7 facts"), set())
    for values in facts.values.values():
        counts = [values.count(value) for value in set(values)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_every_seed_makes_a_world_whose_names_are_new_words(seed: int, tmp_path: Path) -> None:
    world = generate(tmp_path, seed, 2000)
    words = {word.strip(".,") for text in texts(world.text) for word in text.split()}
    names = {word.lower() for word in words if word.istitle()}
    # A sentence may start with a common word, which is then also found in lower case; a name never is.
    common = {"the", "of", "when", "after", "count", "next", "on", "at", "people", "you"}
    assert not (names - common) & {word for word in words if word.islower()}


def test_a_share_of_all_combinations_is_held_out() -> None:
    kept = sum(held_out(0.25, "a", i, j) for i in range(100) for j in range(100))
    assert 0.23 < kept / 10_000 < 0.27
    assert held_out(1.0, "x") and not held_out(0.0, "x")


def test_neither_the_tie_nor_the_event_alone_tells_the_feeling() -> None:
    rng = Random(0)
    seen: dict[str, list[bool]] = {}
    for _ in range(20_000):
        text, glad = social_case(rng, ("Ana", "Bo"), questions=False)
        tie, happened, _ = text.replace("Ana", "X").replace("Bo", "X").split(". ")
        for word in (tie, happened):
            seen.setdefault(word, []).append(glad)
    assert all(0.42 < sum(glads) / len(glads) < 0.58 for glads in seen.values())


def test_sums_remainders_and_series_are_right() -> None:
    arithmetic = make_subjects(3)["arithmetic"]
    for q in arithmetic.questions["world_addition"]:
        a, _, b, _ = q.question.split()
        assert int(q.choices[q.answer]) == int(a) + int(b)
    for q in arithmetic.questions["world_remainder"]:
        a, _, _, b, _ = q.question.split()
        assert int(q.choices[q.answer]) == int(a) % int(b)
    for q in arithmetic.questions["world_counting"]:
        x, y, z = (int(number) for number in q.question.split(": ")[1].rstrip(",").split(", "))
        assert z - y == y - x == int(q.choices[q.answer]) - z


def test_no_documents_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="documents=0"):
        generate(tmp_path, 0, 0)
