"""A shard of a data set: the windows of some input files in a folder of their own.

A shard is written by whichever process is given it, on the machine of the command or on another that shares its
folders, and only once: what is finished and whose inputs are unchanged is left alone. Together, in their order,
the shards are the data set (`storage.merge_shards`).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax.atomic_files import put_in_place, sealed, unsealed
from fineline_jax.data.documents import Document, read_documents, read_lines
from fineline_jax.data.storage import WINDOWS_PER_WRITE, WindowWriter
from fineline_jax.data.windows import WindowCutter, with_markers
from fineline_jax.errors import UserError
from fineline_jax.tokenizers.identity import identity
from fineline_jax.tokenizers.open import open_tokenizer
from fineline_jax.tokenizers.words import Encoder, word_encoder

NAMED_LINES = 10
"""Of the lines left out."""
EARLY = 100_000
"""Lines after which too large a share of bad ones ends the preparation at once."""
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What to write and where; small, and can be sent to another process."""

    folder: Path
    files: tuple[tuple[str, Path], ...]
    """(split, input file), in order. Packing runs on from file to file of a split and ends with the shard."""
    settings: dict[str, Any]
    """What the windows depend on besides the files: "kind" ("text" or "amber") and its settings."""
    tokenizer: Path | None = None
    """Folder or file of the tokenizer for text."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of a shard."""

    sources: list[dict[str, Any]]
    """split, name, bytes and sha256 of each input file."""
    counts: dict[str, dict[str, int]]
    """Per split: windows, tokens, dropped_tokens, and documents of text."""


def write_shard(shard: Shard, advance: Callable[[int], None] = lambda size: None) -> Written:
    """Write the shard unless it is there. `advance` is called with the bytes of input read since the last call.

    Any number of processes may be at the same shard (some Beam runners start an item twice): each writes a folder
    of its own, and the first to finish gives it the shard's name. Raises UserError naming file and line of bad
    input, and leaves nothing then.
    """
    wanted = inputs_of(shard)
    if (counts := _finished(shard.folder, wanted)) is not None:
        advance(sum(source["bytes"] for source in wanted["sources"]))
        return Written(wanted["sources"], counts)
    work = shard.folder.with_name(f"{shard.folder.name}.{uuid.uuid4().hex}.incomplete")
    write = {"text": _write_text, "amber": _write_amber}[shard.settings["kind"]]
    try:
        counts = write(shard, work, advance)
        (work / "shard.json").write_text(json.dumps(sealed({"wanted": wanted, "counts": counts})))
        if shard.folder.exists() and _finished(shard.folder, wanted) is None:
            shutil.rmtree(shard.folder)  # written from other input
        try:
            put_in_place(work, shard.folder)
        except OSError:  # it is there by now: a folder is not renamed onto one with files
            if _finished(shard.folder, wanted) is None:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Written(wanted["sources"], counts)


def inputs_of(shard: Shard) -> dict[str, Any]:
    """Settings and input of a shard, to be compared with those it was written from."""
    return {"settings": shard.settings, "sources": [source_of(split, file) for split, file in shard.files]}


def source_of(split: str, file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"split": split, "name": file.name, "bytes": file.stat().st_size, "sha256": sha256}


def _finished(folder: Path, wanted: dict[str, Any]) -> dict[str, dict[str, int]] | None:
    """The counts of the shard in `folder` if it was written from the same."""
    try:
        written = unsealed((folder / "shard.json").read_bytes())
    except (FileNotFoundError, ValueError):  # none, or damaged: it is written again
        return None
    return written["counts"] if written["wanted"] == wanted else None


def _write_text(shard: Shard, folder: Path, advance: Callable[[int], None]) -> dict[str, dict[str, int]]:
    """Tokenize and pack the documents of the shard's files; returns the counts of each split."""
    settings = shard.settings
    assert shard.tokenizer is not None
    model, encoded = _tokenizer(shard.tokenizer, settings["tokenizer_hash"])
    fraction, vocab_size = settings["validation_fraction"], settings["vocab_size"]
    bos_id = model.bos_token_id if settings["bos"] else None
    eos_id = model.eos_token_id if settings["eos"] else None
    given_splits = list(dict.fromkeys(split for split, _ in shard.files))
    splits = ["train", "validation"] if fraction else given_splits
    window_tokens = settings["sequence_length"] + 1
    writer = WindowWriter(folder, splits, window_tokens=window_tokens, vocab_size=vocab_size)
    cutters = {split: WindowCutter(window_tokens) for split in splits}
    documents, skipped = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)

    def split_of(given: str, index: int) -> str:
        held_out = int((index + 1) * fraction) > int(index * fraction)
        return "validation" if given == "train" and held_out else given

    bad = _BadLines(settings["skip_bad_lines"])

    def all_documents() -> Iterator[tuple[tuple[str, Document], Iterator[str]]]:
        index = dict.fromkeys(given_splits, 0)
        for given, file in shard.files:
            reading = read_documents(
                file,
                text_key=settings["text_key"],
                text_unit=settings["text_unit"],
                progress=advance,
                skip=bad.note if bad.share else None,
                count=bad.count,
            )
            for document in reading:
                yield (split_of(given, index[given]), document), itertools.chain([document.text], document.more)
                index[given] += 1
            skipped[given] += bad.taken()
        bad.end()

    for batch in encoded(all_documents()):
        runs: dict[str, list[np.ndarray]] = {split: [] for split in splits}
        for (split, document), ids, is_first, is_last in batch:
            run = with_markers(ids, bos_id if is_first else None, eos_id if is_last else None)
            if run.max(initial=0) >= vocab_size:
                raise UserError(
                    f"{document.location}: token id {run.max()} is outside the vocabulary of {vocab_size}; "
                    "give a larger vocab_size or the tokenizer that belongs to the model"
                )
            runs[split].append(run)
            documents[split] += is_last
        for split in splits:
            writer.add(split, cutters[split].cut(runs[split]))
    writer.close()
    return {
        split: {
            "documents": documents[split],
            "tokens": cutters[split].tokens,
            "windows": writer.windows[split],
            "dropped_tokens": cutters[split].dropped,
            **({"skipped_lines": skipped[split]} if bad.share else {}),
        }
        for split in splits
    }


class _BadLines:
    """Counts the lines of a shard that are left out, and refuses more than a share of all."""

    def __init__(self, share: float):
        self.share, self.lines, self.skipped = share, 0, 0
        self._named: list[str] = []
        self._untaken = 0

    def count(self) -> None:
        self.lines += 1

    def note(self, error: UserError) -> None:
        self.skipped += 1
        self._untaken += 1
        if len(self._named) < NAMED_LINES:
            self._named.append(str(error).partition(";")[0])
        if self.lines >= EARLY:  # so far: a corpus that is of another kind ends here and not after hours
            self._check()

    def taken(self) -> int:
        """Lines left out since the last call."""
        untaken, self._untaken = self._untaken, 0
        return untaken

    def end(self) -> None:
        self._check()
        if self.skipped:
            more = "; …" if self.skipped > len(self._named) else ""
            _LOG.warning("left out %d of %d lines: %s%s", self.skipped, self.lines, "; ".join(self._named), more)

    def _check(self) -> None:
        if self.skipped > self.share * self.lines:
            raise UserError(
                f"{self.skipped} of {self.lines} lines have no text, more than --skip-bad-lines {self.share:g}:"
                f" {'; '.join(self._named)}; fix them, or give a larger share"
            )


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, tokenizer_hash: str) -> tuple[Any, Encoder]:
    """A tokenizer and its `word_encoder`, once for all the shards that a process writes."""
    model = open_tokenizer(path)
    if identity(model).tokenizer_hash != tokenizer_hash:
        raise UserError(f"{path}: not the tokenizer that the preparation began with; restore it and run again")
    return model, word_encoder(model)


def _write_amber(shard: Shard, folder: Path, advance: Callable[[int], None]) -> dict[str, dict[str, int]]:
    """Convert the shard's token lines, all of one split; returns its counts."""
    sequence_length, vocab_size = shard.settings["sequence_length"], shard.settings["vocab_size"]
    split = shard.files[0][0]
    writer = WindowWriter(folder, [split], window_tokens=sequence_length + 1, vocab_size=vocab_size)
    batch: list[np.ndarray] = []
    for _, file in shard.files:
        for number, line in read_lines(file, advance):
            batch.append(_amber_window(line, f"{file}:{number}", sequence_length + 1, vocab_size))
            if len(batch) == WINDOWS_PER_WRITE:
                writer.add(split, np.stack(batch))
                batch = []
    if batch:
        writer.add(split, np.stack(batch))
    if not writer.windows[split]:
        raise UserError(f"{shard.files[0][1]}: no lines; give a file of token lines")
    writer.close()
    windows = writer.windows[split]
    return {split: {"windows": windows, "tokens": windows * (sequence_length + 1), "dropped_tokens": 0}}


def _amber_window(line: bytes, location: str, window_tokens: int, vocab_size: int) -> np.ndarray:
    """The ids of one line, int32 [window_tokens]."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # brackets within brackets without end
        raise UserError(f"{location}: not JSON ({error}); fix or remove the line") from error
    ids = record.get("token_ids") if isinstance(record, dict) else None
    if not isinstance(ids, list):
        raise UserError(f"{location}: no list under the key 'token_ids'; fix or remove the line")
    if len(ids) != window_tokens:
        raise UserError(
            f"{location}: {len(ids)} token ids instead of {window_tokens} (sequence_length + 1); fix or remove the line"
        )
    if set(map(type, ids)) != {int}:
        raise UserError(f"{location}: a token id is not an integer; fix or remove the line")
    try:
        window = np.array(ids, np.int32)
    except OverflowError:
        window = None
    if window is None or window.min() < 0 or window.max() >= vocab_size:
        bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise UserError(
            f"{location}: token id {bad} is outside the vocabulary of {vocab_size}; fix the line or give the vocab_size"
            " of the tokenizer that made it"
        )
    return window
