"""The store of scores: the pack that was scored, and one Parquet file per checkpoint.

    SCORES/pack/                          the request pack
    SCORES/<series>/<checkpoint>.parquet  request, loglikelihood (float64), is_greedy

The file metadata holds what was scored and how; a file is there complete or not at all.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fineline_jax.errors import UserError
from fineline_jax.scoring import pack as packs
from fineline_jax.scoring.pack import Pack

_KEY = b"fineline"
_SCHEMA = pa.schema([("request", pa.int32()), ("loglikelihood", pa.float64()), ("is_greedy", pa.bool_())])


@dataclasses.dataclass(frozen=True)
class Key:
    """What decides the numbers: a file with the same key is never computed again."""

    weights: str
    """Identity of the checkpoint's weights."""
    pack: str
    """Hash of the request pack."""
    dtype: str
    bos: str
    engine: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What was scored and how."""

    series: str
    checkpoint: str
    step: int | None
    tokens: int | None
    """Training tokens seen by the checkpoint."""
    context: int
    """Tokens the model was given at most."""
    key: Key


@dataclasses.dataclass(frozen=True)
class Scores:
    """The log-likelihoods of one checkpoint, in the order of the pack's requests."""

    header: Header
    loglikelihood: np.ndarray
    """float64 [requests], natural logarithm"""
    is_greedy: np.ndarray
    """bool [requests]"""


def path_of(folder: Path, series: str, checkpoint: str) -> Path:
    """A slash in a name (an id on the hub) becomes two underscores."""
    return folder / series.replace("/", "__") / f"{checkpoint.replace('/', '__')}.parquet"


def write(folder: Path, scores: Scores) -> Path:
    """Store one checkpoint's scores in `folder`, under a temporary name first."""
    path = path_of(folder, scores.header.series, scores.header.checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(scores.loglikelihood)
    columns = [np.arange(count, dtype=np.int32), scores.loglikelihood.astype(np.float64), scores.is_greedy]
    metadata = {_KEY: json.dumps(dataclasses.asdict(scores.header)).encode()}
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=_SCHEMA.with_metadata(metadata))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
    return path


def read(path: Path) -> Scores:
    """Raises UserError if `path` is not a score file."""
    header = read_header(path)
    table = pq.read_table(path, schema=_SCHEMA)
    return Scores(header, table["loglikelihood"].to_numpy(), table["is_greedy"].to_numpy())


def read_header(path: Path) -> Header:
    try:
        metadata = pq.read_schema(path).metadata or {}
        header = json.loads(metadata[_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        raise UserError(f"{path}: not a score file of `fineline score`; remove it and score again") from None
    return Header(**{**header, "key": Key(**header["key"])})


def finished(folder: Path, series: str, checkpoint: str, key: Key) -> bool:
    """Whether the scores with this key are there."""
    path = path_of(folder, series, checkpoint)
    return path.is_file() and read_header(path).key == key


def score_files(folder: Path) -> list[Path]:
    """All score files, ordered by series and name. Raises UserError if `folder` is no scores folder."""
    if not (folder / "pack" / "manifest.json").is_file():
        raise UserError(f"{folder}: no scores here (there is no pack/ in it); make them with `fineline score`")
    return sorted(path for path in folder.glob("*/*.parquet") if path.parent.name != "pack" and path.name[0] != ".")


def keep_pack(folder: Path, pack: Pack) -> None:
    """Put the pack beside its scores. Raises UserError if the folder holds scores of another pack."""
    place = folder / "pack"
    if place.exists():
        kept = packs.load(place)
        if kept.hash != pack.hash:
            raise UserError(
                f"{folder} holds scores of another request pack ({kept.manifest['suite']}); choose another --out"
            )
        if kept.manifest == pack.manifest:
            return  # else: other domains or chance levels for the same requests
    packs.save(pack, place)
