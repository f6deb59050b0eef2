"""Text or token lines in, a prepared data set out.

    prepare_text    JSONL or plain text through a tokenizer into splits train and validation
    prepare_amber   Amber's token lines, one input file per split chunk_000, chunk_001, ...

A preparation is written beside its place and renamed when it is complete, so a killed one leaves nothing that
opens. Running it again clears or continues what is left; running it once more finds it done.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax.data import progress
from fineline_jax.data.documents import Document, TextUnit, input_files, read_documents, read_lines
from fineline_jax.data.storage import (
    WINDOWS_PER_WRITE,
    WindowWriter,
    merge_parts,
    open_data_set,
    write_metadata,
)
from fineline_jax.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from fineline_jax.data.windows import WindowCutter, with_markers
from fineline_jax.errors import UserError

FORMAT = 1  # of the folder; raised when older folders can no longer be read
BATCH_CHARACTERS = 1 << 21  # given to the tokenizer at a time


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished data set."""

    path: Path
    windows: dict[str, int]
    """Windows per split."""
    already_done: bool
    """The folder was there from an earlier, equal preparation; nothing was written."""


def prepare_text(
    inputs: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path,
    sequence_length: int = 2048,
    bos: bool = False,
    eos: bool = True,
    validation_inputs: Sequence[Path] = (),
    validation_fraction: float = 0.0,
    text_key: str = "text",
    text_unit: TextUnit = "file",
    vocab_size: int | None = None,
) -> Prepared:
    """Tokenize documents and pack them into windows of sequence_length + 1 tokens.

    Args:
      inputs: files or folders of .jsonl (one {"text": ...} per line), .json (same) or .txt; also with .gz.
      out: folder to write; it must not exist, be empty, or hold this same preparation.
      tokenizer: folder with tokenizer.json or tokenizer.model, or one of these files.
      sequence_length: tokens the model is fed per window; a stored window has one more.
      bos: put BOS before each document (OpenLLaMA: yes, Amber: no).
      eos: put EOS after each document (OpenLLaMA and Amber: yes).
      validation_inputs: files or folders of the validation split.
      validation_fraction: share of the documents of `inputs` that go to the validation split instead, taken
        evenly (0.01: every hundredth).
      text_key: key of the text in a .jsonl line.
      text_unit: what one document is in a .txt file: the file, a paragraph (blank lines between), or a line.
      vocab_size: ids must be smaller; default: the tokenizer's size.

    Raises UserError, naming file and line where one is at fault.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
    if validation_fraction and validation_inputs:
        raise UserError("validation_inputs and validation_fraction exclude each other; give one")
    _check_sequence_length(sequence_length)
    model = load_tokenizer(tokenizer)
    for wanted, token_id, name in ((bos, model.bos_id, "bos"), (eos, model.eos_id, "eos")):
        if wanted and token_id is None:
            raise UserError(f"{model.path}: the tokenizer has no {name.upper()} token; prepare with {name}=False")
    if not (bos or eos):
        raise UserError("bos=False and eos=False leave nothing between documents; turn one on")
    files = {"train": input_files(inputs)}
    if validation_inputs:
        files["validation"] = input_files(validation_inputs)
    settings = {
        "format": FORMAT,
        "kind": "text",
        "sequence_length": sequence_length,
        "vocab_size": model.vocab_size if vocab_size is None else vocab_size,
        "tokenizer_sha256": model.sha256,
        "bos": bos,
        "eos": eos,
        "bos_id": model.bos_id,
        "eos_id": model.eos_id,
        "text_key": text_key,
        "text_unit": text_unit,
        "validation_fraction": validation_fraction,
    }

    def sources() -> list[dict[str, Any]]:
        return [_source(split, file) for split, group in files.items() for file in group]

    if (done := _already_done(out, settings, sources)) is not None:
        return done

    work = _work_folder(out)
    shutil.rmtree(work, ignore_errors=True)
    total_bytes = sum(file.stat().st_size for group in files.values() for file in group)
    try:
        with progress.bar(f"prepare {out.name}", total_bytes, "bytes") as advance:
            counts = _write_text(work, files, model, settings, advance)
        _finish(work, out, {**settings, "sources": sources(), "splits": counts}, model)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Prepared(out, {split: count["windows"] for split, count in counts.items()}, already_done=False)


def prepare_amber(
    inputs: Sequence[Path],
    out: Path,
    *,
    vocab_size: int = 32_000,
    sequence_length: int = 2048,
    tokenizer: Path | None = None,
    validation_inputs: Sequence[Path] = (),
    processes: int = 1,
) -> Prepared:
    """Convert Amber's token lines, {"token_ids": [2049 ints], "source": ...}, one chunk per file.

    The i-th file becomes split chunk_<i>, its lines in order. Chunks finished before an interruption are kept
    and not converted again.

    Args:
      inputs: the chunk files (.jsonl, also .gz) in training order, or a folder of them (sorted by name).
      out: folder to write; it must not exist, be empty, or hold this same preparation.
      vocab_size: token ids must be smaller. 32,000: the Llama tokenizer's (LLM360/Amber).
      sequence_length: a line must have one token more. 2048: LLM360/AmberDatasets.
      tokenizer: tokenizer to copy beside the windows, for scoring; no text is tokenized.
      validation_inputs: token lines of the validation split.
      processes: chunks converted at a time.

    Raises UserError naming file and line of a malformed line, or the file that is out of order.
    """
    _check_sequence_length(sequence_length)
    model = None if tokenizer is None else load_tokenizer(tokenizer)
    if model is not None and model.vocab_size > vocab_size:
        raise UserError(f"{model.path}: {model.vocab_size} tokens do not fit vocab_size={vocab_size}; give its own")
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1")
    chunks = input_files(inputs, (".jsonl", ".json"))
    _check_ascending(chunks)
    files = [(f"chunk_{index:03d}", [file]) for index, file in enumerate(chunks)]
    if validation_inputs:
        files.append(("validation", input_files(validation_inputs, (".jsonl", ".json"))))
    settings = {
        "format": FORMAT,
        "kind": "amber",
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "tokenizer_sha256": None if model is None else model.sha256,
        "bos": False,
        "eos": True,
        "bos_id": None if model is None else model.bos_id,
        "eos_id": None if model is None else model.eos_id,
    }

    def sources() -> list[dict[str, Any]]:
        return [_source(split, file) for split, group in files for file in group]

    if (done := _already_done(out, settings, sources)) is not None:
        return done

    work = _work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(work / "parts" / split, split, group, sequence_length, vocab_size) for split, group in files]
    if processes == 1:
        total_bytes = sum(file.stat().st_size for _, group in files for file in group)
        with progress.bar(f"prepare {out.name}", total_bytes, "bytes") as advance:
            parts = [_amber_part(*job, advance) for job in jobs]
    else:
        # Spawned: forking a process that runs JAX's threads can hang.
        context = multiprocessing.get_context("spawn")
        with (
            progress.bar(f"prepare {out.name}", len(jobs), "chunks") as advance,
            ProcessPoolExecutor(processes, mp_context=context) as pool,
        ):
            parts = []
            for part in pool.map(_amber_part, *zip(*jobs, strict=True)):
                parts.append(part)
                advance(1)
    folder = work / "merged"
    merge_parts([job[0] for job in jobs], folder)
    converted = [source for part in parts for source in part["sources"]]
    counts = {split: part["counts"] for (split, _), part in zip(files, parts, strict=True)}
    _finish(folder, out, {**settings, "sources": converted, "splits": counts}, model)
    shutil.rmtree(work)
    return Prepared(out, {split: count["windows"] for split, count in counts.items()}, already_done=False)


def _write_text(
    work: Path,
    files: dict[str, list[Path]],
    model: Tokenizer,
    settings: dict[str, Any],
    advance: Callable[[int], None],
) -> dict[str, dict[str, int]]:
    """Write every split; returns documents, tokens, windows and dropped tokens of each."""
    fraction, vocab_size = settings["validation_fraction"], settings["vocab_size"]
    bos_id = model.bos_id if settings["bos"] else None
    eos_id = model.eos_id if settings["eos"] else None
    splits = [*files] if not fraction else ["train", "validation"]
    window_tokens = settings["sequence_length"] + 1
    writer = WindowWriter(work, splits, window_tokens=window_tokens, vocab_size=vocab_size)
    cutters = {split: WindowCutter(window_tokens) for split in splits}
    documents = dict.fromkeys(splits, 0)

    def split_of(given: str, index: int) -> str:
        held_out = int((index + 1) * fraction) > int(index * fraction)
        return "validation" if given == "train" and held_out else given

    def all_documents() -> Iterator[tuple[str, Document]]:
        for given, group in files.items():
            index = 0
            for file in group:
                reading = read_documents(
                    file, text_key=settings["text_key"], text_unit=settings["text_unit"], progress=advance
                )
                for document in reading:
                    yield split_of(given, index), document
                    index += 1

    for batch in _batches_by_length(all_documents()):
        runs: dict[str, list[np.ndarray]] = {split: [] for split in splits}
        encoded = model.encode([document.text for _, document in batch])
        for (split, document), ids in zip(batch, encoded, strict=True):
            run = with_markers(ids, bos_id, eos_id)
            if run.max() >= vocab_size:
                raise UserError(
                    f"{document.place}: token id {run.max()} is outside the vocabulary of {vocab_size}; "
                    "give a larger vocab_size or the tokenizer that belongs to the model"
                )
            runs[split].append(run)
            documents[split] += 1
        for split in splits:
            writer.add(split, cutters[split].cut(runs[split]))
    for split in splits:
        if not writer.windows[split]:
            raise UserError(
                f"split {split}: {documents[split]} documents with {cutters[split].tokens} tokens in all do not "
                f"fill one window of {window_tokens}; give more text, a shorter sequence_length"
                + (", a larger validation_fraction or validation_inputs" if split == "validation" else "")
            )
    writer.close()
    return {
        split: {
            "documents": documents[split],
            "tokens": cutters[split].tokens,
            "windows": writer.windows[split],
            "dropped_tokens": cutters[split].dropped,
        }
        for split in splits
    }


def _batches_by_length(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Runs of documents with about BATCH_CHARACTERS characters, so that the tokenizer's threads have work."""
    batch: list[tuple[str, Document]] = []
    characters = 0
    for item in documents:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _amber_part(
    part: Path,
    split: str,
    files: Sequence[Path],
    sequence_length: int,
    vocab_size: int,
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Convert one split into the folder `part`, unless it is there; returns its sources and counts."""
    wanted = {"window": [sequence_length, vocab_size], "sources": [_source(split, file) for file in files]}
    summary = part / "part.json"
    if summary.is_file():
        finished = json.loads(summary.read_bytes())
        if finished["wanted"] == wanted:
            advance(sum(source["bytes"] for source in wanted["sources"]))
            return {**wanted, "counts": finished["counts"]}
        shutil.rmtree(part)
    work = part.with_name(f"{part.name}.incomplete")
    shutil.rmtree(work, ignore_errors=True)
    writer = WindowWriter(work, [split], window_tokens=sequence_length + 1, vocab_size=vocab_size)
    batch: list[np.ndarray] = []
    for file in files:
        for number, line in read_lines(file, advance):
            batch.append(_amber_window(line, f"{file}:{number}", sequence_length + 1, vocab_size))
            if len(batch) == WINDOWS_PER_WRITE:
                writer.add(split, np.stack(batch))
                batch = []
    if batch:
        writer.add(split, np.stack(batch))
    if not writer.windows[split]:
        raise UserError(f"{files[0]}: no lines; give a file of token lines")
    writer.close()
    windows = writer.windows[split]
    counts = {"windows": windows, "tokens": windows * (sequence_length + 1), "dropped_tokens": 0}
    (work / "part.json").write_text(json.dumps({"wanted": wanted, "counts": counts}))
    work.rename(part)
    return {**wanted, "counts": counts}


def _amber_window(line: bytes, place: str, window_tokens: int, vocab_size: int) -> np.ndarray:
    """The ids of one line, int32 [window_tokens]."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); mend or remove the line") from error
    ids = record.get("token_ids") if isinstance(record, dict) else None
    if not isinstance(ids, list):
        raise UserError(f"{place}: no list under the key 'token_ids'; mend or remove the line")
    if len(ids) != window_tokens:
        raise UserError(
            f"{place}: {len(ids)} token ids instead of {window_tokens} (sequence_length + 1); mend or remove the line"
        )
    if set(map(type, ids)) != {int}:
        raise UserError(f"{place}: a token id is not an integer; mend or remove the line")
    try:
        window = np.array(ids, np.int32)
    except OverflowError:
        window = None
    if window is None or window.min() < 0 or window.max() >= vocab_size:
        bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise UserError(
            f"{place}: token id {bad} is outside the vocabulary of {vocab_size}; mend the line or give the vocab_size "
            "of the tokenizer that made it"
        )
    return window


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise UserError(f"sequence_length={sequence_length} must be at least 1")


def _check_ascending(files: Sequence[Path]) -> None:
    """A shell sorts train_10.jsonl before train_2.jsonl; chunk order is training order, so refuse that."""
    numbers = [[int(digits) for digits in re.findall(r"\d+", file.name)] for file in files]
    frames = {re.sub(r"\d+", "", file.name) for file in files}
    if len(frames) > 1:  # not a numbered series
        return
    for before, after, file, following in zip(numbers, numbers[1:], files, files[1:], strict=False):
        if after < before:
            raise UserError(
                f"{following} comes after {file}; chunks are trained on in the order given, so name them in ascending "
                "order (`ls -v` sorts numbers that way)"
            )


def _source(split: str, file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"split": split, "name": file.name, "bytes": file.stat().st_size, "sha256": sha256}


def _work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.incomplete"


def _already_done(out: Path, settings: dict[str, Any], sources: Callable[[], list[dict[str, Any]]]) -> Prepared | None:
    """The finished data set in `out` if it was prepared from the same; None if `out` is free; else UserError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "metadata.json").is_file():
        raise UserError(f"{out}: exists and is not empty; name another folder or remove it")
    existing = open_data_set(out)
    different = next((key for key, value in settings.items() if existing.metadata.get(key) != value), None)
    if different is None and existing.metadata.get("sources") != sources():
        different = "input"
    if different is not None:
        raise UserError(f"{out}: holds a data set of another {different}; name another folder or remove it")
    shutil.rmtree(_work_folder(out), ignore_errors=True)  # left if it was killed just after its last rename
    return Prepared(out, existing.splits, already_done=True)


def _finish(folder: Path, out: Path, metadata: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Complete `folder` and give it its name in one rename."""
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / "tokenizer")
    write_metadata(folder, metadata)
    if out.exists():
        out.rmdir()  # empty, or _already_done would have refused it
    folder.rename(out)
