"""Registered series on listings with the names of the hub: every checkpoint is placed, in order; what --check says."""

import random
import re
from pathlib import Path

import pytest
from remote_examples import hub
from series_listings import LISTINGS

from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.registry.entries import Entry, every_entry, find, placed, stage_starts
from fineline_jax.checkpoints.remote import download
from fineline_jax.cli import main


@pytest.fixture(scope="module")
def every() -> dict[str, Entry]:
    return {one.name: one for one in every_entry()}


def repository(entry: Entry) -> str:
    return entry.location.removeprefix("hf://").partition("@")[0]


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


def listed(entry: Entry) -> list[str]:
    names, others, _ = LISTINGS[entry.name]
    shuffled = [*names(), *others.split()]
    random.Random(entry.name).shuffle(shuffled)
    return shuffled


@pytest.mark.parametrize("name", LISTINGS)
def test_every_listed_checkpoint_has_its_place_on_one_axis_of_tokens(served, every, name: str, tmp_path: Path) -> None:
    made, _, last = LISTINGS[name]
    served.repositories = {repository(every[name]): {one: {} for one in listed(every[name])}}
    found = open_series(name, downloads=tmp_path).checkpoints
    assert [one.name for one in found] == list(made())
    tokens = [one.tokens for one in found if one.tokens is not None]
    assert len(tokens) == len(found) and tokens == sorted(set(tokens))
    steps = [one.step for one in found if one.step is not None]
    assert steps == sorted(set(steps))
    # A name rounds to 10^9, up or down; Apertus' count 0.14 % more.
    assert last is not None and abs(tokens[-1] - last) <= (1e9 if last % 10**9 == 0 else 0)
    for one in (*found[:: len(found) // 5 + 1], found[-1]):
        assert placed(repository(every[name]), one.name) == placed(
            repository(every[name]).split("/")[1].upper(), one.name
        )
        series, where = placed(repository(every[name]), one.name) or (None, None)
        assert series is not None and where is not None and (series.name, where.tokens) == (name, one.tokens)


def test_a_later_stage_begins_where_the_one_before_it_ended(every) -> None:
    for name, border, before, after in (
        ("smollm3-3b", "stage 2", "stage1-step-3440000", "stage2-step-3480000"),
        ("smollm3-3b", "stage 3", "stage2-step-4200000", "stage3-step-4240000"),
        ("olmo-3-7b", "long context", "stage2-step47684", "stage3-step1000"),
        ("comma-v0.1-1t", "stage 2", "stage1-step460000-tokens965B", "stage2-step002000-tokens969B"),
        ("lucie-7b", "context extension", "step0753851", "extension_step0000250"),
        ("olmo-hybrid-7b", "long context", "stage2-ingredient1+2-step23842", "stage3-step1000"),
        ("marin-8b", "phoenix", "jellyfish", "phoenix"),
    ):
        start = stage_starts(every[name])[border]
        (_, ended), (_, begun) = (placed(repository(every[name]), one) or pytest.fail(one) for one in (before, after))
        assert ended.tokens == start < (begun.tokens or 0), name
    for model, repo, last in (("7b", "OLMo-2-1124-7B", "stage1-step928646-tokens3896B"),
                              ("13b", "OLMo-2-1124-13B", "stage1-step596057-tokens5001B"),
                              ("32b", "OLMo-2-0325-32B", "stage1-step721901-tokens6056B")):  # fmt: skip
        stage_1 = placed(repo, last)
        assert stage_1 is not None
        assert stage_starts(every[f"olmo-2-{model}-stage2-ingredient1"]) == {"stage 2": stage_1[1].tokens}
    # Behind the last stage: fine-tuning begins at the tokens of the last checkpoint of pretraining.
    behind = {"olmo-3-7b-think-sft": ("Olmo-3-1025-7B", "stage3-step11921"), "marin-8b-sft": ("marin-8b-base",
              "deeper-starling"), "smollm3-3b-post": ("SmolLM3-3B-checkpoints", "stage3-step-4720000")}  # fmt: skip
    for name, where in behind.items():
        end = placed(*where)
        assert end is not None and [*stage_starts(every[name]).values()] == [end[1].tokens]


def test_what_no_series_has_is_not_placed() -> None:
    assert placed("someone/else", "step1000") is None and placed("EleutherAI/pythia-70m", "v0") is None
    assert placed("EleutherAI/pythia-70m") is None and placed("m-a-p/Amber-Reproduce-x") is None
    found = placed("m-a-p/Amber-Reproduce-8.39B")
    assert found is not None and found[1].tokens == 8_388_608_000


def test_check_says_what_fits_what_is_of_another_series_and_what_of_none(served, every, capsys) -> None:
    served.repositories = {repository(every["olmo-2-7b"]): {one: {} for one in listed(every["olmo-2-7b"])}}
    assert main(["series", "olmo-2-7b", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "933 names at hf://allenai/OLMo-2-1124-7B@{name}, 930 of them checkpoints of olmo-2-7b" in printed
    assert "of another series: 1, olmo-2-7b-stage2-ingredient3" in printed and "of no series: 1, main" in printed
    largest = re.search(r"tokens in 930 names, by the rule at most (\d+)M others", printed)
    # Of step928646: 3896B against 3895.02B.
    assert largest is not None and int(largest[1]) == 976
    assert "from step150-tokens1B (629M tokens) to stage1-step928646-tokens3896B (3.9T tokens)" in printed
    assert main(["series", "olmo-2-7b-stage2-ingredient3", "--check"]) == 0
    assert "tokens in 1 names are not compared: The tokens in a name count stage 2 only." in capsys.readouterr().out


def test_check_fails_if_names_counts_or_tokens_are_others(served, every, capsys, tmp_path: Path) -> None:
    entry = every["comma-v0.1-1t"]
    names = [one for one in listed(entry) if not one.startswith("stage2-step018000")]
    served.repositories = {repository(entry): {one: {} for one in [*names, "stage1-step005000-tokens42B", "x1", "x2"]}}
    assert main(["series", entry.name, "--check"]) == 1
    said = capsys.readouterr()
    for text in (
        "not listed: 1, stage2-step018000-tokens1002B",
        "tokens: 1 names say others, stage1-step005000-tokens42B has 10.4858B by the rule",
    ):
        assert text in said.out and text in said.err
    assert "count:" not in said.out, "one is missing, one is there in its place: 55"
    assert "of no series: 3, xN (2), main" in said.out
    assert said.err.count("\n") == 1 and "mend the entry" in said.err
    served.repositories = {repository(entry): {one: {} for one in names}}
    assert (
        main(["series", entry.name, "--check"]) == 1 and "count: 55 in the entry, 54 listed" in capsys.readouterr().err
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "name: m-{n}\nlocation: hf://o/r{n}@{name}\nnames: step1 step2\npattern: step{step}\nvariants: {n: [1, 2]}"
    )
    served.repositories = {"o/r1": {"step1": {}, "step2": {}}, "o/r2": {"step1": {}}}
    assert main(["series", str(mine), "--check"]) == 1
    said = capsys.readouterr()
    assert "m-1:\n" in said.out and "m-2:\n" in said.out and said.err.count("not listed: 1, step2") == 1
    assert main(["series", "--check"]) == 2 and main(["series", "none", "--check"]) == 2
    assert main(["series", "olmoe-1b-7b", "--check"]) == 2, "nothing is at that address"


def test_amber_is_where_its_organisation_is_called_now() -> None:
    entry = find("amber")
    assert entry is not None and entry.location == "hf://IFM/Amber@{name}" and entry.count == 360
    assert placed("LLM360/Amber", "ckpt_000") == placed("IFM/Amber", "ckpt_000") is not None
