"""The commands of the tutorials, run in order in an empty folder: they print what the pages show.

Lines of progress (they tell a rate) are left out. Times and shares of time may differ, other decimal numbers by 2 %,
which rounding on another processor may make; every other word and number may not.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from docs_pages import CHECKOUT, page, transcripts
from remote_examples import files_of, hub
from series_examples import one_device

from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.remote.cache import default_downloads
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig

pytestmark = pytest.mark.slow

PROGRESS = re.compile(r": \S+ of \S+ \w+, \S+/s")
TIMES = re.compile(r"(\d+m)?\d+s, [\d.]+% of it")
DECIMAL = re.compile(r"\d+\.\d+")
STAND_IN = ModelConfig(
    vocab_size=50_304, width=16, layers=2, heads=2, mlp_width=32, norm_eps=1e-5, attention_bias=True, mlp_bias=True,
    norm="layer", parallel_residual=True, rotary_fraction=0.25, mlp="gelu",
)  # fmt: skip
"""Of Pythia's family and vocabulary."""


def compared(lines: list[str]) -> list[str]:
    kept = [" ".join(line.split()) for line in lines if line.strip() and not PROGRESS.search(line)]
    return [re.sub(r"^goodput.*", "goodput", TIMES.sub("T, N% of it", line)) for line in kept]


def assert_prints_as_shown(name: str, folder: Path, **variables: str) -> None:
    """Write the files that the page shows, then run its commands."""
    for file, content in re.findall(r"`([\w.]+)`[^`]*:\n\n```\w+\n(.*?)^```", page(name), flags=re.M | re.S):
        (folder / file).write_text(content, encoding="utf-8")
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(CHECKOUT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "cache"),
        **variables,
    }
    for command, lines in transcripts(name):
        done = subprocess.run(
            command, shell=True, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        printed, shown = compared(done.stdout.splitlines()), compared(lines)
        assert [DECIMAL.sub("D", line) for line in printed] == [DECIMAL.sub("D", line) for line in shown], command
        numbers = ([float(number) for line in text for number in DECIMAL.findall(line)] for text in (printed, shown))
        assert next(numbers) == pytest.approx(next(numbers), rel=0.02), command


@pytest.fixture
def folder(tmp_path: Path, shared_data: Path) -> Path:
    """Holds the documents of the tasks, and a cache of nothing but the index of lm-eval's tasks."""
    (tmp_path / "benchmarks").symlink_to(shared_data / "benchmarks")
    (tmp_path / "cache/fineline_jax").mkdir(parents=True)
    for index in default_downloads().glob("lm_eval_tasks_*.json"):
        shutil.copy(index, tmp_path / "cache/fineline_jax")
    return tmp_path


def test_a_task_of_ones_own(folder: Path, shared_data: Path) -> None:
    """The stand-in: a trained model, and the same with noise on its weights as earlier states."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    source = shared_data / "models/tinystories-260k"
    weights, rng = load_file(source / "model.safetensors"), np.random.default_rng(0)
    for step, noise in ((1000, 0.5), (2000, 0.15), (3000, 0.0)):
        place = folder / f"series/step{step}-tokens{step // 1000}B"
        shutil.copytree(source, place)
        noisy = {
            name: (one + noise * one.std() * rng.standard_normal(one.shape)).astype(one.dtype)
            for name, one in weights.items()
        }
        save_file(noisy, place / "model.safetensors", {"format": "pt"})
    assert_prints_as_shown("docs/tutorials/your_task.md", folder)


def test_a_model_of_ones_own_on_mmlu(folder: Path, shared_data: Path) -> None:
    shutil.copytree(shared_data / "models/tinystories-260k", folder / "my_model")
    assert_prints_as_shown("docs/tutorials/your_model.md", folder)


def test_ten_checkpoints_of_pythia(folder: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "tokenizer").mkdir()
    shutil.copy(shared_data / "tokenizers/gpt-neox-20b/tokenizer.json", folder / "tokenizer")
    shutil.copytree(shared_data / "trajectories/pythia/raw", folder / "pythia/evals/pythia-v1")
    models = tmp_path_factory.mktemp("pythia")
    with hub() as served:
        revisions = served.repositories["EleutherAI/pythia-160m"] = {}
        for checkpoint in open_series("pythia-160m", tokens="0:300B:33B").checkpoints:
            with jax.set_mesh(one_device()):
                params = decoder.init_params(STAND_IN, jax.random.key(checkpoint.step or 0))
                export_hf(STAND_IN, params, models / checkpoint.name, folder / "tokenizer", dtype="float16")
            revisions[checkpoint.name] = files_of(models / checkpoint.name)
        variables = {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0"}
        assert_prints_as_shown("docs/tutorials/pythia.md", folder, **variables)


def test_a_text_of_ones_own(folder: Path, shared_data: Path) -> None:
    (folder / "corpus").mkdir()
    shutil.copy(shared_data / "text/tinyshakespeare.txt", folder / "corpus/plays.txt")
    assert_prints_as_shown("docs/tutorials/your_text.md", folder)
