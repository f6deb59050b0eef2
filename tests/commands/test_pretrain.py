"""`fineline pretrain RECIPE`: every field is an option, and what the command hands to training and says afterwards."""

import contextlib
import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest

from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.runs import store
from fineline_jax.cli import main
from fineline_jax.commands import pretrain
from fineline_jax.commands.processes import Processes
from fineline_jax.errors import UserError
from fineline_jax.recipe import Data, Recipe, Source, to_json
from fineline_jax.training import loop

# A value of each kind of field, all of them allowed together.
GIVEN = {
    "name": "other", "model.vocab_size": 4096, "model.width": 256, "model.layers": 3, "model.heads": 4,
    "model.mlp_width": 500, "model.kv_heads": 2, "model.head_dim": 32, "model.context": 1024,
    "model.rope_theta": 5e5, "model.norm_eps": 1e-5, "model.tied_embeddings": True, "model.qk_norm": True,
    "model.norm": "layer", "model.rotary_fraction": 0.5, "model.mlp": "gelu",
    "data.sources.0.path": "elsewhere", "data.sources.0.weight": 2.5, "data.sequence_length": 512,
    "data.order": "chunks", "data.mask_documents_at": 2, "batch.sequences": 24, "batch.accumulation": 3,
    "batch.learning_rate_rule": "linear",
    "optimizer.schedule.peak": 5e-4, "optimizer.schedule.final": 1e-6, "optimizer.schedule.warmup_tokens": 7,
    "optimizer.schedule.kind": "wsd", "optimizer.schedule.decay_tokens": 11, "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99, "optimizer.eps": 1e-9, "optimizer.weight_decay": 0.3, "optimizer.decay": "matrices",
    "optimizer.clip_norm": 2.0, "optimizer.skip_nonfinite": True, "optimizer.skip_spike_sigmas": 6.0,
    "tokens": 10**6, "checkpoints.initial": False, "checkpoints.latest_every_tokens": 13, "loss.ignore_token": 1,
    "loss.z_loss": 1e-4, "loss.chunk_tokens": 77, "mesh.replica": 2, "mesh.fsdp": 3, "mesh.tensor": 1,
    "compute.dtype": "float32", "compute.attention": "xla", "compute.remat": "offload",
    "compute.scan_layers": False, "logging.every_steps": 9, "logging.tensorboard": False,
    "logging.wandb_project": "p", "logging.profile_start_step": 5, "logging.profile_steps": 4,
    "logging.validation.0.name": "held", "logging.validation.0.split": "test", "logging.validation.0.windows": 33,
    "logging.validation.0.path": "other", "logging.peak_tflops": 1.5, "seed": 8,
}  # fmt: skip


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, tuple | list) and any(isinstance(part, dict) for part in value):
        return flat(dict(enumerate(value)), prefix)
    return {prefix[:-1]: value}


def option(name: str, value: Any) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{head}.no-{last}"]
    return [f"--{name}", str(value)]


@pytest.fixture
def trained(monkeypatch) -> list[tuple]:
    """What training would be called with."""
    calls: list[tuple] = []
    monkeypatch.setattr(pretrain, "_train", lambda *given, **options: calls.append((*given, options)) or 0)

    @contextlib.contextmanager
    def joined(distributed: bool, how: Processes):
        calls.extend([("joined", how)] if distributed else [])
        yield

    monkeypatch.setattr(pretrain, "joined", joined)
    return calls


def test_every_kind_of_field_is_an_option_and_changes_nothing_else(trained):
    default = load_recipe("llama_60m")
    arguments = [word for name, value in GIVEN.items() for word in option(name, value)]
    assert main(["pretrain", "llama_60m", *arguments]) == 0
    [(recipe, run, options)] = trained
    assert flat(dataclasses.asdict(recipe)) == flat(dataclasses.asdict(default)) | GIVEN
    assert (run, options) == (Path("runs/other"), USUAL)


USUAL = {
    "accept_changes": False, "branch": None, "optimizer_state": "kept", "until": None, "skip_windows": None,
    "score": None, "benchmarks": None, "include_path": None, "stuck_after": 0.0,
}  # fmt: skip


def test_without_options_the_recipe_is_the_one_named_and_its_own_options_are_not_the_recipes(trained, tmp_path):
    assert main(["pretrain", "demo"]) == 0
    more = ["--run", str(tmp_path), "--accept-changes", "--score", "s", "--benchmarks", "b"]
    more += ["--distributed", "--coordinator", "a:1", "--processes", "2", "--process", "1"]
    assert main(["pretrain", "demo", *more]) == 0
    demo = load_recipe("demo")
    more = ["--from", "runs/a@7", "--optimizer-state", "fresh", "--until", "900", "--skip-windows", "3:5"]
    assert main(["pretrain", "demo", *more, "--run", "b"]) == 0
    (tmp_path / "recipe.json").write_text(to_json(demo))
    assert main(["pretrain", str(tmp_path)]) == 0
    assert main(["pretrain", str(tmp_path), "--run", "c"]) == 0
    scored = {"accept_changes": True, "score": "s", "benchmarks": Path("b")}
    branch = {"branch": "runs/a@7", "optimizer_state": "fresh", "until": 900, "skip_windows": (3, 5)}
    assert trained == [
        (demo, Path("runs/demo"), USUAL),
        ("joined", Processes("a:1", 2, 1)),
        (demo, tmp_path, USUAL | scored),
        (demo, Path("b"), USUAL | branch),
        (demo, tmp_path, USUAL),
        (demo, Path("c"), USUAL),
    ]
    for windows in ("3", "5:3", "a:b", "3:3"):
        assert main(["pretrain", "demo", "--skip-windows", windows]) == 2


def test_a_branch_needs_a_folder_of_its_own_and_a_checkpoint(tmp_path, capsys):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    for place, run, said in (
        ("a@7", [], "name its folder with --run"),
        ("a", ["--run", "b"], "give RUN@STEP"),
        (f"{tmp_path}/b@7", ["--run", "b"], "b is no folder of a run"),
    ):
        assert main(["pretrain", "demo", "--from", place, *run]) == 2 and said in capsys.readouterr().err


def test_help_without_a_recipe_names_the_recipes_and_lists_the_fields(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "amber_7b, demo, llama_1b, llama_350m, llama_60m, open_llama_13b" in said
    assert "values of llama_60m" in said and "--optimizer.schedule.peak" in said and "(default: 0.001)" in said
    assert main(["pretrain", "--seed", "3"]) == 2
    assert "name a recipe first" in capsys.readouterr().err


# ---- what is done with it


@pytest.fixture
def looped(monkeypatch) -> dict[str, Any]:
    """Training is not done: what it was called with, and what it shall return."""
    seen: dict[str, Any] = {"outcome": loop.Outcome(Path("r"), 7, 12_345_678, None)}

    def train(recipe: Recipe, run: Path, **options: Any) -> loop.Outcome:
        seen.update(recipe=recipe, run=run, **options)
        return seen["outcome"]

    monkeypatch.setattr(loop, "pretrain", train)
    monkeypatch.setattr(store, "steps", lambda folder: [0, 3, 7] if folder == Path("r/checkpoints") else [])
    return seen


def test_a_run_that_is_complete_says_where_and_how_many_checkpoints_it_keeps(looped, tmp_path, capsys):
    assert main(["pretrain", "demo", "--run", str(tmp_path / "r"), "--accept-changes"]) == 0
    # What is in its folder counts, not what the recipe says.
    assert capsys.readouterr().out == f"{tmp_path / 'r'}: complete at step 7 (12.3M tokens), 3 checkpoints kept\n"
    assert (looped["run"], looped["accept_changes"], looped["observers"]) == (tmp_path / "r", True, [])
    assert looped["recipe"] == load_recipe("demo")


def test_a_run_that_was_stopped_says_how_to_go_on_and_is_no_failure(looped, capsys):
    looped["outcome"] = loop.Outcome(Path("r"), 7, 999, "SIGTERM")
    assert main(["pretrain", "demo"]) == 0
    assert capsys.readouterr().out == (
        "stopped by SIGTERM at step 7 (999 tokens), saved; run the same command again to go on\n"
    )
    assert looped["accept_changes"] is False
    looped["outcome"] = loop.Outcome(Path("r"), 7, 999, "--until")
    assert main(["pretrain", "demo"]) == 0
    assert capsys.readouterr().out.endswith("saved; run the command without it to go on\n")


def test_only_the_first_process_speaks(looped, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert main(["pretrain", "demo"]) == 0 and capsys.readouterr().out == ""


def test_processes_meet_before_training_and_only_where_asked(looped, monkeypatch, capsys):
    met: list[bool] = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: met.append("recipe" not in looped))
    assert main(["pretrain", "demo"]) == 0 and met == []
    looped.pop("recipe")
    assert main(["pretrain", "demo", "--distributed"]) == 0 and met == [True]
    looped.pop("recipe")

    def alone(*_: object, **__: object) -> None:
        raise ValueError("coordinator_address\nshould be  defined. " + "x" * 300)

    monkeypatch.setattr("jax.distributed.initialize", alone)
    assert main(["pretrain", "demo", "--distributed"]) == 2 and "recipe" not in looped
    said = capsys.readouterr().err
    assert "(coordinator_address should be defined. xxx" in said and "x" * 161 in said and "x" * 162 not in said


def test_scoring_while_training_is_checked_before_the_first_step(looped, monkeypatch, tmp_path, capsys):
    """The pack is opened with the tokenizer of the first data source, and scores go into RUN/scores."""
    from fineline_jax.scoring.series import in_training

    calls: list[tuple] = []
    made = types.SimpleNamespace(name="pack")
    monkeypatch.setattr(in_training, "open_pack", lambda *given: calls.append(("open", *given)) or made)
    monkeypatch.setattr(in_training, "ScoreInTraining", lambda *given: ("hook", *given))
    monkeypatch.setattr(in_training, "check_tokenizer_folder", lambda *given: calls.append(("tokenizer", *given)))
    monkeypatch.setattr(in_training, "check_vocabulary", lambda *given: calls.append(("vocabulary", *given)))
    data, run = tmp_path / "data", tmp_path / "run"
    demo = load_recipe("demo")
    sources = (Source(str(data)), Source(str(tmp_path / "more")))
    (tmp_path / "two.json").write_text(to_json(dataclasses.replace(demo, data=Data(sources, 128))))
    arguments = ["pretrain", str(tmp_path / "two.json"), "--run", str(run), "--score", "core"]
    assert main([*arguments, "--benchmarks", str(tmp_path / "b")]) == 0
    model = demo.model
    assert calls == [("open", "core", data / "tokenizer", tmp_path / "b"), ("vocabulary", made, model, "recipe demo")]
    [observer] = looped["observers"]
    assert observer.function == ("hook", run, model, made, run / "scores")
    (data / "tokenizer").mkdir(parents=True)
    assert main(arguments) == 0
    assert calls[2:4] == [
        ("open", "core", data / "tokenizer", None),
        ("tokenizer", made, data / "tokenizer", str(data)),
    ]

    def refuse(*given: object) -> None:
        raise UserError("too many ids")

    monkeypatch.setattr(in_training, "check_vocabulary", refuse)
    looped.pop("recipe")
    assert main(arguments) == 2 and "recipe" not in looped
    assert main(["pretrain", "demo", "--benchmarks", "b"]) == 2
    assert "give both, or neither" in capsys.readouterr().err
