"""A checkpoint series: an ordered list of (name, tokens, location) that can be opened one after another.

`open_series` knows four shapes of folder and reads no weights; JAX is imported only by `load`.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fineline_jax.checkpoints.record import damage, digests, read_record
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import from_json

if TYPE_CHECKING:
    import jax

HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One set of weights of a series."""

    series: str
    name: str
    """Unique in the series; fit for a file name."""
    step: int | None
    """Optimizer steps taken; None: not known."""
    tokens: int | None
    """Tokens trained on; None: not known."""
    location: Path
    """RUN/checkpoints/<step>, or the folder with config.json."""
    kind: Literal["orbax", "hf"]


@dataclasses.dataclass(frozen=True)
class Series:
    """Checkpoints of one model, in the order of training."""

    name: str
    checkpoints: tuple[Checkpoint, ...]


def open_series(spec: str) -> Series:
    """The series at the path `spec`:

    a run folder (recipe.json, checkpoints/): its kept steps, not the rolling latest;
    one checkpoint folder of a run: that one;
    a Hugging Face folder (config.json and safetensors): that one;
    a folder of Hugging Face folders: all of them, by the tokens or steps in their names.

    Raises UserError naming what was looked for.
    """
    path = Path(os.path.abspath(spec))
    if not path.is_dir():
        raise UserError(f"{spec}: no such folder; a series is a run, a checkpoint of a run, or Hugging Face folders")
    if (path / "recipe.json").is_file():
        return _run(path, spec)
    if path.name.isdigit() and (path.parent.parent / "recipe.json").is_file():
        return _one_of_run(path, spec)
    if _is_hf(path):
        step, tokens = parse_name(path.name)
        return Series(path.name, (Checkpoint(path.name, "main", step, tokens, path, "hf"),))
    folders = sorted(child for child in path.iterdir() if child.is_dir() and _is_hf(child))
    if folders:
        return _folders(path.name, folders)
    raise UserError(
        f"{spec}: no series found; looked for recipe.json (a run), config.json with"
        f" {' or '.join(HF_WEIGHTS)}, and folders with those"
    )


def load(
    checkpoint: Checkpoint, mesh: "jax.sharding.Mesh", dtype: "jax.typing.DTypeLike | None" = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters in `dtype` (default float32), sharded over `mesh` for the decoder.

    Raises UserError naming the file if the checkpoint is damaged or does not fit its config.
    """
    import jax.numpy as jnp

    dtype = jnp.dtype(dtype or "float32")
    if checkpoint.kind == "hf":
        from fineline_jax.checkpoints.hub import load_hf

        return load_hf(checkpoint.location, mesh, dtype)
    from fineline_jax.checkpoints.store import check_intact, load_items
    from fineline_jax.models.decoder import abstract_params

    config = from_json(_run_folder(checkpoint) / "recipe.json").model
    check_intact(checkpoint.location, "params")
    return config, load_items(checkpoint.location, {"params": abstract_params(config, mesh, dtype)})["params"]


def identity(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, sizes and contents of the weight files: equal for equal files, wherever they lie.

    Reads all weights (not the optimizer state) unless this process has hashed the same files before.
    """
    found = digests(checkpoint.location, weight_files(checkpoint))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def version(checkpoint: Checkpoint) -> str:
    """What tells without reading them that the weight files are still the same: names, sizes and times of change."""
    states = [(name, (checkpoint.location / name).stat()) for name in weight_files(checkpoint)]
    found = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files with the weights, relative to the checkpoint's location, sorted.

    Raises UserError if there are none.
    """
    folder = checkpoint.location
    if checkpoint.kind == "orbax":
        names = sorted(path.relative_to(folder).as_posix() for path in (folder / "params").rglob("*") if path.is_file())
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"{folder}: holds no weight files; fetch the checkpoint again")
    return names


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder with the checkpoint's own tokenizer; None if it brings none."""
    if checkpoint.kind == "orbax":
        candidates = [_run_folder(checkpoint) / "tokenizer"]
    else:
        folder = checkpoint.location
        candidates = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    return next((folder for folder in candidates if any((folder / name).is_file() for name in TOKENIZER)), None)


_STEP = r"(?:step|iter)[-_]?(\d+)(k?)(?![\d.])"
_AMOUNT = r"(\d+(?:\.\d+)?)(b|t)t?(?![a-z0-9])"


def parse_name(name: str, common: str = "") -> tuple[int | None, int | None]:
    """(step, tokens) in a checkpoint's name, None where it does not say.

    Known: step1000, step1000-tokens4B, …-step-50K-105b, train_00220B, Amber-Reproduce-8.39B. A bare amount at
    the end could be the model's size (open_llama_7b): it counts only behind `common`, what all names share.
    """
    text = name.lower()
    step = tokens = None
    if found := re.search(_STEP, text):
        step = int(found[1]) * (1000 if found[2] else 1)
    amounts = [
        rf"tokens?[-_]?{_AMOUNT}",
        rf"{_STEP}[-_](?:token[-_])?{_AMOUNT}",
        rf"(?:train_|reproduce-){_AMOUNT}",
    ]
    for pattern in amounts:
        if found := re.search(pattern, text):
            tokens = _tokens(*found.groups()[-2:])
            break
    else:
        if common and (found := re.fullmatch(rf"(?:.*[-_])?{_AMOUNT}", text[len(common) :])):
            tokens = _tokens(*found.groups())
    return step, tokens


def _tokens(number: str, unit: str) -> int:
    return round(float(number) * {"b": 1e9, "t": 1e12}[unit])


def _folders(name: str, folders: list[Path]) -> Series:
    common = _common([folder.name.lower() for folder in folders])
    found = [
        Checkpoint(name, folder.name, *parse_name(folder.name, common if len(folders) > 1 else ""), folder, "hf")
        for folder in folders
    ]

    def order(checkpoint: Checkpoint) -> tuple[float, float, list[Any]]:
        known = [math.inf if value is None else value for value in (checkpoint.tokens, checkpoint.step)]
        numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", checkpoint.name)]
        return known[0], known[1], numbers

    return Series(name, tuple(sorted(found, key=order)))


def _common(names: list[str]) -> str:
    """What all names begin with, up to the first number that differs."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return re.sub(r"[\d.]*$", "", first[:same])


def _run(run: Path, spec: str) -> Series:
    folder = run / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        record = read_record(path) if path.name.isdigit() else None
        if record is not None and record["kept"]:
            found.append(_of_run(run, path, record))
    if not found:
        raise UserError(f"{spec}: the run has no kept checkpoint in {folder} yet; train it, or check the schedule")
    return Series(run.name, tuple(sorted(found, key=lambda checkpoint: checkpoint.step or 0)))


def _one_of_run(path: Path, spec: str) -> Series:
    record = read_record(path)
    if record is None:
        raise UserError(f"{spec}: the checkpoint is damaged ({damage(path)}); give another one")
    run = path.parent.parent
    return Series(run.name, (_of_run(run, path, record),))


def _of_run(run: Path, path: Path, record: dict[str, Any]) -> Checkpoint:
    return Checkpoint(run.name, f"step{record['step']}", record["step"], record["tokens"], path, "orbax")


def _run_folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.location.parent.parent


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in HF_WEIGHTS)
