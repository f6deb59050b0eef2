"""The world's tasks in lm-eval and its tokenizer in transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from fineline_jax.scoring.requests.suite import read_suite
from fineline_jax.world.catalogue import DATASET, TASKS, TASKS_FOLDER
from fineline_jax.world.generate import World, generate
from fineline_jax.world.tokenizer import VOCAB_SIZE

SUITE = Path(__file__).parents[2] / "configs" / "suites" / "demo.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return generate(tmp_path_factory.mktemp("world"), seed=0, documents=3000)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(world.tokenizer)


def load(world: World, task: str) -> ConfigurableTask:
    """The shipped task over the world's own files instead of the hub's."""
    config = yaml.safe_load((TASKS_FOLDER / f"{task}.yaml").read_text())
    if "include" in config:
        config = yaml.safe_load((TASKS_FOLDER / config.pop("include")).read_text()) | config
    file = world.benchmarks / DATASET.replace("/", "__") / task / "test.parquet"
    local = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
    }
    return ConfigurableTask(config=config | local)


def test_the_shipped_tasks_are_those_of_the_catalogue_and_of_the_suite() -> None:
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    assert set(manager.all_tasks) == set(TASKS)
    for task in TASKS:
        config = yaml.safe_load((TASKS_FOLDER / f"{task}.yaml").read_text())
        assert config["task"] == config["dataset_name"] == task
    specs = read_suite(SUITE).tasks
    assert [(spec.task, spec.domain, spec.chance) for spec in specs] == [
        (name, task.domain, task.chance) for name, task in TASKS.items()
    ]


@pytest.mark.parametrize("task", TASKS)
def test_lm_eval_builds_a_request_for_every_choice(
    task: str, world: World, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    loaded = load(world, task)
    docs = list(loaded.test_docs())
    loaded.build_all_requests(limit=50, rank=0, world_size=1)
    requests = [instance.args for instance in loaded.instances]
    assert requests == [(doc["question"], f" {choice}") for doc in docs[:50] for choice in doc["choices"]]
    # lm-eval's cut between context and continuation is exact, with BOS and without, and nothing is unknown.
    for special in (True, False):
        for context, continuation in requests:
            before = tokenizer.encode(context, add_special_tokens=special)
            whole = tokenizer.encode(context + continuation, add_special_tokens=special)
            alone = tokenizer.encode(continuation, add_special_tokens=False)
            assert whole == before + alone
            assert alone and tokenizer.unk_token_id not in whole


def test_metrics_of_a_perfect_and_of_a_wrong_model(world: World) -> None:
    loaded = load(world, "world_physical")
    doc = next(iter(loaded.test_docs()))
    right = [(0.0 if i == doc["answer"] else -1.0, False) for i in range(4)]
    assert loaded.process_results(doc, right)["acc"] == 1.0
    assert loaded.process_results(doc, [(-a, b) for a, b in right])["acc"] == 0.0


def test_the_tokenizer_knows_the_whole_text_and_has_a_fixed_size(
    world: World, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("The cat sleeps.")[0] == 1
    for path in (world.text, world.validation_text):
        for line in path.read_text().splitlines():
            assert 0 not in tokenizer.encode(json.loads(line)["text"])


def test_upper_and_lower_case_and_the_digits_of_a_number(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    assert tokenizer.tokenize("The 47 cats.") == ["the", "4", "7", "cats", "."]
    assert tokenizer.encode("a word nobody wrote: xyzzy", add_special_tokens=False)[-1] == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["the", "dog", "sees", "1", "23", "+", "=", ".", ",", "Cat", "lives"]), max_size=8),
    st.lists(
        st.sampled_from(["the", "dog", "sees", "1", "23", "+", "=", ".", ",", "Cat", "lives"]), min_size=1, max_size=4
    ),
)
def test_tokens_of_context_and_continuation_are_those_of_the_whole(
    world: World, context: list[str], continuation: list[str]
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(world.tokenizer / "tokenizer.json"))
    before, after = " ".join(context), " " + " ".join(continuation)
    whole = tokenizer.encode(before + after).ids
    assert whole == tokenizer.encode(before).ids + tokenizer.encode(after, add_special_tokens=False).ids
