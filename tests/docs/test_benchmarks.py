"""The programs of benchmarks/: they run to their end, and what they print is what they measured."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from docs_pages import CHECKOUT
from series_examples import one_device

from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.requests.suite import open_suite


@pytest.fixture
def benchmark(monkeypatch):
    """A program of benchmarks/ as a module, called with these arguments."""

    def loaded(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.syspath_prepend(str(CHECKOUT / "benchmarks"))
        return importlib.import_module(name)

    return loaded


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_save_is_compared_with_a_step(benchmark, monkeypatch, capsys) -> None:
    program = benchmark("checkpoint_save", "--saves", "3", "--sequences", "8", "--length", "16")
    model = ModelConfig(vocab_size=32_000, width=64, layers=1, heads=2, mlp_width=32)  # 49 MB
    named, load = [], program.load_recipe
    monkeypatch.setattr(
        program, "load_recipe", lambda name: named.append(name) or dataclasses.replace(load(name), model=model)
    )
    monkeypatch.setattr(program, "make_mesh", one_device)
    # What is timed is not what is tested: no step need be compiled.
    monkeypatch.setattr(program, "make_train_step", lambda *_: lambda state, *_: (state, {}))
    with jax.set_mesh(one_device()):  # which is put back
        program.main()
    assert named == ["llama_60m"]
    found = printed(capsys)
    assert found["tokens_per_step"] == 8 * 16 and len(found["peak_resident_gb_after_each_save"]) == 3
    assert found["state_gb"] == round((12 * model.parameters + 4) / 1e9, 3)  # weights, two moments, Adam's count
    assert found["save_blocks_s"] <= found["save_complete_s"]
    if found["step_s"] > 0.01:
        share = found["save_blocks_s"] / found["step_s"]
        assert found["blocked_share_of_a_step"] == pytest.approx(share, rel=0.1, abs=0.1)


def test_a_load_is_compared_by_medians_of_rounds_in_turns(benchmark, monkeypatch, capsys, tmp_path: Path) -> None:
    program = benchmark("checkpoint_load", "--rounds", "3", "--dtype", "bfloat16", "--folder", str(tmp_path))
    if importlib.util.find_spec("torch") is None:
        pytest.skip("its version is printed")
    seconds = {"ours": [3.0, 1.0, 2.0], "transformers": [4.0, 16.0, 5.0]}
    asked = []

    def run(command, **options):
        name = "ours" if command[2] == program.OURS else "transformers"
        asked.append(name)
        assert command[3:] == [str(tmp_path), "bfloat16"]
        value = seconds[name][asked.count(name) - 1]
        keys = ("load_s", "process_s", "peak_gb", "peak_of_load_gb", "weights_gb")
        line = json.dumps({key: value * (i + 1) for i, key in enumerate(keys)})
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{line}\n")

    monkeypatch.setattr(program.subprocess, "run", run)
    program.main()
    found = printed(capsys)
    assert asked == ["ours", "transformers"] * 3 and found["rounds"] == 3
    assert (found["ours"]["load_s"], found["transformers"]["load_s"]) == (2.0, 5.0)  # medians, not means
    assert found["ours_to_transformers"] == dict.fromkeys(("load_s", "process_s", "peak_gb", "peak_of_load_gb"), 0.4)
    assert found["load_s_of_each_round"] == seconds


def test_the_program_that_measures_our_load_counts_all_weights(benchmark, monkeypatch, tmp_path: Path, capsys) -> None:
    program = benchmark("checkpoint_load")
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setattr(program, "TINYLLAMA", program.TINYLLAMA | small)
    program.write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "model"), "float32"])
    exec(program.OURS, {})
    found = printed(capsys)
    made = ModelConfig(256, 64, 2, 32, 96, kv_heads=4)
    assert found["weights_gb"] == 4 * made.parameters / 1e9
    assert 0 < found["load_s"] < found["process_s"] and found["peak_of_load_gb"] < found["peak_gb"]


def test_scores_are_compared_request_by_request(benchmark, tmp_path: Path) -> None:
    program = benchmark("score_against_lm_eval")
    np.save(tmp_path / "piqa-ours.npy", np.array([-1.0, -2.0, -3.0]))
    np.save(tmp_path / "piqa-peer.npy", np.array([-1.0, -2.5, -2.75]))
    ours = {"first_s": 4.0, "each_s": 2.0, "accuracy": {"piqa": 0.5}}
    found = program.compared({"ours": ours, "peer": {"seconds": 10.0, "accuracy": {"piqa": 0.5}}}, tmp_path, "piqa")
    assert (found["ratio_first"], found["ratio_each"], found["requests"]) == (2.5, 5.0, 3)
    assert found["largest_difference"] == 0.5 and found["same_accuracy"] is True
    other = program.compared({"ours": ours, "peer": {"seconds": 1.0, "accuracy": {"piqa": 0.6}}}, tmp_path, "piqa")
    assert other["same_accuracy"] is False


def test_ten_checkpoints_are_compared_with_ten_processes(benchmark, monkeypatch, tmp_path: Path) -> None:
    program = benchmark("score_against_lm_eval", "--tokenizer", "t")
    clock = iter([100.0, 120.0, 200.0, 208.0])
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(program, "make_model", lambda folder, tokenizer, seed: None)
    tuned = []
    started = lambda name, case, arguments, folder: tuned.append((name, case, arguments.batch_sizes))
    monkeypatch.setattr(program, "in_a_process", started)

    def run(command, **options):
        laps = [{"model_seconds": 50.0, "other_seconds": 50.0}] + 9 * [{"model_seconds": 3.0, "other_seconds": 1.0}]
        (tmp_path / "scores").mkdir()
        (tmp_path / "scores/log.jsonl").write_text("".join(json.dumps(lap) + "\n" for lap in laps))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(program.subprocess, "run", run)
    arguments = program.argparse.Namespace(tokenizer=Path("t"), benchmarks=None, limit=None, batch_sizes=[4, 16])
    found = program.series_of_ten(arguments, tmp_path, 16)
    assert tuned == [("peer", "core", [16])] and found["checkpoints"] == program.CHECKPOINTS == 10
    assert (found["seconds"], found["peer_seconds_of_one"], found["ratio"]) == (20.0, 8.0, 4.0)
    assert found["outside_model"] == 0.25  # the first holds the compilation


def test_the_case_core_is_six_tasks_of_the_suite(benchmark) -> None:
    cases = benchmark("score_against_lm_eval").CASES
    core = {spec.task: spec.shots for spec in open_suite("core").tasks}
    chosen = {spec.task: spec.shots for spec in open_suite(cases["core"]).tasks}
    assert len(chosen) == 6 and chosen.items() <= core.items()
    shots = {name: {spec.shots for spec in open_suite(text).tasks} for name, text in cases.items()}
    assert shots == {"mmlu": {5}, "mmlu_continuation": {5}, "arc_challenge": {25}, "piqa": {0}, "core": {0}}


def test_throughput_is_the_median_of_steps_and_the_ratio_theirs_to_ours(benchmark, monkeypatch, capsys) -> None:
    pytest.importorskip("torch")
    program = benchmark("train_throughput", "--turns", "3", "--steps", "2", "--sequences", "4", "--length", "8")
    steps = {"ours": iter([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]), "peer": iter([[3.0, 3.0], [4.0, 4.0], [9.0, 9.0]])}
    turns = []

    class Worker:
        def __init__(self, name: str):
            self.name = name

        def steps(self, count: int) -> list[float]:
            turns.append((self.name, count))
            return next(steps[self.name])

    monkeypatch.setattr(program, "Worker", Worker)
    program.main()
    found = printed(capsys)
    assert turns == [("ours", 2), ("peer", 2)] * 3 and found["tokens_per_step"] == 32
    assert (found["ours_tokens_per_s"], found["peer_tokens_per_s"], found["ratio"]) == (16, 8, 2.0)
    assert found["ratios"] == [1.0, 2.0, 3.0] and found["parameters"] == program.MODELS["4k"].parameters


def test_a_part_that_fails_or_hangs_stops_no_other(benchmark, monkeypatch, capsys, tmp_path: Path) -> None:
    program = benchmark("accelerator", "--parts", "train,score,train_peer,resume", "--out", str(tmp_path / "out.json"))
    partial = b'noise\n{"full_scan": {"tokens_per_s": 2000.0, "tflops": 4.0}}\n'

    def run(command, **options):
        part = command[command.index("--part") + 1]
        if part == "train":
            raise subprocess.TimeoutExpired(command, options["timeout"], output=partial)
        if part == "score":
            return subprocess.CompletedProcess(command, 1, stdout="", stderr="Traceback\nError: a | b\n")
        found = {"train_peer": {"tokens_per_s": 1000.0}, "resume": {"bitwise": True}}[part]
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{json.dumps(found)}\n", stderr="")

    monkeypatch.setattr(program.subprocess, "run", run)
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: True)
    program.main()
    rows = dict(line.strip("| ").split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:])
    assert rows["train step over torch.compile"] == "2.00" and rows["resumed bitwise"] == "True"
    assert rows["scoring, 7B, share of the ceiling"] == "– (Error: a / b)"
    assert rows["bfloat16 product, TFLOP/s"] == "– (not measured)"
    parts = json.loads((tmp_path / "out.json").read_text())
    assert parts["train"]["failed"] == "not finished after 130 s" and parts["train"]["full_scan"]["tflops"] == 4.0
    limits = {name: limit for name, (_, limit, _) in program.PARTS.items()}
    assert sum(limits.values()) - limits["score_vllm"] < 480


@pytest.mark.slow
def test_the_program_for_an_accelerator_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    """With tiny sizes; its figures mean nothing, what is right or wrong does."""
    command = [
        sys.executable,
        str(CHECKOUT / "benchmarks/accelerator.py"),
        "--tiny",
        "--out",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "out.json").read_text())
    failed = {name: part["failed"] for name, part in parts.items() if "failed" in part}
    assert failed == {"score_vllm": "vllm is not installed"}
    assert parts["resume"]["bitwise"] is True and len(parts["train"]) == 5
    for dtype, bound in (("bfloat16", 0.02), ("float32", 1e-5)):
        assert parts["tree_kernel"][f"{dtype}_largest_error"] < bound
    assert parts["score"]["documents"] == 6 and parts["score"]["unique_tokens"] <= 2 * (24 + 3 * 8)
    rows = done.stdout.splitlines()[2:]
    assert len(rows) == 9 and [("– (" in row) for row in rows] == [False] * 8 + [True]
