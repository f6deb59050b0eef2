"""The store of scores: the pack that was scored, and one Parquet file per checkpoint.

    SCORES/pack/                          the request pack; earlier.parquet: where it asks what packs before it did
    SCORES/<series>/<checkpoint>.parquet  request, loglikelihood (float64), is_greedy
    SCORES/log.jsonl                      what each checkpoint took, for people

The file metadata holds what was scored and how, the digest of the columns and that of itself; the pages have checksums.
A file is there complete or not at all.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fineline_jax.atomic_files import atomic_file, atomic_folder, sealed, unsealed
from fineline_jax.checkpoints.load import weights_hash
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError, reading
from fineline_jax.folder_lock import writing
from fineline_jax.scoring.job_shard import WHOLE, JobShard
from fineline_jax.scoring.requests import pack as packs
from fineline_jax.scoring.requests.pack import Pack

FORMAT = 3
_KEY = b"fineline"
_EARLIER_FILE = "earlier.parquet"
_EARLIER = pa.schema([("pack", pa.string()), ("rows", pa.list_(pa.int32()))])
_SCHEMA = pa.schema([("request", pa.int32()), ("loglikelihood", pa.float64()), ("is_greedy", pa.bool_())])


@dataclasses.dataclass(frozen=True)
class Key:
    """What decides the numbers: a file with the same key is never computed again."""

    weights_hash: str
    """`load.weights_hash` of the checkpoint."""
    pack_hash: str
    dtype: str
    bos: str
    engine_version: str


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
    stat_signature: str = ""
    """`load.stat_signature` of the weight files: shows without reading them that they are those of the key."""
    engine: str = "tree"
    engine_reason: str = ""
    """Why it is not the tree."""
    location: str = ""
    """`Series.location`: distinguishes series of one name; "": not known."""
    not_finite: int = 0
    """Log-likelihoods that are NaN or infinite (`write` counts them): with one, the checkpoint has no metrics."""


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
    header = dataclasses.replace(scores.header, not_finite=int((~np.isfinite(scores.loglikelihood)).sum()))
    columns = [np.arange(count, dtype=np.int32), scores.loglikelihood.astype(np.float64), scores.is_greedy]
    facts = {"format": FORMAT, "content": _digest(columns), **dataclasses.asdict(header)}
    metadata = {_KEY: json.dumps(sealed(facts)).encode()}
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=_SCHEMA.with_metadata(metadata))
    with atomic_file(path, exclusive=True) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    return path


def _digest(columns: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


def order_file(folder: Path, series: str, part: JobShard = WHOLE) -> Path:
    """What a command keeps of the checkpoints of a series, or of its part of them, that have no scores."""
    name = "order.json" if part == WHOLE else f"order-{part.index + 1}-of-{part.count}.json"
    return path_of(folder, series, "").parent / name


def unscored(folder: Path, series: str) -> list[dict[str, Any]]:
    """The checkpoints of a series that are known and have no scores: checkpoint, step, tokens (None: not known), why.

    Of a command that was killed, `why` is that they are not scored yet. Raises UserError for a file that is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(path_of(folder, series, "").parent.glob("order*.json")):
        try:
            found |= {row["checkpoint"]: row for row in json.loads(file.read_bytes())["not_scored"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file}: damaged; remove it and run `fineline score` again") from None
    return [row for name, row in found.items() if not path_of(folder, series, name).is_file()]


def note(folder: Path, line: dict[str, Any]) -> None:
    """Append to the log. Several machines may; nothing is ever read from it by this program."""
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> Scores:
    """Raises UserError if `path` is not a score file, or not as it was written."""
    header, content = _read_header(path)
    try:
        table = pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True)
        columns = [table[name].to_numpy() for name in _SCHEMA.names]
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from None
    if _digest(columns) != content:
        raise _damaged(path, "its numbers have changed")
    return Scores(header, *columns[1:])


def read_header(path: Path) -> Header:
    """Raises UserError if `path` is not a score file, one of another format, or its header was changed."""
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[Header, str]:
    """The header, and the digest of the columns."""
    try:
        text = (pq.read_schema(path).metadata or {})[_KEY]
        version = json.loads(text).get("format", 1)
    except (OSError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: not a score file of `fineline score`; remove it and score again") from None
    if version != FORMAT:
        raise UserError(f"{path}: score file of format {version}, not {FORMAT}; remove it and score again")
    try:
        header = unsealed(text)
        del header["format"]
        content = header.pop("content")
        return Header(**{**header, "key": Key(**header["key"])}), content
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"of its header: {error}") from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged scores ({why}); remove the file and score again")


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
    paths = (path for path in folder.glob("*/*.parquet") if path.name[0] != ".")
    return sorted(path for path in paths if not re.fullmatch(r"pack|\.pack\..*", path.parent.name))


def usable_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The score files whose log-likelihoods are all finite, as `score_files`; and the names of the other checkpoints.

    Raises UserError if there is none of the first kind.
    """
    headers = {path: read_header(path) for path in score_files(folder)}
    if not headers:
        raise UserError(f"{folder}: holds no scores yet; make them with `fineline score`")
    broken = [f"{one.series}/{one.checkpoint}" for one in headers.values() if one.not_finite]
    if len(broken) == len(headers):
        raise UserError(f"{folder}: no checkpoint has finite log-likelihoods ({', '.join(broken)}); see their weights")
    return [path for path, one in headers.items() if not one.not_finite], broken


def check_pack(folder: Path, pack: Pack) -> None:
    """Raise UserError if `folder` holds scores of requests that `pack` does not ask, or none can be written there.

    Writes nothing where there are no scores yet.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"{folder}: no scores can be written there ({existing} is no writable folder); give another --out"
        )
    if (folder / "pack").exists():
        kept = packs.load(folder / "pack")
        if kept.hash == pack.hash or not score_files(folder):
            keep_pack(folder, pack)
        else:
            earlier_rows(folder, pack)


def keep_pack(folder: Path, pack: Pack) -> None:
    """Put the pack beside its scores, instead of one without any, or of one all of whose requests it asks too.

    Several machines may do so at the same time: the first one's stays. Raises UserError if there are scores of others.
    """
    target = folder / "pack"
    if not target.exists():
        try:
            with atomic_folder(target) as partial:
                packs.write_files(pack, partial)
            return
        except OSError:
            if not target.exists():
                raise
    kept = packs.load(target)
    if kept.manifest == pack.manifest:
        return
    # Without scores it is of a run that ended before its first checkpoint; other domains or chance levels may stand
    # beside the same requests.
    rows = earlier_rows(folder, pack) if score_files(folder) else {}
    with writing(target, "--out", wait=600), atomic_folder(target, replace=True) as partial:
        packs.write_files(pack, partial)
        if rows:
            columns = {"pack": list(rows), "rows": list(rows.values())}
            pq.write_table(pa.table(columns, schema=_EARLIER), partial / _EARLIER_FILE, compression="zstd")


def earlier_rows(folder: Path, pack: Pack) -> dict[str, np.ndarray]:
    """Hash of each pack that scores in `folder` may be of -> int [its requests]: where `pack`, which asks all of them
    and is beside the scores or to be, asks each; without that of `pack` itself. Raises UserError as `keep_pack`."""
    stat = (folder / "pack" / "manifest.json").stat()
    return _earlier_rows(folder, (stat.st_ino, stat.st_mtime_ns), pack)


@functools.lru_cache(maxsize=4)
def _earlier_rows(folder: Path, stat: tuple[int, int], pack: Pack) -> dict[str, np.ndarray]:
    """`earlier_rows`, of one state of the pack beside the scores."""
    kept = packs.load(folder / "pack")
    found, file = {}, folder / "pack" / _EARLIER_FILE
    if file.is_file():
        with reading(file, "remove the file and score again", "damaged"):
            table = pq.read_table(file, schema=_EARLIER)
            found = dict(zip(table["pack"].to_pylist(), (np.array(rows) for rows in table["rows"].to_pylist())))
    if kept.hash == pack.hash:
        return found
    rows = kept.rows_in(pack)
    if rows is None:
        tasks = ",".join(task["task"] for task in kept.tasks)
        raise UserError(
            f"{folder} holds scores of another request pack ({kept.manifest['suite']}); choose another --out, or ask"
            f" what it holds as well, in the same way ({tasks[:200]})"
        )
    return {name: rows[old] for name, old in found.items()} | {kept.hash: rows}


def read_for(path: Path, pack: Pack) -> Scores:
    """The scores in a file in the order of the pack beside them; NaN where an earlier pack had no such request.

    Raises UserError if they are of another pack.
    """
    scores = read(path)
    if scores.header.key.pack_hash == pack.hash:
        return scores
    rows = earlier_rows(path.parent.parent, pack).get(scores.header.key.pack_hash)
    if rows is None:
        raise UserError(f"{path}: made with another request pack than the one beside it; score this checkpoint again")
    loglikelihood, is_greedy = np.full(pack.requests.num_rows, np.nan), np.zeros(pack.requests.num_rows, bool)
    loglikelihood[rows], is_greedy[rows] = scores.loglikelihood, scores.is_greedy
    return Scores(scores.header, loglikelihood, is_greedy)


def check_unique_names(series: Sequence[Series]) -> None:
    """Raise UserError if the scores of two of these series would lie in one folder."""
    locations: dict[tuple[str, str], str] = {}
    for one in series:
        _check_names(one)
        for checkpoint in one.checkpoints:
            here = checkpoint.remote.url if checkpoint.remote is not None else str(checkpoint.location)
            first = locations.setdefault((one.name, checkpoint.name), here)
            if first != here:
                raise UserError(
                    f"{first} and {here} are both called {one.name}/{checkpoint.name}, and their scores would be one"
                    " file; rename a folder, or score them with an --out each"
                )
    located: dict[str, str] = {}
    for one in series:
        first = located.setdefault(one.name, one.location)
        if first and one.location and first != one.location:
            raise UserError(
                f"{first} and {one.location} are both called {one.name}, and their scores would be one series;"
                " rename a folder, or score them with an --out each"
            )


def _check_names(series: Series) -> None:
    """Raise UserError if no scores are looked for under its name or one of its checkpoints'."""
    wrong = [checkpoint.name for checkpoint in series.checkpoints if checkpoint.name.startswith(".")]
    if series.name in ("", ".", "..", "pack") or "/" in series.name or "\0" in series.name:  # of a series file
        wrong = [series.name]
    if wrong:
        raise UserError(
            f"{series.location or series.name}: no scores can be kept under the name {wrong[0]!r}; rename it"
        )


def check_out(series: Sequence[Series], pack: Pack, out: Path) -> None:
    """Raise UserError if `out` holds scores of another pack, or of another series of the same name."""
    check_pack(out, pack)
    for one in series:
        headers = headers_of(out, one.name)
        scored = {header.location for header in headers} - {""}
        if scored and one.location and one.location not in scored and not _has_moved(one, headers):
            raise UserError(
                f"{out / one.name}: holds the scores of {min(scored)}, and {one.location} is another series of that"
                " name; rename its folder, or choose another --out"
            )


def _has_moved(series: Series, headers: Sequence[Header]) -> bool:
    """Whether the weights of one of its checkpoints are those that were scored elsewhere under its name."""
    scored = {header.checkpoint: header.key.weights_hash for header in headers}
    known = (checkpoint for checkpoint in series.checkpoints if checkpoint.name in scored)
    for checkpoint in known:
        try:
            return weights_hash(checkpoint) == scored[checkpoint.name]
        except (UserError, OSError):
            continue  # damaged: the next one may show it
    return False
