"""The cases of shared/data/cases (README there) outside analyze/: each made again here, or by the test CASES names.

The models are transformers' own, saved by torch and safetensors; the right log-likelihoods and losses are computed by
transformers in float32.
"""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import MINI_RECIPE, lines_of, start
from data_examples import amber, stored
from safetensors.numpy import load_file, save_file
from scoring_examples import write_benchmarks, write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.checkpoints.open import open_series
from fineline_jax.cli import main
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack

torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
transformers = pytest.importorskip("transformers")

HERE = "faults/test_cases.py"
OWN_TASKS = "scoring/requests/test_own_tasks.py"
"""It names the other files of custom_tasks/ one by one, by the name of the task or as its data."""
AT_ONCE = "commands/test_two_writers.py::test_of_two_commands_that_write_one_folder_the_second_is_refused"
CASES: dict[str, tuple[str, ...]] = {
    # A file of the folder or, of a case without one, the first column of its row in README.md: its tests.
    "size read as tokens": (f"{HERE}::test_a_size_in_a_name_is_no_number_of_tokens",),
    "NaN checkpoint": (
        f"{HERE}::test_a_checkpoint_of_nan_is_no_point_of_a_curve",
        "test_analysis_scores.py::test_a_checkpoint_with_log_likelihoods_that_are_not_finite_is_left_out_and_named",
    ),
    "pad token beyond the embedding": (f"{HERE}::test_the_folder_is_scored_as_transformers_does",),
    "hf_trainer/": (f"{HERE}::test_the_trainers_output_is_a_series",),
    "scoring/hf_trainer/config.json": (f"{HERE}::test_the_trainers_output_is_a_series",),
    "custom_tasks/": (f"{OWN_TASKS}::test_every_case_asks_and_counts_as_lm_eval",),
    "scoring/custom_tasks/my_gen.yaml": (f"{OWN_TASKS}::test_gold_solutions_of_a_task_that_generates",),
    "scoring/custom_tasks/data/gen.jsonl": (
        f"{OWN_TASKS}::test_gold_solutions_of_a_task_that_generates",
    ),
    "scoring/custom_tasks/utils.py": (
        f"{OWN_TASKS}::test_a_task_with_functions_of_its_own_is_a_program_that_is_run",
    ),
    "base prefix absent": (f"{HERE}::test_the_folder_is_scored_as_transformers_does",),
    "NeoX raw state dict": (f"{HERE}::test_the_folder_is_scored_as_transformers_does",),
    "Mistral, `sliding_window: null`": (f"{HERE}::test_the_folder_is_scored_as_transformers_does",),
    "lfs_pointer/": (f"{HERE}::test_weights_that_are_a_pointer_of_git_lfs_are_called_one",),
    "scoring/lfs_pointer/*": (f"{HERE}::test_weights_that_are_a_pointer_of_git_lfs_are_called_one",),
    "`fineline pretrain RUNFOLDER` after `import … RUNFOLDER`": (
        f"{HERE}::test_pretrain_goes_on_in_the_folder_that_import_made",
    ),
    "training/mini.py": (f"{HERE}::test_pretrain_goes_on_in_the_folder_that_import_made",),
    "batch size changed at step 80 with --accept-changes": (
        "training/test_changes.py::test_two_changes_with_kills_between_leave_the_run_that_was_never_killed",
        "training/test_history.py::test_any_changes_and_kills_read_every_window_once_in_an_epoch_and_the_same_ones",
    ),
    "validation loss at step 0 for batch 8, 16, 24, 48": (
        f"{HERE}::test_the_validation_loss_is_of_the_same_windows_for_any_batch",
    ),
    "`--out gs://…`, `--run gs://…`": ("faults/test_addresses.py::test_commands",),
    "corpus folder with .parquet or .jsonl.zst beside .jsonl": (
        "data/test_documents.py::test_parquet_and_zstandard_are_read_like_lines",
        "data/test_documents.py::test_nothing_of_a_folder_is_dropped_without_a_word",
    ),
    "source added, or weights of a mixture changed, mid-run": (
        "training/test_history.py::test_any_changes_and_kills_read_every_window_once_in_an_epoch_and_the_same_ones",
    ),
    "Ctrl-C on two processes": ("test_multihost.py::test_processes_end_together",),
    "two hosts without a shared folder": ("test_multihost.py::test_a_folder_that_is_not_shared_is_found",),
    "damage/brackets.sh": ("checkpoints/test_store.py::test_a_path_that_orbax_takes_for_a_pattern_is_refused",),
    "damage/complete_json.sh": (f"{HERE}::test_a_record_that_was_changed_or_cut_is_named",),
    "damage/export_scores_full_disk.sh": ("faults/test_injected_faults.py::test_every_command_under_every_fault",),
    "damage/two.sh": (AT_ONCE,),
    "mutants/survivors.tsv": (f"{HERE}::test_every_survivor_is_a_slip_that_tests_notice_now",),
    "README.md": (f"{HERE}::test_every_case_of_the_folder_has_a_row",),
}  # fmt: skip


def test_every_row_names_tests_that_exist() -> None:
    tests = Path(__file__).parents[1]
    for case, named in CASES.items():
        for test in named:
            file, _, function = test.partition("::")
            body = ast.parse((tests / file).read_text()).body
            assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}, (case, test)


def test_every_case_of_the_folder_has_a_row(shared_data: Path) -> None:
    folder = shared_data / "cases"
    _, scoring, training, _ = re.split(r"\n## (?:scoring|training|damage)/", (folder / "README.md").read_text())
    rows = [line.split("|")[1].strip() for part in (scoring, training) for line in part.splitlines() if line[:1] == "|"]
    rows = [row for row in rows if row != "case" and set(row) != {"-"}]
    assert len(rows) >= 17
    assert not [row for row in rows if row not in CASES]
    own = (Path(__file__).parents[1] / OWN_TASKS).read_text() + "".join(
        file.read_text() for file in (folder / "scoring/custom_tasks").glob("my_*.yaml")
    )
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or name.startswith("analyze/"):
            continue
        named = name in CASES or any(Path(name).match(case) for case in CASES if "*" in case)
        assert named or (name.startswith("scoring/custom_tasks/") and file.stem in own), name


def test_every_survivor_is_a_slip_that_tests_notice_now(shared_data: Path) -> None:
    """The number of a mutation that survived begins the name of its slip; `make mutants` tries them all."""
    tables = (file.read_text() for file in (Path(__file__).parents[1] / "mutants").glob("*.tsv"))
    slips = {line.partition("_")[0] for table in tables for line in table.splitlines()}
    _, *survivors = (shared_data / "cases/mutants/survivors.tsv").read_text().splitlines()
    assert len(survivors) > 50
    assert not {line.partition("\t")[0] for line in survivors} - slips


# ---- scoring


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """A pack, and the tokenizer for it."""
    folder = tmp_path_factory.mktemp("asked")
    benchmarks = write_benchmarks(folder / "benchmarks", documents=4)
    tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
    prepare_pack("piqa,arc_easy", tokenizer, folder / "pack", benchmarks=benchmarks)
    return folder


SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip


def made(name: str, **keys: Any) -> Any:
    """A model of transformers with random weights; NAME is that of its class without ForCausalLM."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**(SIZES | {"initializer_range": 0.3} | keys))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def save(model: Any, folder: Path, tokenizer: Path, rename: Callable[[str], str] | None = None) -> Path:
    model.save_pretrained(folder)
    for file in tokenizer.glob("*"):
        shutil.copy(file, folder)
    if rename:
        weights = folder / "model.safetensors"
        save_file({rename(name): tensor for name, tensor in load_file(weights).items()}, weights)
    return folder


def score(folder: Path, asked: Path, out: Path, packed: str = "pack") -> int:
    return main(["score", str(folder), "--pack", str(asked / packed), "--out", str(out), "--dtype", "float32"])


def found(out: Path) -> dict[str, np.ndarray]:
    return {file.stem: score_files.read(file).loglikelihood for file in score_files.score_files(out)}


def right(model: Any, packed: Path) -> np.ndarray:
    """Log-likelihoods of the pack's requests, one at a time."""
    loaded, values = pack.load(packed), []
    contexts = loaded.contexts["tokens"].to_pylist()
    for row in loaded.requests.to_pylist():
        context = contexts[row["context"]]
        with torch.no_grad():
            logits = model(torch.tensor([context + row["tokens"]])).logits[0].double().log_softmax(-1)
        behind = logits[len(context) - 1 : -1]
        values.append(float(behind.gather(1, torch.tensor(row["tokens"])[:, None]).sum()))
    return np.array(values)


def base_class(folder: Path) -> None:
    """What LlamaModel, which has no head, would save."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))


def raw_state(model: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    head = next(name for name in state if name in ("embed_out.weight", "lm_head.weight"))
    torch.save(
        {"lm_head.weight" if name == head else name: value for name, value in state.items()},
        folder / "pytorch_model.bin",
    )


@pytest.mark.parametrize(
    "case", ["no prefix", "module.", "_orig_mod.", "NeoX raw state dict", "Mistral", "pad token beyond the embedding"]
)
def test_the_folder_is_scored_as_transformers_does(case: str, asked: Path, tmp_path: Path) -> None:
    tokenizer, packed, folder = asked / "tokenizer", "pack", tmp_path / "model"
    if case == "no prefix":
        model = made("Llama", tie_word_embeddings=True)
        save(model, folder, tokenizer, lambda name: name.removeprefix("model."))
        base_class(folder)
    elif case in ("module.", "_orig_mod."):
        model = made("Llama", tie_word_embeddings=True)
        save(model, folder, tokenizer, lambda name: case + name)
    elif case == "NeoX raw state dict":
        model = made("GPTNeoX", tie_word_embeddings=False)
        raw_state(model, save(model, folder, tokenizer))
    elif case == "Mistral":
        model = made("Mistral", sliding_window=None, num_key_value_heads=2, tie_word_embeddings=False)
        save(model, folder, tokenizer)
        assert json.loads((folder / "config.json").read_text())["sliding_window"] is None
    else:
        tokenizer = shutil.copytree(tokenizer, tmp_path / "tokenizer")
        read = transformers.AutoTokenizer.from_pretrained(tokenizer)
        rows = len(read)
        read.add_special_tokens({"pad_token": "<pad>"})
        read.save_pretrained(tokenizer)
        assert read.convert_tokens_to_ids("<pad>") == rows
        model = made("Llama", vocab_size=rows, tie_word_embeddings=True)
        save(model, folder, tokenizer)
        packed = "padded"
        prepare_pack("piqa,arc_easy", tokenizer, asked / packed, benchmarks=asked / "benchmarks")
    assert score(folder, asked, tmp_path / "scores", packed) == 0
    [values] = found(tmp_path / "scores").values()
    np.testing.assert_allclose(values, right(model, asked / packed), rtol=2e-5, atol=2e-4)


def test_a_size_in_a_name_is_no_number_of_tokens(asked: Path, tmp_path: Path) -> None:
    for step in (1000, 2000):
        save(made("Llama", tie_word_embeddings=True), tmp_path / f"models/step{step}-1b", asked / "tokenizer")
    series = open_series(str(tmp_path / "models")).checkpoints
    assert [(one.step, one.tokens) for one in series] == [(1000, None), (2000, None)]
    assert score(tmp_path / "models", asked, tmp_path / "scores") == 0
    headers = [score_files.read(file).header for file in score_files.score_files(tmp_path / "scores")]
    assert [(one.step, one.tokens) for one in headers] == [(1000, None), (2000, None)]


def test_the_trainers_output_is_a_series(asked: Path, tmp_path: Path) -> None:
    """With the case's sizes."""
    keys = {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "head_dim": 8,
    }
    model = made("Llama", **keys, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True)
    for name in (".", "checkpoint-500", "checkpoint-1000"):
        folder = save(model, tmp_path / "out" / name, asked / "tokenizer")
        step = int(name.partition("-")[2] or 1000)
        state = {"global_step": step, "num_input_tokens_seen": step * 4096, "log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert score(tmp_path / "out", asked, tmp_path / "scores") == 0
    files = score_files.score_files(tmp_path / "scores")
    headers = [score_files.read(file).header for file in files]
    assert sorted((one.step, one.tokens) for one in headers) == [(500, 2_048_000), (1000, 4_096_000)]


def test_a_checkpoint_of_nan_is_no_point_of_a_curve(asked: Path, tmp_path: Path, capsys, caplog) -> None:
    for step in (1, 2, 3):
        folder = save(made("Llama", tie_word_embeddings=True), tmp_path / f"models/step{step}", asked / "tokenizer")
        if step == 2:
            tensors = load_file(folder / "model.safetensors")
            save_file({name: np.full_like(one, np.nan) for name, one in tensors.items()}, folder / "model.safetensors")
    assert score(tmp_path / "models", asked, tmp_path / "scores") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fineline: ") and "NaN or infinite" in said and "models/step2" in said
    analyze = ["analyze", str(tmp_path / "scores"), "--tokens-per-step", "10", "--out", str(tmp_path / "report")]
    caplog.clear()
    assert main(analyze) == 0
    assert "left out, log-likelihoods are NaN or infinite: models/step2" in caplog.text
    table = (tmp_path / "report/tidy.csv").read_text()
    assert "step1" in table and "step3" in table and "step2" not in table


def test_weights_that_are_a_pointer_of_git_lfs_are_called_one(asked: Path, tmp_path: Path, capsys) -> None:
    folder = save(made("Llama", tie_word_embeddings=True), tmp_path / "model", asked / "tokenizer")
    (folder / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n"
    )
    assert score(folder, asked, tmp_path / "scores") in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fineline: ") and "a git LFS pointer" in said and "git lfs pull" in said
    assert not (tmp_path / "scores").exists() or not found(tmp_path / "scores")


# ---- training and damage


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A folder with mini.py, its data set of 70 windows and 32 to validate on."""
    folder = tmp_path_factory.mktemp("recipe")
    windows = np.random.default_rng(0).integers(0, 400, (102, 9)).tolist()
    files = [amber(folder / f"{name}.jsonl", part) for name, part in (("a", windows[:70]), ("b", windows[70:]))]
    tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
    prepare_amber(
        files[:1], folder / "data", vocab_size=512, sequence_length=8, validation_inputs=files[1:], tokenizer=tokenizer
    )
    (folder / "mini.py").write_text(MINI_RECIPE)
    return folder


@pytest.mark.slow
def test_the_validation_loss_is_of_the_same_windows_for_any_batch(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(recipe)
    losses = []
    for sequences in (8, 16, 24, 48):
        run = tmp_path / str(sequences)
        options = ["--batch.sequences", str(sequences), "--tokens", str(sequences * 8), "--mesh.fsdp", "1"]
        assert main(["pretrain", "mini.py", "--run", str(run), *options, "--logging.validation.0.windows", "32"]) == 0
        [line] = [line for line in lines_of(run) if line["step"] == 0]
        losses.append(line["validation_loss/held_out"])
    assert main(["export", str(tmp_path / "8/checkpoints/0"), str(tmp_path / "hf")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    windows = torch.tensor(stored(recipe / "data", "validation"))
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits.double().flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()))
    assert len(windows) == 32
    np.testing.assert_allclose(losses, [expected] * 4, rtol=1e-6)


def test_a_record_that_was_changed_or_cut_is_named(recipe: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(recipe)
    run = tmp_path / "run"
    assert main(["pretrain", "mini.py", "--run", str(run)]) == 0
    for step, damage in (
        (4, lambda text: text.replace('"tokens": 128', '"tokens": 928')),
        (8, lambda text: text[:200]),
    ):
        record = run / f"checkpoints/{step}/complete.json"
        changed = damage(record.read_text())
        assert changed != record.read_text()
        record.write_text(changed)
    capsys.readouterr()
    assert main(["series", str(run)]) in (1, 2)
    said = capsys.readouterr()
    assert "checkpoints/4" in said.err and "checkpoints/8" in said.err and "928" not in said.out


@pytest.mark.slow
def test_pretrain_goes_on_in_the_folder_that_import_made(recipe: Path, tmp_path: Path) -> None:
    """Two commands, the second without --run; at a rate of 1e-9 the weights stay those imported, to 1e-6."""
    for path in recipe.iterdir():
        (tmp_path / path.name).symlink_to(path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = made(
        "Llama",
        **sizes,
        max_position_embeddings=96,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
    save(model, tmp_path / "hf", recipe / "tokenizer")
    (tmp_path / "slow.py").write_text(MINI_RECIPE.replace("Schedule()", "Schedule(peak=1e-9, final=0.0)"))
    for command in (
        "import hf run --step 2 --tokens 64 --recipe slow.py",
        "pretrain run",
        "export run/checkpoints/8 x",
    ):
        process = start(command.split(), cwd=tmp_path)
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert not (tmp_path / "runs").exists()
    assert [one.step for one in open_series(str(tmp_path / "run")).checkpoints] == [2, 4, 6, 8]
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == list(range(3, 9))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "x"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert np.abs(tensor - after[name]).max() < 1e-6, name
