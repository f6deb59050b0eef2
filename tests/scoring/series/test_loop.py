"""What happens around the model when a series is scored: which checkpoints, which files and headers, what is told.

The model is played: its log-likelihoods follow from its weights and the requests.
"""

import dataclasses
import json
import logging
import os
import shutil
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from played_model import Model
from scoring_examples import score_once, score_series
from series_examples import CONFIG, fresh_params, one_device

from fineline_jax import multihost, progress
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Checkpoint, Remote, Scoring, Series
from fineline_jax.errors import UserError
from fineline_jax.multihost import check_on_process_0
from fineline_jax.scoring import score_files
from fineline_jax.scoring.engine import scorer
from fineline_jax.scoring.estimates import Value
from fineline_jax.scoring.job_shard import WHOLE, JobShard, job_shard
from fineline_jax.scoring.options import PackOptions, ScoreOptions, check_batch_tokens
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.series import choice, compatibility, in_training, watch
from fineline_jax.scoring.series import score_series as series_loop

NAMES = ("step1-tokens2B", "step2-tokens4B", "step3-tokens6B")
LENGTHS = [CONFIG.context + n for n in (-2, -1, 0, 1)]
"""Of the contexts; each has two targets."""


def packed(**manifest: Any) -> Pack:
    """Four requests of one task, made without a tokenizer."""
    numbers = lambda rows, kind: pa.array(rows, kind)
    contexts = {"context": range(4), "text": [""] * 4, "tokens": [[1] * length for length in LENGTHS]}
    requests = {"request": range(4), "task": ["a"] * 4, "doc": range(4), "choice": [0] * 4, "context": range(4),
                "text": [""] * 4, "tokens": [[2, 3]] * 4}  # fmt: skip
    tables = []
    for name, columns in (("contexts", contexts), ("requests", requests), ("documents", {})):
        schema = pack.SCHEMAS[name]
        arrays = [numbers(list(columns.get(field.name, [])), field.type) for field in schema]
        tables.append(pa.Table.from_arrays(arrays, schema=schema))
    tokenizer = {"tokenizer_hash": "0", "size": CONFIG.vocab_size, "adds_bos": True}
    tasks = [{"task": "a", "output_type": "x", "shots": 0}]
    plain = {"format": pack.FORMAT, "mode": "lm-eval", "max_context": None, "prefix_token": 0, "tokenizer": tokenizer,
             "tasks": tasks, "groups": [], "suite": "s", "bos": "auto"}  # fmt: skip
    made = Pack(plain | manifest, *tables)
    made.manifest["hash"] = pack.content_hash(made)
    return made


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "run"
    for step, name in enumerate(NAMES, start=1):
        with jax.set_mesh(one_device()):
            export_hf(CONFIG, fresh_params(step), folder / name)
    return folder


@pytest.fixture
def run(released, tmp_path) -> Path:
    shutil.copytree(released, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def model(monkeypatch) -> Model:
    played = Model()
    monkeypatch.setattr(series_loop, "make_scorer", played.make_scorer)
    monkeypatch.setattr(progress, "bar", played.bar)
    return played


def score(run: Path | str, out: Path, requests: Pack | None = None, **options: Any) -> list[Path]:
    options_ = ScoreOptions(**options)
    return score_series(open_series(str(run)), requests or packed(), out, one_device(), options_)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


# Headers and keys


def test_a_file_says_what_was_scored_and_how(run, model, tmp_path):
    files = score(run, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in files] == [
        f"run/{name}.parquet" for name in NAMES
    ]
    checkpoints = open_series(str(run)).checkpoints
    for number, (path, checkpoint) in enumerate(zip(files, checkpoints, strict=True), start=1):
        found = score_files.read(path)
        weights = load.weights_hash(checkpoint)
        assert found.header == score_files.Header(
            series="run", checkpoint=NAMES[number - 1], step=number, tokens=2_000_000_000 * number, context=96,
            key=score_files.Key(weights, packed().hash, "float32", "auto", "tree-5"),
            stat_signature=load.stat_signature(checkpoint), engine="tree", engine_reason="", location=str(run),
        )  # fmt: skip
        table = pq.read_table(path)
        assert [(field.name, str(field.type)) for field in table.schema] == [
            ("request", "int32"), ("loglikelihood", "double"), ("is_greedy", "bool"),
        ]  # fmt: skip
        assert table["request"].to_pylist() == [0, 1, 2, 3] and found.is_greedy.tolist() == [True, False, False, True]
        loaded, _ = model.score(packed(), CONFIG, load.load(checkpoint, one_device())[1])
        assert found.loglikelihood.tolist() == loaded.tolist(), "every bit of float64"
    assert len({path.read_bytes() for path in files}) == 3


def test_every_checkpoint_is_computed_as_asked(run, model, tmp_path):
    score(run, tmp_path / "out", dtype="bfloat16", batch_tokens=77)
    expected = {"dtype": "bfloat16", "stored": "bfloat16", "mesh": one_device(), "config": CONFIG, "context": 96,
                "batch_tokens": 77}  # fmt: skip
    assert model.asked == [expected] * 3
    assert {score_files.read_header(path).key.dtype for path in (tmp_path / "out/run").iterdir()} == {"bfloat16"}
    one = open_series(f"{run}@{NAMES[0]}")
    options = ScoreOptions("bfloat16", 77)
    score_series(one, packed(), tmp_path / "one", one_device(), options)
    assert model.asked == [expected] * 4
    with pytest.raises(UserError, match="--batch-tokens 0 must be at least 1"):
        score(run, tmp_path / "out", batch_tokens=0)


def test_a_scorer_is_made_once_for_all_series_of_one_config(run, model, tmp_path):
    """And for every look of a watch; another config has its own."""
    shutil.copytree(run, tmp_path / "other")
    each = [open_series(str(folder)) for folder in (run, tmp_path / "other")]
    score_all = series_loop.SeriesScorer(packed(), tmp_path / "out", one_device())
    score_all([dataclasses.replace(each[0], checkpoints=each[0].checkpoints[:1])])
    score_all(each)
    assert (len(model.asked), model.made) == (6, 1)
    with jax.set_mesh(one_device()):
        wide = dataclasses.replace(CONFIG, context=48)
        export_hf(wide, fresh_params(5), tmp_path / "wide")
    score_all([open_series(str(tmp_path / "wide"))])
    assert model.made == 2 and model.asked[-1]["context"] == 48


CHANGES = {"weights_hash": "another", "pack_hash": "another", "dtype": "bfloat16", "bos": "never",
           "engine_version": "another"}  # fmt: skip


@pytest.mark.parametrize("part", CHANGES)
def test_scores_of_another_key_are_made_again_and_of_the_same_not(run, model, tmp_path, part):
    """Each of the five parts, as a file that is there already would have it."""
    score(run, tmp_path / "out")
    path = tmp_path / "out/run" / f"{NAMES[1]}.parquet"
    before = contents(tmp_path / "out/run")
    found = score_files.read(path)
    other = dataclasses.replace(found.header.key, **{part: CHANGES[part]})
    score_files.write(tmp_path / "out", dataclasses.replace(found, header=dataclasses.replace(found.header, key=other)))
    # For other weights the version tells; one that is the same is believed.
    os.utime(run / NAMES[1] / "model.safetensors", ns=(1, 1))
    score(run, tmp_path / "out")
    assert len(model.asked) == 4
    after = contents(tmp_path / "out/run")
    changed = score_files.read_header(path)
    assert changed.key == found.header.key and {name: after[name] for name in after if name != path.name} == {
        name: before[name] for name in before if name != path.name
    }


def test_a_dtype_or_an_engine_of_ones_own_asks_for_other_scores(run, model, tmp_path, monkeypatch):
    score(run, tmp_path / "out")
    score(run, tmp_path / "out", dtype="bfloat16")
    assert len(model.asked) == 6
    monkeypatch.setattr(series_loop, "ENGINE_VERSION", "next")
    score(run, tmp_path / "out", dtype="bfloat16")
    assert len(model.asked) == 9
    with pytest.raises(UserError, match="holds scores of another request pack"):
        score(run, tmp_path / "out", packed(max_context=50))
    score(run, tmp_path / "out", packed(bos="never"), dtype="bfloat16")
    assert len(model.asked) == 12, "the hash of the pack does not hold its policy"


def test_what_is_recognised_without_reading_has_the_version_of_now(run, model, tmp_path):
    [path, *_] = score(run, tmp_path / "out")
    header, checkpoint = score_files.read_header(path), open_series(str(run)).checkpoints[0]
    key = lambda weights: dataclasses.replace(header.key, weights_hash=weights)
    assert series_loop.is_scored(header, checkpoint, key)
    assert not series_loop.is_scored(None, checkpoint, key)
    assert not series_loop.is_scored(dataclasses.replace(header, stat_signature=""), checkpoint, key)
    assert not series_loop.is_scored(dataclasses.replace(header, stat_signature="older"), checkpoint, key)
    assert not series_loop.is_scored(header, checkpoint, lambda weights: dataclasses.replace(header.key, dtype="x"))
    (run / NAMES[0] / "model.safetensors").unlink()
    assert not series_loop.is_scored(header, checkpoint, key)


def test_the_same_weights_with_another_time_keep_their_scores_and_get_a_new_version(run, model, tmp_path):
    score(run, tmp_path / "out")
    moved = tmp_path / "moved" / "run"
    shutil.copytree(run, moved)
    for name in NAMES:
        os.utime(moved / name / "model.safetensors", ns=(5, 5))
    before = {path.name: score_files.read(path) for path in (tmp_path / "out/run").iterdir()}
    score(moved, tmp_path / "out")
    assert len(model.asked) == 3
    for checkpoint in open_series(str(moved)).checkpoints:
        old, new = (
            before[f"{checkpoint.name}.parquet"],
            score_files.read(score_files.path_of(tmp_path / "out", "run", checkpoint.name)),
        )
        version = load.stat_signature(checkpoint)
        assert new.header == dataclasses.replace(old.header, stat_signature=version, location=str(moved))
        assert new.loglikelihood.tobytes() == old.loglikelihood.tobytes()


# What is told


def test_the_log_has_the_seconds_in_the_model_and_all_others(run, model, tmp_path, monkeypatch, caplog):
    """A clock of our own: 5 s until the first model begins, 3 s in it, then 1 s and 3 s each."""
    now = [100.0]

    def make_scorer(*arguments: Any, **options: Any) -> Any:
        score = model.make_scorer(*arguments, **options)

        def slow(*arguments: Any) -> Any:
            now[0] += 3
            return score(*arguments)

        return slow

    each = series_loop.open_each

    def opened(*arguments: Any) -> Iterator[Any]:
        now[0] += 4
        for one in each(*arguments):
            now[0] += 1
            yield one

    clock = types.SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(series_loop, "time", clock)
    monkeypatch.setattr(series_loop, "make_scorer", make_scorer)
    monkeypatch.setattr(series_loop, "open_each", opened)
    with caplog.at_level(logging.INFO):
        score(run, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    times = [line.pop("opened") for line in lines]
    assert all(len(each) == 3 and each == sorted(each) for each in times), "begun, here and hashed, on the devices"
    assert lines == [
        {"series": "run", "checkpoint": name, "requests": 4, "model_seconds": 3.0, "other_seconds": other,
         "scored": [began, began + 3.0]}
        for name, other, began in ((NAMES[0], 5.0, 105.0), (NAMES[2], 1.0, 109.0), (NAMES[1], 1.0, 113.0))
    ]  # fmt: skip
    assert "run: 3 checkpoints scored in 16s, 43.8% of it outside the model" in caplog.text
    caplog.clear()
    score(run, tmp_path / "out")
    assert "scored in" not in caplog.text and len((tmp_path / "out/log.jsonl").read_text().splitlines()) == 3


def test_the_bar_reaches_its_end_whatever_becomes_of_the_checkpoints(run, model, tmp_path, caplog):
    """One done before, one damaged, one with another time, one to be scored."""
    with jax.set_mesh(one_device()):
        export_hf(CONFIG, fresh_params(4), run / "step4-tokens8B")
    score(f"{run}@step[13]*", tmp_path / "out")
    assert [bar[:4] for bar in model.bars] == [["score run", 8, "requests", 8]]
    cut = ", 2 requests cut to 96 tokens"
    then = ", then at most 1 checkpoint between two points"
    assert model.bars[0][4] == [f"checkpoint 1 of 2: {NAMES[0]}{then}{cut}", f"checkpoint 2 of 2: {NAMES[2]}{cut}"]
    (run / NAMES[1] / "model.safetensors").write_bytes(b"x")
    os.utime(run / NAMES[2] / "model.safetensors", ns=(1, 1))
    with pytest.raises(series_loop.NotAllScored):
        score(run, tmp_path / "out")
    assert model.bars[1][:4] == ["score run", 12, "requests", 12] and len(model.asked) == 3, "without what is done"
    after = then.replace("1 checkpoint", "2 checkpoints")
    named = zip((1, 2, 3), (f"step4-tokens8B{after}{cut}", f"{NAMES[1]}{then}", NAMES[2]), strict=True)
    assert model.bars[1][4] == [f"checkpoint {number} of 3: {name}" for number, name in named], "coarse to fine"
    assert f"run/{NAMES[1]} is passed over" in caplog.messages, "the reason is told once, at the end"


def test_until_resolved_scores_where_the_curve_changes_and_the_rest_when_asked(
    released, model, tmp_path, monkeypatch, caplog
):
    """A step between the 12th and the 13th of 17; what is scored before a kill counts."""
    run = tmp_path / "run"
    for step in range(17):
        shutil.copytree(released / NAMES[0], run / f"step{step}-tokens{100 + step}B")
    step_of = lambda scores: int(scores.header.checkpoint.partition("-")[0][4:])
    played = lambda _, scores: {"a": Value(0.2 if step_of(scores) < 12 else 0.8, 0.01, 9)}
    monkeypatch.setattr(choice, "first_metrics", played)
    files_of_run = lambda: (tmp_path / "out/run").glob("*.parquet")
    scored = lambda: sorted(int(path.name.partition("-")[0][4:]) for path in files_of_run())
    with caplog.at_level(logging.INFO):
        files = score(run, tmp_path / "out", until="resolved")
    assert scored() == [0, 4, 8, 10, 11, 12, 16] and len(files) == len(model.asked) == 7
    assert "run: 10 checkpoints not scored, where" in caplog.text
    assert model.bars[0][1] == model.bars[0][3] == 17 * 4, "what is left out is done"
    left = score_files.unscored(tmp_path / "out", "run")
    assert [row["step"] for row in left] == [step for step in range(17) if step not in (0, 4, 8, 10, 11, 12, 16)]
    assert left[0] == {"checkpoint": "step1-tokens101B", "step": 1, "tokens": 101_000_000_000, "why": left[1]["why"]}
    assert left[0]["why"] == "between two whose scores differ by no more than their errors"
    (tmp_path / "out/run/step11-tokens111B.parquet").unlink()
    assert len(score(run, tmp_path / "out", until="resolved")) == 7 and len(model.asked) == 8
    assert len(model.bars[1][4]) == 1, "what is scored is not opened again"
    assert len(score(run, tmp_path / "out")) == 17 and scored() == list(range(17))
    assert not (tmp_path / "out/run/order.json").exists() and score_files.unscored(tmp_path / "out", "run") == []
    with pytest.raises(UserError, match="--until half must be all or resolved"):
        score(run, tmp_path / "out", until="half")


def test_what_a_killed_command_and_a_part_have_not_scored_is_known(run, model, tmp_path, monkeypatch):
    out, notes = tmp_path / "out", []
    monkeypatch.setattr(score_files, "note", lambda *line: notes.append(line) if not notes else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # after the second
        score(run, out)
    assert [(row["checkpoint"], row["why"]) for row in score_files.unscored(out, "run")] == [
        (NAMES[1], "not scored yet")
    ]
    monkeypatch.undo()
    (run / NAMES[0] / "model.safetensors").write_bytes(b"x")
    with pytest.raises(series_loop.NotAllScored):
        score(run, tmp_path / "other", part="1/2")
    [row] = score_files.unscored(tmp_path / "other", "run")
    assert row["checkpoint"] == NAMES[0] and "model.safetensors" in row["why"]
    file = tmp_path / "other/run/order-1-of-2.json"
    file.write_text("[]")
    with pytest.raises(UserError, match=r"order-1-of-2\.json: damaged; remove it"):
        score_files.unscored(tmp_path / "other", "run")


def test_a_checkpoint_whose_log_likelihoods_are_no_numbers_is_kept_and_told_by_the_exit_status(
    run, model, tmp_path, caplog
):
    """Also when it was scored before: no command says that all is well."""
    model.wrong = 3
    for _ in range(2):
        with pytest.raises(
            series_loop.NotAllScored, match=f"NaN or infinite, so there are no metrics: run/{NAMES[0]};"
        ):
            score(f"{run}@{NAMES[0]}", tmp_path / "out")
        model.wrong = 0
    assert len(model.asked) == 1
    assert f"run/{NAMES[0]}: 3 log-likelihoods are no numbers; see its weights" in caplog.text
    [path] = (tmp_path / "out" / "run").iterdir()
    assert np.isfinite(score_files.read(path).loglikelihood).tolist() == [False, False, False, True]
    caplog.clear()
    score(f"{run}@{NAMES[1]}", tmp_path / "out")
    assert "no numbers" not in caplog.text
    assert score_files.usable_files(tmp_path / "out") == (
        [tmp_path / f"out/run/{NAMES[1]}.parquet"],
        [f"run/{NAMES[0]}"],
    )
    (tmp_path / f"out/run/{NAMES[1]}.parquet").unlink()
    with pytest.raises(UserError, match=f"no checkpoint has finite log-likelihoods .run/{NAMES[0]}"):
        score_files.usable_files(tmp_path / "out")


def test_tensors_of_nothing_but_zeros_are_named(run, model, tmp_path, caplog):
    with jax.set_mesh(one_device()):
        params = fresh_params(9)
        params["norm"] = params["norm"] * 0
        params["layers"]["up"] = params["layers"]["up"].at[1].set(0)
        export_hf(CONFIG, params, tmp_path / "zeros")
    score(tmp_path / "zeros", tmp_path / "out")
    assert "zeros/main: tensors of nothing but zeros: layers.up[1], norm; see its weights" in caplog.text
    caplog.clear()
    score(run, tmp_path / "other")
    assert "zeros" not in caplog.text


@pytest.mark.parametrize(
    ("wanted", "asked", "adds", "warned"),
    [
        ("auto", "never", True, ""), ("always", "auto", True, ""), ("always", "auto", False, "never"),
        ("never", "auto", False, ""), ("never", "auto", True, "always"), ("always", "always", False, ""),
        ("never", "always", False, "always"),
    ],
)  # fmt: skip
def test_a_pack_of_another_bos_policy_than_the_registered_one_is_told(wanted, asked, adds, warned, caplog):
    made = packed(bos=asked, tokenizer={"tokenizer_hash": "0", "size": 9, "adds_bos": adds})
    one = Series("s", (), Scoring(bos=wanted, notes=("Read me.",)))
    with caplog.at_level(logging.INFO):
        compatibility.log_policy(one, made)
    assert "s: Read me." in caplog.text
    assert (f"its entry wants --bos {wanted}, the pack has --bos {warned}" in caplog.text) == bool(warned)
    assert ("wants --bos" in caplog.text) == bool(warned)


def test_the_context_is_the_packs_word_and_olmes_cuts_at_the_smaller():
    contexts = {
        (mode, asked): compatibility.model_context(packed(mode=mode, max_context=asked), CONFIG)
        for mode, asked in (("lm-eval", None), ("lm-eval", 50), ("lm-eval", 500), ("olmes", 50), ("olmes", 2048))
    }
    assert list(contexts.values()) == [96, 50, 500, 50, 96]


def test_a_token_just_beyond_the_vocabulary_is_refused():
    made = packed()  # its largest token is 3
    config = dataclasses.replace(CONFIG, vocab_size=3)
    with pytest.raises(UserError, match="the pack holds token 3, the model has 3"):
        score_once(made, config, {}, one_device())
    with pytest.raises(UserError, match="--batch-tokens 0"):
        score_once(made, dataclasses.replace(CONFIG, vocab_size=4), {}, one_device(), batch_tokens=0)
    check_batch_tokens(1)


def test_a_state_space_model_has_the_plain_engine(monkeypatch):
    """A row can hold one request only. The other models have the tree, if the plain one is not asked for."""
    mamba = types.SimpleNamespace(mixer="mamba", vocab_size=512, context=8)
    assert scorer.pick_engine(mamba)[0] == "rows" and "recurrent" in scorer.pick_engine(mamba)[1]
    assert scorer.pick_engine(CONFIG) == ("tree", "")
    with pytest.raises(UserError, match="engine='tree' cannot compute this model: a recurrent layer"):
        score_once(packed(), mamba, {}, one_device(), engine="tree")  # type: ignore[arg-type]
    for name in ("row", "tree"):
        called = lambda *arguments, name=name, **options: (name, arguments[2:], options)
        monkeypatch.setattr(scorer, f"make_{name}_scorer", called)
    engines = {}
    for config, context in ((mamba, 8), (CONFIG, 96)):
        for engine in ("auto", "rows", "tree"):
            if (config, engine) != (mamba, "tree"):
                name, (given, mesh, dtype), options = scorer.make_scorer(
                    packed().request_tokens, config, one_device(), "bfloat16", engine=engine, batch_tokens=5,
                    attend="splash",
                )  # type: ignore  # fmt: skip
                assert (given, mesh, dtype) == (context, one_device(), "bfloat16")
                assert options == {"batch_tokens": 5} | ({"attend": "splash"} if name == "row" else {})
                engines[config is mamba, engine] = name
    assert engines == {(True, "auto"): "row", (True, "rows"): "row", (False, "auto"): "tree", (False, "rows"): "row",
                       (False, "tree"): "tree"}  # fmt: skip


# Parts and several series


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_over_all_parts_every_checkpoint_of_every_series_is_scored_once(run, model, tmp_path, count):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / NAMES[2])
    found = [open_series(str(folder)) for folder in (run, other)]
    files: list[set[str]] = []
    for index in range(count):
        options = ScoreOptions(part=f"{index + 1}/{count}")
        scored = series_loop.SeriesScorer(packed(), tmp_path / "out", one_device(), options)(found)
        files.append({path.relative_to(tmp_path / "out").as_posix() for path in scored})
    everyone = [f"run/{name}.parquet" for name in NAMES] + [f"other/{name}.parquet" for name in NAMES[:2]]
    assert sorted(name for part in files for name in part) == sorted(everyone) and len(model.asked) == 5
    # The second series begins one machine later, so that many short series are spread too.
    for place, (name, size) in enumerate((("run", 3), ("other", 2))):
        for number in range(size):
            assert f"{name}/{NAMES[number]}.parquet" in files[(number + place) % count]


def test_those_that_failed_in_any_series_are_named_at_the_end(run, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for place in (run / NAMES[0], other / NAMES[2]):
        (place / "model.safetensors").write_bytes(b"x")
    found = [open_series(str(folder)) for folder in (run, other)]
    with pytest.raises(series_loop.NotAllScored) as raised:
        series_loop.SeriesScorer(packed(), tmp_path / "out", one_device())(found)
    assert raised.value.exit_status == 1
    assert [one.checkpoint.name for one in raised.value.failed] == [NAMES[0], NAMES[2]]
    said = str(raised.value)
    assert said.startswith("2 checkpoints could not be opened: ")
    assert f"run/{NAMES[0]} (" in said and f"other/{NAMES[2]} (" in said
    assert len(contents(tmp_path / "out/run")) == len(contents(tmp_path / "out/other")) == 2


def test_of_many_that_failed_eight_have_their_reasons():
    made = lambda n: types.SimpleNamespace(checkpoint=Checkpoint("s", f"c{n}", n, n, Path(), "hf"), reason=f"why{n}")
    said = str(series_loop.NotAllScored([made(n) for n in range(9)]))
    assert all(f"s/c{n} (why{n})" in said for n in range(8)) and "s/c8;" in said and "why8" not in said


def test_what_a_killed_run_left_of_finished_checkpoints_is_removed(run, model, tmp_path, monkeypatch):
    discarded: list[str] = []
    monkeypatch.setattr(load, "discard", lambda checkpoint: discarded.append(checkpoint.name))
    score(f"{run}@{NAMES[1]}", tmp_path / "out")
    assert discarded == [NAMES[1]]
    score(run, tmp_path / "out")
    assert discarded == [NAMES[1], NAMES[1], NAMES[0], NAMES[2]], "first what is done, then each when it is scored"


@pytest.mark.parametrize("variables, expected", [
    ({"CLOUD_RUN_TASK_INDEX": "0", "CLOUD_RUN_TASK_COUNT": "2"}, JobShard(0, 2)),
    ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, JobShard(3, 4)),
    ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, JobShard(0, 1)),
    ({"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "2", "BATCH_TASK_INDEX": "0", "BATCH_TASK_COUNT": "9"},
     JobShard(1, 2)),
    ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, JobShard(1, 2)),
    ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"},
     JobShard(1, 2)),
])  # fmt: skip
def test_the_first_index_that_the_job_has_is_taken(variables, expected):
    assert job_shard("auto", variables) == expected == job_shard(f"auto/{expected.count}", variables)
    assert job_shard(f"{expected.index + 1}/{expected.count}", {}) == expected


@pytest.mark.parametrize("text, variables", [
    ("1/0", {}), ("0/0", {}), ("auto/0", {"JOB_COMPLETION_INDEX": "0"}), ("-1/2", {}), ("3/2", {}), ("auto/x", {}),
    ("auto", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4"}), ("auto", {"TPU_WORKER_ID": "0"}),
    ("auto", {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "2"}), ("auto", {"JOB_COMPLETION_INDEX": "one"}),
])  # fmt: skip
def test_a_part_beyond_the_last_is_refused(text, variables):
    with pytest.raises(UserError, match="--part"):
        job_shard(text, variables)


# The store


def some_scores(name: str = "c", series: str = "s") -> score_files.Scores:
    key = score_files.Key("w", "p", "float32", "auto", "e")
    header = score_files.Header(series, name, None, None, 9, key, "v", "rows", "why", "there")
    return score_files.Scores(header, np.array([-3.0000000001, -np.inf]), np.array([True, False]))


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = score_files.write(tmp_path, some_scores("a/b", "org/name"))
    assert path == tmp_path / "org__name" / "a__b.parquet"
    found = score_files.read(path)
    assert found.header == dataclasses.replace(some_scores("a/b", "org/name").header, not_finite=1)
    assert found.loglikelihood.tobytes() == some_scores().loglikelihood.tobytes() and found.is_greedy.tolist() == [
        True,
        False,
    ]
    assert (
        score_files.header_of(tmp_path, "org/name", "a/b") == found.header
        and score_files.header_of(tmp_path, "s", "c") is None
    )
    compression = pq.ParquetFile(path).metadata.row_group(0).column(1).compression
    assert compression == "ZSTD"
    (path.parent / ".a__b.parquet.1.partial").write_bytes(b"left by a killed process")
    (path.parent / ".other.parquet").write_bytes(b"of another")
    score_files.write(tmp_path, some_scores("a/b", "org/name"))
    assert sorted(one.name for one in path.parent.iterdir()) == [".other.parquet", "a__b.parquet"]
    score_files.write(tmp_path, some_scores("Z", "org/name"))
    assert [header.checkpoint for header in score_files.headers_of(tmp_path, "org/name")] == ["Z", "a/b"]
    assert score_files.headers_of(tmp_path, "nothing") == []


def test_a_file_that_holds_no_scores_is_named(tmp_path):
    path = score_files.write(tmp_path, some_scores())
    table = pq.read_table(path)
    content = path.read_bytes()
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(UserError, match=r"c\.parquet: not a score file"):
        score_files.read(path)
    pq.write_table(table.replace_schema_metadata({b"fineline": b'{"format": 3, "series": "s"}'}), path)
    with pytest.raises(UserError, match=r"damaged scores \(of its header: it has no record_sha256\)"):
        score_files.headers_of(tmp_path, "s")
    pq.write_table(table.replace_schema_metadata({b"fineline": b'{"series": "s", "key": {"weights": "w"}}'}), path)
    with pytest.raises(UserError, match=r"c\.parquet: score file of format 1, not 3; remove it and score again"):
        score_files.read(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a score file"):
        score_files.header_of(tmp_path, "s", "c")


def test_score_files_are_all_but_the_pack_and_what_is_half_written(tmp_path):
    with pytest.raises(UserError, match="no scores here"):
        score_files.score_files(tmp_path)
    pack.save(packed(), tmp_path / "pack")
    pack.save(packed(), tmp_path / ".pack.1.partial")
    for series, name in (("b", "x"), ("a", "z"), ("a", "y"), ("packs", "q")):
        score_files.write(tmp_path, some_scores(name, series))
    (tmp_path / "a" / ".y.parquet.1.partial").touch()
    (tmp_path / "a" / ".hidden.parquet").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in score_files.score_files(tmp_path)]
    assert found == ["a/y.parquet", "a/z.parquet", "b/x.parquet", "packs/q.parquet"]


def test_the_pack_beside_the_scores_is_theirs(tmp_path, monkeypatch):
    out, mine, other = tmp_path / "deep" / "out", packed(), packed(max_context=50)
    score_files.check_pack(out, mine)
    assert not (tmp_path / "deep").exists(), "a check writes nothing"
    score_files.keep_pack(out, mine)
    assert pack.load(out / "pack").manifest == mine.manifest
    score_files.keep_pack(out, other)
    assert pack.load(out / "pack").hash == other.hash, "of a run that ended before its first checkpoint"
    score_files.check_pack(out, mine)
    score_files.write(out, some_scores())
    for refuse in (score_files.keep_pack, score_files.check_pack):
        with pytest.raises(UserError, match="holds scores of another request pack"):
            refuse(out, other)
    renamed = Pack(
        mine.manifest | {"groups": [{"group": "g", "tasks": ["a"]}]}, mine.contexts, mine.requests, mine.documents
    )
    score_files.keep_pack(out, renamed)
    assert pack.load(out / "pack").manifest["groups"], "other domains for the same requests are taken over"
    before = (out / "pack/manifest.json").stat().st_ino
    score_files.keep_pack(out, renamed)
    assert (out / "pack/manifest.json").stat().st_ino == before
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match="is no writable folder"):
        score_files.check_pack(out, renamed)


def test_two_machines_may_put_the_pack_there_at_once(tmp_path, monkeypatch):
    write_files = pack.write_files

    def another_is_first(made: Pack, folder: Path) -> None:
        write_files(made, folder)
        monkeypatch.setattr(pack, "write_files", write_files)
        pack.save(packed(), tmp_path / "pack")

    monkeypatch.setattr(pack, "write_files", another_is_first)
    score_files.keep_pack(tmp_path, packed())
    assert pack.load(tmp_path / "pack").hash == packed().hash
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_lines_of_the_log_are_added(tmp_path):
    for number in range(2):
        score_files.note(tmp_path, {"checkpoint": f"Fäden{number}"})
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"checkpoint": "Fäden0"}, {"checkpoint": "Fäden1"}
    ]  # fmt: skip


# Watching, by a clock of our own


class Run:
    """A run whose checkpoints come at given seconds; scoring one takes `seconds`."""

    def __init__(self, monkeypatch, comes: dict[str, float], kept_steps: frozenset[int] | None, seconds: float = 0):
        self.now, self.comes, self.seconds = 1000.0, {name: 1000 + at for name, at in comes.items()}, seconds
        self.slept: list[float] = []
        self.part = WHOLE
        self.scored: list[list[str]] = []
        monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=self.sleep, monotonic=lambda: self.now))
        monkeypatch.setattr(watch, "_complete", self.complete)
        monkeypatch.setattr(watch, "_last_step", lambda run: kept_steps and max(kept_steps))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def complete(self, run: Path) -> Series:
        there = [name for name, at in self.comes.items() if at <= self.now]
        return Series("run", tuple(Checkpoint("run", name, None, None, run / name, "orbax") for name in there))

    def score(self, found: Sequence[Series]) -> list[Path]:
        self.now += self.seconds
        self.scored.append([checkpoint.name for checkpoint in found[0].checkpoints])
        return [Path(name) for name in self.part.of(self.scored[-1])]


def test_a_new_checkpoint_sets_the_clock_of_the_watch_back(monkeypatch, tmp_path, caplog):
    """Each comes 25 s after the one before, in a watch that ends after 30 s without one."""
    run = Run(monkeypatch, {"step0": 0, "step2": 25, "step4": 50, "step6": 75}, frozenset({0, 2, 4, 6, 8}))
    assert watch.watch_run(tmp_path, run.score, 30) == 4
    assert run.now == 1000 + 80 + 30, "seen at 80, looked at every ten seconds"
    assert set(run.slept) == {10.0} and [len(names) for names in run.scored] == [1, 2, 3, 4]
    assert "no new checkpoint for 30s; run the same command again to go on" in caplog.text


def test_the_clock_begins_when_the_scores_are_made(monkeypatch, tmp_path):
    run = Run(monkeypatch, {"step0": 0}, frozenset({0, 2}), seconds=500)
    watch.watch_run(tmp_path, run.score, 30)
    assert run.now == 1000 + 500 + 30


@pytest.mark.parametrize(("timeout", "end"), [(20, 20), (21, 30), (0, 0), (19.9, 20)])
def test_a_watch_ends_at_its_timeout(monkeypatch, tmp_path, timeout, end):
    run = Run(monkeypatch, {"step0": 0}, frozenset({0, 2}))
    watch.watch_run(tmp_path, run.score, timeout)
    assert run.now == 1000 + end


def test_a_watch_of_no_timeout_goes_on_until_all_that_the_recipe_keeps_is_scored(monkeypatch, tmp_path, caplog):
    run = Run(monkeypatch, {"step0": 0, "step1": 5, "step4": 100_000}, frozenset({0, 4}))
    run.part = JobShard(1, 2)
    assert watch.watch_run(tmp_path, run.score) == 1, "one of three is of this part"
    assert run.now == 101_000 and "no new checkpoint" not in caplog.text
    run = Run(monkeypatch, {"step0": 0, "step4": 0}, None)
    watch.watch_run(tmp_path, run.score, 50)
    assert run.now == 1050, "without a recipe nothing says which is the last"


def test_what_could_not_be_opened_is_tried_again_with_each_new_one(monkeypatch, tmp_path):
    run = Run(monkeypatch, {"step0": 0, "step2": 30}, frozenset({0, 2}))
    failed = types.SimpleNamespace(checkpoint=Checkpoint("run", "step0", 0, 0, tmp_path, "orbax"), reason="damaged")

    def score(found: Sequence[Series]) -> list[Path]:
        run.score(found)
        if len(run.scored) == 1 or always:
            raise series_loop.NotAllScored([failed])  # type: ignore[list-item]
        return [Path("a"), Path("b")]

    always = False
    assert watch.watch_run(tmp_path, score) == 2 and len(run.scored) == 2
    run.now, always = 1000, True
    with pytest.raises(series_loop.NotAllScored, match="run/step0"):
        watch.watch_run(tmp_path, score)


@pytest.mark.parametrize(
    ("comes", "timeout", "end"), [(35, None, 40), (35, 40, 40), (35, 35, 40), (35, 30, None), (0, 0, 0)]
)
def test_the_first_checkpoint_is_waited_for(monkeypatch, tmp_path, comes, timeout, end, caplog):
    run = Run(monkeypatch, {"step0": comes}, None)
    if end is None:
        with pytest.raises(UserError, match=f"no kept checkpoint after {timeout}s; is the run training"):
            watch.wait_for_first(tmp_path, timeout)
        assert run.now == 1000 + 10 * -(-timeout // 10)
    else:
        with caplog.at_level(logging.INFO):
            watch.wait_for_first(tmp_path, timeout)
        assert run.now == 1000 + end and caplog.text.count("waiting for the first kept checkpoint") == (comes > 0)


# In memory, while a run trains


def test_a_kept_checkpoint_is_scored_in_the_dtype_asked_and_its_file_is_that_of_the_series(tmp_path, monkeypatch):
    """Written when the checkpoint, which is being saved meanwhile, is complete; not where it is scored already."""
    played, made = Model(), packed(max_context=50)
    monkeypatch.setattr(in_training, "make_scorer", played.make_scorer)
    clock = iter([10, 12.25, 10, 12.25, 20, 21, 20, 21])
    monkeypatch.setattr(in_training, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    checkpoint = Checkpoint("run", "step4", 4, 400, tmp_path / "run/checkpoints/4", "orbax")
    opened: list[str] = []

    def open_one(spec: str) -> Series:
        opened.append(spec)
        if not there:
            raise UserError("being written")
        return Series("run", (checkpoint,), location="here")

    there = False
    for name, value in (("open_series", open_one), ("weights_hash", lambda _: "w"), ("stat_signature", lambda _: "v")):
        monkeypatch.setattr(in_training, name, value)
    monkeypatch.setattr(load, "stat_signature", lambda _: "v")
    params = {"embed": jax.device_put(np.ones((4, 2), np.float32), jax.NamedSharding(one_device(), jax.P(None, None)))}
    for number, dtype in enumerate(("float32", "bfloat16")):
        out, there = tmp_path / dtype, False
        score = in_training.ScoreInTraining(tmp_path / "run", CONFIG, made, out, dtype)

        def wait(out: Path = out) -> None:
            nonlocal there
            assert not out.exists(), "nothing is written before the checkpoint is complete"
            checkpoint.location.mkdir(parents=True, exist_ok=True)
            there = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: 1)
            score(4, params, wait)
        assert there and not out.exists(), "the first process writes"
        there = False
        score(4, params, wait)
        told = played.asked[-1]
        assert (told["dtype"], told["stored"], told["mesh"], told["config"]) == (dtype, dtype, one_device(), CONFIG)
        found = score_files.read(out / "run/step4.parquet")
        key = score_files.Key("w", made.hash, dtype, "auto", scorer.ENGINE_VERSION)
        assert found.header == score_files.Header("run", "step4", 4, 400, 50, key, "v", "tree", "", "here")
        expected = played.score(made, CONFIG, params)[0]
        assert found.loglikelihood.tobytes() == expected.tobytes()
        [line] = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert line == {"series": "run", "checkpoint": "step4", "requests": 4, "model_seconds": (2.25, 1.0)[number]}
        assert pack.load(out / "pack").hash == made.hash
        score(4, params, lambda: pytest.fail("it is scored"))
        other = packed(max_context=50, bos="never")
        assert not in_training.ScoreInTraining(tmp_path / "run", CONFIG, other, out, dtype)._is_scored(4)
    assert set(opened) == {str(tmp_path / "run/checkpoints/4")}


def test_scoring_while_training_takes_a_pack_or_a_suite_with_the_runs_tokenizer(tmp_path, monkeypatch):
    from fineline_jax.scoring.requests import build

    pack.save(packed(), tmp_path / "p")
    assert in_training.open_pack(str(tmp_path / "p"), tmp_path / "none", None).hash == packed().hash
    with pytest.raises(UserError, match=r"--score piqa: .*none is not there; give a pack"):
        in_training.open_pack("piqa", tmp_path / "none", None)
    monkeypatch.setattr(build, "build", lambda *arguments, **options: (arguments, options))
    assert in_training.open_pack("piqa", tmp_path, tmp_path / "b") == (
        ("piqa", tmp_path, PackOptions(benchmarks=tmp_path / "b")),
        {},
    )


def test_what_the_first_process_refuses_is_refused_by_all(monkeypatch):
    calls: list[int] = []

    def refuse() -> None:
        calls.append(1)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        check_on_process_0(refuse)
    check_on_process_0(lambda: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost, "broadcast_from_process_0", lambda value: said)
    said = ""
    check_on_process_0(refuse)
    assert len(calls) == 1, "the others need not see what it sees"
    said = "the first one's"
    with pytest.raises(UserError, match="the first one's"):
        check_on_process_0(lambda: None)


def test_a_process_that_is_not_the_first_computes_and_writes_nothing(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    score(run, tmp_path / "out")
    assert len(model.asked) == 3 and model.bars == [] and not (tmp_path / "out").exists()


def test_a_series_that_has_moved_is_known_by_the_first_of_its_checkpoints_that_is_whole(run, model, tmp_path):
    score(run, tmp_path / "out")
    moved = tmp_path / "moved" / "run"
    shutil.copytree(run, moved)
    (moved / NAMES[0] / "model.safetensors").unlink()
    (moved / NAMES[0] / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(series_loop.NotAllScored, match=f"run/{NAMES[0]} "):
        score(moved, tmp_path / "out")
    shutil.copytree(run / NAMES[1], moved / NAMES[0], dirs_exist_ok=True)
    (moved / NAMES[0] / "pytorch_model.bin.index.json").unlink()
    headers = score_files.headers_of(tmp_path / "out", "run")
    for name, header in zip(NAMES, headers, strict=True):  # as scores of another place would have it
        found = score_files.read(score_files.path_of(tmp_path / "out", "run", name))
        there = dataclasses.replace(header, location="elsewhere")
        score_files.write(tmp_path / "out", dataclasses.replace(found, header=there))
    with pytest.raises(UserError, match="holds the scores of elsewhere, and "):
        score(moved, tmp_path / "out")
    assert len(model.asked) == 3


def test_a_remote_checkpoint_is_told_apart_by_its_address(tmp_path):
    """Of one name at two addresses; and one that is here from one that is not."""
    made = lambda url: Checkpoint("s", "a", None, None, tmp_path, "hf", Remote(url, tmp_path))
    here = dataclasses.replace(made("hf://o/n@a"), remote=None)
    score_files.check_unique_names([Series("s", (made("hf://o/n@a"),)), Series("s", (made("hf://o/n@a"),))])
    for other in (made("hf://o/m@a"), here):
        with pytest.raises(UserError, match="are both called s/a, and their scores would be one file"):
            score_files.check_unique_names([Series("s", (made("hf://o/n@a"),)), Series("s", (other,))])
