"""The store of scores: the pack that was scored, and one Parquet file per checkpoint.

    SCORES/pack/                          the request pack
    SCORES/<series>/<checkpoint>.parquet  request, loglikelihood (float64), is_greedy
    SCORES/log.jsonl                      what each checkpoint took, for people

The file metadata holds what was scored and how; a file is there complete or not at all.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fineline_jax.errors import UserError
from fineline_jax.scoring import pack as packs
from fineline_jax.scoring.pack import Pack
from fineline_jax.whole import whole_file, whole_folder

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
    version: str = ""
    """`series.version` of the weight files: tells without reading them that they are those of the key."""
    engine: str = "tree"
    engine_reason: str = ""
    """Why it is not the tree."""
    location: str = ""
    """`Series.location`: tells apart series of one name. "": of scores made before it was noted."""


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
    """Store one checkpoint's scores in `folder`, under a temporary name first.

    What a killed process left of the same checkpoint is removed: no two processes score one checkpoint.
    """
    path = path_of(folder, scores.header.series, scores.header.checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(scores.loglikelihood)
    columns = [np.arange(count, dtype=np.int32), scores.loglikelihood.astype(np.float64), scores.is_greedy]
    metadata = {_KEY: json.dumps(dataclasses.asdict(scores.header)).encode()}
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=_SCHEMA.with_metadata(metadata))
    with whole_file(path, alone=True) as partial:
        pq.write_table(table, partial, compression="zstd")
    return path


def note(folder: Path, line: dict[str, Any]) -> None:
    """Append to the log. Several machines may; nothing is ever read from it by this program."""
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> Scores:
    """Raises UserError if `path` is not a score file."""
    header = read_header(path)
    table = pq.read_table(path, schema=_SCHEMA)
    return Scores(header, table["loglikelihood"].to_numpy(), table["is_greedy"].to_numpy())


def read_header(path: Path) -> Header:
    try:
        metadata = pq.read_schema(path).metadata or {}
        header = json.loads(metadata[_KEY])
        return Header(**{**header, "key": Key(**header["key"])})
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a score file of `fineline score`; remove it and score again") from None


def header_of(folder: Path, series: str, checkpoint: str) -> Header | None:
    """The header of a checkpoint's scores; None if it has none. Raises UserError if the file is no score file."""
    path = path_of(folder, series, checkpoint)
    return read_header(path) if path.is_file() else None


def headers_of(folder: Path, series: str) -> list[Header]:
    """The headers of all scores of a series, by name. Raises UserError if a file is no score file."""
    return [read_header(path) for path in sorted(path_of(folder, series, "").parent.glob("[!.]*.parquet"))]


def score_files(folder: Path) -> list[Path]:
    """All score files, ordered by series and name. Raises UserError if `folder` is no scores folder."""
    if not (folder / "pack" / "manifest.json").is_file():
        raise UserError(f"{folder}: no scores here (there is no pack/ in it); make them with `fineline score`")
    found = (path for path in folder.glob("*/*.parquet") if path.name[0] != ".")
    return sorted(path for path in found if not re.fullmatch(r"pack|\.pack\..*", path.parent.name))


def check_pack(folder: Path, pack: Pack) -> None:
    """Raise UserError if `folder` holds scores of another pack, or none can be written there.

    Writes nothing where there are no scores yet.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder}: no scores can be written there ({there} is no writable folder); give another --out")
    if (folder / "pack").exists():
        keep_pack(folder, pack)


def keep_pack(folder: Path, pack: Pack) -> None:
    """Put the pack beside its scores, in the place of one without any. Raises UserError if there are scores of another.

    Several machines may do so at the same time: the first one's stays.
    """
    place = folder / "pack"
    if not place.exists():
        try:
            with whole_folder(place) as partial:
                packs.write_files(pack, partial)
            return
        except OSError:
            if not place.exists():
                raise
    kept = packs.load(place)
    if kept.hash != pack.hash and not score_files(folder):  # of a run that ended before its first checkpoint
        packs.save(pack, place)
        return
    if kept.hash != pack.hash:
        raise UserError(
            f"{folder} holds scores of another request pack ({kept.manifest['suite']}); choose another --out"
        )
    if kept.manifest != pack.manifest:  # other domains or chance levels for the same requests
        packs.save(pack, place)
