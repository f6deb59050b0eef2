"""`fineline score` from the command line to the numbers in its files; every option changes what it says it changes."""

import contextlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from float64_llama import logits_of
from played_model import Model
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import CONFIG, make_series, one_device

from fineline_jax import prepare_pack, progress
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.open import open_series
from fineline_jax.cli import main
from fineline_jax.commands import score as command
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.job_shard import JobShard
from fineline_jax.scoring.metrics import latest
from fineline_jax.scoring.options import PackOptions
from fineline_jax.scoring.requests import build, pack
from fineline_jax.scoring.series import auto_mesh, score_series, watch
from fineline_jax.scoring.series.score_series import SeriesScorer

STEPS = (1, 2, 3, 4)
ENTRY = """
name: mine
location: file://{folder}/{{name}}
names: "step{{1..4}}"
pattern: step{{step}}
tokens: step * 1_000_000_000
scoring: {{bos: {bos}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """run/step1 to 4 with a tokenizer that adds no BOS, documents, and two registry entries of one's own."""
    folder = tmp_path_factory.mktemp("command")
    write_tokenizer(folder / "tokenizer", adds_bos=False)
    make_series(folder / "run", folder / "tokenizer", STEPS)
    write_benchmarks(folder / "benchmarks", documents=4)
    for bos in ("always", "never"):
        (folder / f"{bos}.yaml").write_text(ENTRY.format(folder=folder / "run", bos=bos))
    return folder


def run_command(place: Path, spec: str, out: Path, *options: str, suite: str = "piqa") -> int:
    requests = [] if "--pack" in options else ["--suite", suite, "--benchmarks", str(place / "benchmarks")]
    return main(["score", spec, *requests, "--out", str(out), "--downloads", str(out.parent / "downloads"), *options])


def scored(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: score_files.read(path).loglikelihood for path in score_files.score_files(out)}


ONE = ("--mesh.replica", "1", "--mesh.fsdp", "1")


@pytest.mark.parametrize("given, begins", [((), True), (("--bos", "never"), False), (("--bos", "auto"), False)])
def test_the_registered_bos_policy_shows_in_the_log_likelihoods(place, tmp_path, given, begins):
    """The tokenizer adds none by itself; the entry says always, and --bos goes before it. By a float64 Llama."""
    assert run_command(place, f"{place / 'always.yaml'}@step2", tmp_path / "out", *given, *ONE, "--limit", "2") == 0
    made = pack.load(tmp_path / "out/pack")
    assert made.manifest["bos"] == (given[1] if given else "always")
    [checkpoint] = open_series(str(place / "run@step2")).checkpoints
    params = load.load(checkpoint, one_device())[1]
    found = score_files.read(tmp_path / "out/mine/step2.parquet")
    assert (found.header.step, found.header.tokens, found.header.location) == (
        2,
        2 * 10**9,
        f"file://{place}/run/{{name}}",
    )
    assert made.requests.num_rows == 4
    for request in range(4):
        context = made.context_tokens[made.request_context[request]].tolist()
        assert (context[0] == 0) == begins and 0 not in context[1:]
        asked = made.continuation_tokens[request].tolist()
        tokens = (context + asked)[-(CONFIG.context + 1) :]
        logp = scipy.special.log_softmax(logits_of(params, tokens[:-1], CONFIG)[-len(asked) :], axis=1)
        assert found.loglikelihood[request] == pytest.approx(logp[np.arange(len(asked)), asked].sum(), abs=2e-4)
        assert found.is_greedy[request] == (logp.argmax(axis=1) == asked).all()


@pytest.fixture
def model(monkeypatch) -> Model:
    """The model is played, see test_loop."""
    played = Model()
    monkeypatch.setattr(score_series, "make_scorer", played.make_scorer)
    monkeypatch.setattr(progress, "bar", played.bar)
    return played


def test_without_an_option_everything_is_scored_in_float32(place, model, tmp_path, monkeypatch, capsys):
    assert run_command(place, str(place / "run"), tmp_path / "out") == 0
    told = {"dtype": "float32", "stored": "float32", "batch_tokens": None, "config": CONFIG}
    assert [{name: one[name] for name in told} for one in model.asked] == [told] * 4
    assert {one["mesh"].devices.shape for one in model.asked} == {(8, 1, 1)}, "a whole copy on each device"
    made = pack.load(tmp_path / "out/pack")
    assert (made.manifest["bos"], made.manifest["mode"], made.manifest["max_context"]) == ("auto", "lm-eval", None)
    assert made.requests.num_rows == 8 and list(scored(tmp_path / "out")) == [f"step{step}" for step in STEPS]
    ll = scored(tmp_path / "out")["step4"]
    texts = [row["text"].strip() for row in made.requests.to_pylist()]
    per_letter = [value / len(text) for value, text in zip(ll, texts, strict=True)]
    documents = [(row["first_request"], row["gold"]) for row in made.documents.to_pylist()]
    right = [int(np.argmax(per_letter[first : first + 2])) in gold for first, gold in documents]
    assert sum(right) == 1, "of 4, whose standard error is sqrt(1/4 * 3/4 / (4 - 1)) = 1/4"
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table] == [
        ["run", "metric", "n", "step4", "change"],
        ["piqa", "acc_norm", "4", "0.2500", "±0.2500", "+0.0000", "±0.0000"],
    ], "of step3 the same documents are right: the played log-likelihoods are multiples of each other"
    assert last == f"{tmp_path / 'out'}: 4 checkpoints scored; see `fineline analyze {tmp_path / 'out'}`"
    single = tmp_path / "model"
    shutil.copytree(place / "run/step1", single)
    assert run_command(place, str(single), tmp_path / "single") == 0
    assert capsys.readouterr().out.endswith(
        f"1 checkpoint scored; see `fineline export-scores {tmp_path / 'single'}`\n"
    ), "without a place in the training there is no curve"
    shutil.copytree(place / "run/step1", tmp_path / "imported/step0")
    assert run_command(place, str(tmp_path / "imported"), tmp_path / "zero") == 0
    assert "; see `fineline export-scores" in capsys.readouterr().out, "step 0 without tokens is none either"
    requests = ("--pack", str(tmp_path / "single/pack"), "--out", str(tmp_path / "both"))
    asked, original = [], auto_mesh.scoring_mesh
    monkeypatch.setattr(
        auto_mesh, "scoring_mesh", lambda mesh, opened, dtype: asked.append(opened) or original(mesh, opened, dtype)
    )
    assert main(["score", str(single), str(place / "run@step1"), *requests]) == 0
    assert [[one.name for one in opened] for opened in asked] == [["model", "run"]], "the largest decides"
    assert f"see `fineline analyze {tmp_path / 'both'}`" in capsys.readouterr().out, "of one of the two there is"


def test_options_of_the_pack_reach_it(place, model, tmp_path):
    other = write_tokenizer(tmp_path / "other", adds_bos=True)
    options = ["--limit", "1", "--max-context", "30", "--mode", "olmes", "--bos", "never", "--tokenizer", str(other)]
    bare = tmp_path / "bare"  # without a tokenizer of its own
    for step in (1, 2):
        shutil.copytree(
            place / f"run/step{step}", bare / f"step{step}", ignore=shutil.ignore_patterns("tokenizer*", "special*")
        )
    assert run_command(place, str(bare), tmp_path / "out", *options) == 0
    manifest = pack.load(tmp_path / "out/pack").manifest
    assert (manifest["limit"], manifest["max_context"], manifest["mode"], manifest["bos"]) == (1, 30, "olmes", "never")
    assert manifest["tokenizer"]["adds_bos"] is True and model.bars[0][1] == 2 * manifest["counts"]["requests"]
    assert score_files.read_header(tmp_path / "out/bare/step1.parquet").context == 30
    assert run_command(place, str(bare), tmp_path / "none") == 2, "none is beside the checkpoints"


def test_tokenizers_that_differ_in_bos_alone_are_the_same_where_the_policy_says_it(place, model, tmp_path, capsys):
    other = ("--tokenizer", str(write_tokenizer(tmp_path / "other", adds_bos=True)))
    run = str(place / "run@step1")
    assert run_command(place, run, tmp_path / "auto", *other) == 2
    assert "does not add BOS by default, that of the pack does" in capsys.readouterr().err
    for bos in ("never", "always"):
        assert run_command(place, run, tmp_path / bos, *other, "--bos", bos) == 0


def test_every_option_of_a_suite_reaches_its_pack(place, tmp_path, monkeypatch):
    asked: list[tuple] = []

    def built(*arguments, **options):
        asked.append((arguments, options))
        raise UserError("enough")

    monkeypatch.setattr(build, "build", built)
    options = {
        "benchmarks": Path("b"),
        "tfds": Path("t"),
        "bos": "never",
        "max_context": 7,
        "limit": 3,
        "mode": "olmes",
    }
    for name in (None, *options):
        given = {name: options[name]} if name else {}
        words = [f"--{name.replace('_', '-')}", str(options[name])] if name else []
        assert main(["score", str(place / "run"), "--suite", "piqa", "--out", str(tmp_path / "o"), *words]) == 2
        wanted = PackOptions(**{"bos": "auto"} | given)
        assert asked.pop() == (("piqa", place / "run/step1", wanted), {})


def test_a_pack_is_taken_as_it_is_and_refuses_what_would_change_it(place, model, tmp_path, capsys):
    tokenizer, benchmarks = place / "tokenizer", place / "benchmarks"
    made = prepare_pack("piqa", tokenizer, tmp_path / "p", benchmarks=benchmarks, limit=3, bos="always")
    given = ["--pack", str(tmp_path / "p")]
    assert run_command(place, str(place / "run@step3"), tmp_path / "out", *given) == 0
    assert pack.load(tmp_path / "out/pack").manifest == made.manifest
    [header] = score_files.headers_of(tmp_path / "out", "run")
    assert header.key.pack_hash == made.hash and header.key.bos == "always"
    for option in (
        ["--benchmarks", "x"], ["--tfds", "x"], ["--tokenizer", "x"], ["--bos", "auto"], ["--mode", "olmes"],
        ["--max-context", "9"], ["--limit", "1"],
    ):  # fmt: skip
        capsys.readouterr()
        assert run_command(place, str(place / "run"), tmp_path / "refused", *given, *option) == 2
        assert f"score: {option[0]} went into --pack when it was prepared" in capsys.readouterr().err
    assert main(["score", str(place / "run"), *given, "--suite", "piqa", "--out", str(tmp_path / "refused")]) == 2
    assert main(["score", str(place / "run"), "--out", str(tmp_path / "refused")]) == 2
    assert main(["score", "--suite", "piqa", "--out", str(tmp_path / "refused")]) == 2
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), [1, 2, 3, 4]), (("--every", "2"), [1, 3]), (("--tokens", "2B:3B:1B"), [2, 3]), (("--tokens", "4B"), [4]),
        (("--tokens", "2B:", "--every", "2"), [2, 4]), (("--part", "2/3"), [2]), (("--part", "1/3"), [1, 4]),
        (("--part", "auto"), [3]),
    ],
)  # fmt: skip
def test_selections_and_parts_choose_what_is_scored(place, model, tmp_path, monkeypatch, options, steps):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setenv("JOB_COMPLETIONS", "4")
    assert run_command(place, str(place / "always.yaml"), tmp_path / "out", *options) == 0
    assert list(scored(tmp_path / "out")) == [f"step{step}" for step in steps] and len(model.asked) == len(steps)


@pytest.mark.parametrize("keep, left", [((), 2), (("--keep-downloads", "yes"), 2), (("--keep-downloads", "no"), 0)])
def test_downloads_stay_where_they_are_asked_to(place, model, tmp_path, keep, left):
    assert run_command(place, f"{place / 'always.yaml'}@step[12]", tmp_path / "out", *keep) == 0
    assert len(list((tmp_path / "downloads").glob("*/model.safetensors"))) == left
    assert {one["mesh"].devices.shape for one in model.asked} == {(8, 1, 1)}, (
        "config.json, fetched alone, says their size"
    )


def test_options_of_the_computation_reach_the_model(place, model, tmp_path):
    options = (
        "--dtype",
        "bfloat16",
        "--batch-tokens",
        "99",
        "--mesh.replica",
        "2",
        "--mesh.fsdp",
        "2",
        "--mesh.tensor",
        "2",
    )
    assert run_command(place, str(place / "run@step1"), tmp_path / "out", *options) == 0
    [told] = model.asked
    assert (told["dtype"], told["stored"], told["batch_tokens"]) == ("bfloat16", "bfloat16", 99)
    assert told["mesh"].devices.shape == (2, 2, 2)
    assert score_files.headers_of(tmp_path / "out", "run")[0].key.dtype == "bfloat16"


def test_series_that_want_different_policies_are_refused_unless_one_is_given(place, model, tmp_path, capsys):
    both = [
        "score",
        str(place / "always.yaml"),
        str(place / "never.yaml"),
        "--suite",
        "piqa",
        "--out",
        str(tmp_path / "o"),
    ]
    both += ["--benchmarks", str(place / "benchmarks"), "--downloads", str(tmp_path / "d")]
    assert main(both) == 2
    assert "the series want different ones" in capsys.readouterr().err
    assert main([*both, "--bos", "never"]) == 0
    assert pack.load(tmp_path / "o/pack").manifest["bos"] == "never" and len(model.asked) == 4, "they are one series"


def test_a_watch_has_its_timeout_and_part_and_takes_one_run_alone(place, tmp_path, monkeypatch, capsys):
    asked: list[tuple] = []
    monkeypatch.setattr(watch, "wait_for_first", lambda *arguments: asked.append(arguments))

    def watch_run(run: Path, score: SeriesScorer, timeout: float | None) -> int:
        asked.append((run, score.options.shard(), timeout))
        return 7

    monkeypatch.setattr(watch, "watch_run", watch_run)
    monkeypatch.setattr(latest, "of_scores", lambda *_, **__: "the table")
    run = place / "run"
    assert run_command(place, str(run), tmp_path / "o", "--watch", "--watch-timeout", "12.5", "--part", "2/3") == 0
    assert run_command(place, str(run), tmp_path / "o", "--watch", "--watch-timeout", "0") == 0
    assert run_command(place, str(run), tmp_path / "o", "--watch") == 0
    assert asked == [
        (run, 12.5),
        (run, JobShard(1, 3), 12.5),
        (run, 0.0),
        (run, JobShard(0, 1), 0.0),
        (run, None),
        (run, JobShard(0, 1), None),
    ]
    assert capsys.readouterr().out.count(": 7 checkpoints scored; ") == 3
    for wrong in (["--watch", "--tokens", "1B"], ["--watch", "--every", "2"], ["--watch-timeout", "-1"],
                  ["--watch-timeout", "nan"], ["--watch", str(run)]):  # fmt: skip
        assert run_command(place, str(run), tmp_path / "refused", *wrong) == 2, wrong
    assert len(asked) == 6 and not (tmp_path / "refused").exists()


def test_processes_meet_only_where_they_are_asked_to_and_share_the_parts_of_an_array(
    place, model, tmp_path, monkeypatch
):
    met: list[int] = []

    @contextlib.contextmanager
    def joined(distributed: bool, how: object):
        met.extend([1] * distributed)
        yield

    monkeypatch.setattr(command, "joined", joined)
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    run = str(place / "run")
    assert run_command(place, run, tmp_path / "out", "--part", "auto") == 0
    assert met == [] and list(scored(tmp_path / "out")) == ["step2", "step4"]
    assert run_command(place, run, tmp_path / "out", "--distributed", "--part", "auto") == 2, (
        "workers are no parts then"
    )
    assert run_command(place, run, tmp_path / "out", "--distributed") == 0
    assert met == [1, 1] and len(scored(tmp_path / "out")) == 4


def test_lm_evals_own_command_gets_its_arguments(monkeypatch):
    import sys

    import lm_eval.__main__

    seen: list[list[str]] = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append(list(sys.argv)))
    before = list(sys.argv)
    assert main(["lm-eval", "--model", "fineline", "--tasks", "x"]) == 0
    assert seen == [["lm-eval", "--model", "fineline", "--tasks", "x"]] and sys.argv == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--tasks", "no_such_task"], "Tasks not found: no_such_task; see `fineline lm-eval ls tasks`"),
        pytest.param(
            [],
            "No tasks specified, or no tasks found. Please verify the task names; see `fineline lm-eval ls tasks`",
            marks=pytest.mark.slow,
        ),
        (["--config", "nothing.yaml"], "Config file not found: .*nothing.yaml; see `fineline lm-eval -h`"),
    ],
)
def test_errors_of_lm_evals_options_are_one_line_and_its_bugs_are_not_hidden(options, line, monkeypatch, capsys):
    import lm_eval.__main__

    monkeypatch.setattr(lm_eval.__main__, "setup_logging", lambda: None)
    assert main(["lm-eval", "--model", "dummy", *options]) == 2
    assert re.fullmatch(f"fineline: lm-eval: {line}", capsys.readouterr().err.splitlines()[-1])

    def fail() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["lm-eval", "--model", "dummy", *options])
