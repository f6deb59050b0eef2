"""Text or token lines in, a prepared data set out.

    prepare_text    JSONL or plain text through a tokenizer into splits train and validation
    prepare_amber   Amber's token lines, one input file per split chunk_000, chunk_001, ...

A preparation is written in shards (`data.shards`) beside its destination, and renamed when it is complete, so a killed
one leaves nothing that opens. Running it again keeps the finished shards; a finished one is left as it is.
"""

import dataclasses
import multiprocessing
import re
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from fineline_jax import progress
from fineline_jax.atomic_files import address_of, local_folder, put_in_place, unsealed, write_sealed
from fineline_jax.checkpoints.remote.staging import staged_data
from fineline_jax.data.documents import TextUnit, input_files, suffix_of
from fineline_jax.data.shards import Shard, Written, inputs_of, source_of, write_shard
from fineline_jax.data.storage import merge_shards, open_data_set, write_metadata
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.tokenizers.files import copy_tokenizer
from fineline_jax.tokenizers.identity import identity, vocabulary_size
from fineline_jax.tokenizers.open import open_tokenizer

TOKEN_LINES = (".jsonl", ".json")
FORMAT = 3  # of the folder; raised when older folders can no longer be read


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
    skip_bad_lines: float = 0.0,
    vocab_size: int | None = None,
    beam_options: str | None = None,
) -> Prepared:
    """Tokenize documents and pack them into windows of sequence_length + 1 tokens.

    Without Beam the documents of all inputs are one stream, in order, whose last incomplete window is dropped.
    With Beam every input file is such a stream of its own: other windows than without, and a rest dropped per
    file (counted in metadata.json, which also says "packing": "file"). They do not depend on runner and workers.

    Args:
      inputs: files or folders of .jsonl (one {"text": ...} per line), .json (same), .parquet or .txt; also with .gz
        or .zst (but .parquet).
      out: folder to write, also gs://… or s3://… (`checkpoints.remote.staging`); it must not exist, be empty, or hold
        this same preparation.
      tokenizer: folder with tokenizer.json or tokenizer.model, or one of these files.
      sequence_length: tokens the model is fed per window; a stored window has one more.
      bos: put BOS before each document (OpenLLaMA: yes, Amber: no).
      eos: put EOS after each document (OpenLLaMA and Amber: yes).
      validation_inputs: files or folders of the validation split.
      validation_fraction: share of the documents of `inputs` that go to the validation split instead, taken
        evenly (0.01: every hundredth; with Beam, of each file).
      text_key: key of the text in a .jsonl line, column in a .parquet file.
      text_unit: what one document is in a .txt file: the file, a paragraph (blank lines between), or a line.
      skip_bad_lines: largest share of lines (rows) without a text that may be left out; they are counted in
        metadata.json, and the first ten are named in the log. 0: the first one is an error.
      vocab_size: ids must be smaller; default: the tokenizer's size.
      beam_options: options of an Apache Beam pipeline that writes one input file per work item (`data.beam`).

    Raises UserError, naming file and line where one is at fault.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
    if not 0 <= skip_bad_lines < 1:
        raise UserError(f"skip_bad_lines={skip_bad_lines} must be at least 0 and below 1; it is a share of the lines")
    if validation_fraction and validation_inputs:
        raise UserError("validation_inputs and validation_fraction exclude each other; give one")
    _check_sequence_length(sequence_length)
    model = open_tokenizer(tokenizer)
    for wanted, token_id, name in ((bos, model.bos_token_id, "bos"), (eos, model.eos_token_id, "eos")):
        if wanted and token_id is None:
            raise UserError(
                f"{tokenizer}: the tokenizer has no {name.upper()} token; name one in its special_tokens_map.json, or"
                f" prepare with {name}=False"
            )
    if not (bos or eos):
        raise UserError("bos=False and eos=False leave nothing between documents; turn one on")
    files = [("train", file) for file in input_files(inputs)]
    whole_files = text_unit == "file" and all(suffix_of(file) == ".txt" for _, file in files)
    if beam_options is not None and validation_fraction and whole_files:
        raise UserError(
            f"validation_fraction={validation_fraction} with Beam is taken of each file, and each of these is one "
            "document; give validation_inputs"
        )
    files += [("validation", file) for file in (input_files(validation_inputs) if validation_inputs else [])]
    settings = {
        "format": FORMAT,
        "kind": "text",
        "packing": "stream" if beam_options is None else "file",
        "sequence_length": sequence_length,
        "vocab_size": vocabulary_size(model) if vocab_size is None else vocab_size,
        "tokenizer_hash": identity(model).tokenizer_hash,
        "bos": bos,
        "eos": eos,
        "bos_id": model.bos_token_id,
        "eos_id": model.eos_token_id,
        "text_key": text_key,
        "text_unit": text_unit,
        "validation_fraction": validation_fraction,
        "skip_bad_lines": skip_bad_lines,
    }
    streams = [files] if beam_options is None else [[file] for file in files]
    folder = _work_folder(local_folder(out)) / "shards"
    shards = [Shard(folder / f"{i:06d}", tuple(stream), settings, tokenizer) for i, stream in enumerate(streams)]
    return _prepare(out, shards, settings, tokenizer, beam_options=beam_options)


def prepare_amber(
    inputs: Sequence[Path],
    out: Path,
    *,
    vocab_size: int = 32_000,
    sequence_length: int = 2048,
    tokenizer: Path | None = None,
    validation_inputs: Sequence[Path] = (),
    processes: int = 1,
    beam_options: str | None = None,
) -> Prepared:
    """Convert Amber's token lines, {"token_ids": [2049 ints], "source": ...}, one chunk per file.

    The i-th file becomes split chunk_<i>, its lines in order. Chunks finished before an interruption are kept
    and not converted again.

    Args:
      inputs: the chunk files (.jsonl, also .gz or .zst) in training order, or a folder of them (sorted by name).
      out: folder to write, as of `prepare_text`.
      vocab_size: token ids must be smaller. 32,000: the Llama tokenizer's (LLM360/Amber).
      sequence_length: a line must have one token more. 2048: LLM360/AmberDatasets.
      tokenizer: tokenizer to copy beside the windows, for scoring; no text is tokenized.
      validation_inputs: token lines of the validation split.
      processes: chunks converted at a time.
      beam_options: options of an Apache Beam pipeline that converts one chunk per work item (`data.beam`), instead
        of processes. The data set is the same.

    Raises UserError naming file and line of a malformed line, or the file that is out of order.
    """
    _check_sequence_length(sequence_length)
    model = None if tokenizer is None else open_tokenizer(tokenizer)
    if model is not None and (size := vocabulary_size(model)) > vocab_size:
        raise UserError(f"{tokenizer}: {size} tokens do not fit vocab_size={vocab_size}; give its own")
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1")
    if processes > 1 and beam_options is not None:
        raise UserError("--processes and --beam-options exclude each other; Beam's own options say how many workers")
    chunks = input_files(inputs, TOKEN_LINES)
    _check_ascending(chunks)
    splits = [(f"chunk_{index:03d}", [file]) for index, file in enumerate(chunks)]
    if validation_inputs:
        splits.append(("validation", input_files(validation_inputs, TOKEN_LINES)))
    settings = {
        "format": FORMAT,
        "kind": "amber",
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "tokenizer_hash": None if model is None else identity(model).tokenizer_hash,
        "bos": False,
        "eos": True,
        "bos_id": None if model is None else model.bos_token_id,
        "eos_id": None if model is None else model.eos_token_id,
    }
    needed = {name: settings[name] for name in ("format", "kind", "sequence_length", "vocab_size")}
    folder = _work_folder(local_folder(out)) / "shards"
    shards = [Shard(folder / split, tuple((split, file) for file in group), needed) for split, group in splits]
    return _prepare(out, shards, settings, tokenizer, processes=processes, beam_options=beam_options)


def _prepare(
    place: Path, shards: list[Shard], settings: dict[str, Any], tokenizer: Path | None, **how: Any
) -> Prepared:
    """The data set in the folder, or at the address, `place`; as it is if it is there. how: options of `_write_all`."""
    out = local_folder(place)
    with writing(out, "--out"), staged_data(place) as at_address:
        done = at_address and _already_done(at_address, address_of(place), settings, shards)
        done = done or _already_done(out, out, settings, shards)
        windows = done or _write_and_merge(out, shards, settings, tokenizer, **how)
        shutil.rmtree(_work_folder(out), ignore_errors=True)  # left if it was killed just after its last rename
    return Prepared(place, windows, already_done=done is not None)


def _write_and_merge(
    out: Path, shards: list[Shard], settings: dict[str, Any], tokenizer: Path | None, **how: Any
) -> dict[str, int]:
    """Write the shards, merge them in their order, and give the result its name in one rename; windows per split."""
    work = _work_folder(out)
    plan = work / "merging.json"
    # Merging moves record files out of the shards; what another merge has moved cannot be identified afterwards.
    if plan.exists() and not _is_of(plan, [inputs_of(shard) for shard in shards]):
        shutil.rmtree(work)
    (work / "shards").mkdir(parents=True, exist_ok=True)
    for left_over in (work / "shards").glob("*.incomplete"):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        written = _write_all(shards, out.name, **how)
    except BaseException:
        if not any((shard.folder / "shard.json").exists() for shard in shards):  # nothing to continue from
            shutil.rmtree(work, ignore_errors=True)
        raise
    counts = _total([shard.counts for shard in written])
    sources = [source for shard in written for source in shard.sources]
    for split, count in counts.items():
        if not count["windows"]:
            shutil.rmtree(work)
            remedies = ["give more text", "a shorter --sequence-length"]
            if split == "validation":
                remedies += ["a larger --validation-fraction", "--validation-inputs"]
            if settings.get("text_unit") == "file" and any(
                suffix_of(Path(source["name"])) == ".txt" for source in sources
            ):
                remedies.append("--text-unit paragraph or line (now a .txt file is one document)")
            raise UserError(
                f"{out}: split {split} has {count['documents']} documents with {count['tokens']} tokens in all, less "
                f"than one window of {settings['sequence_length'] + 1}; {', '.join(remedies[:-1])} or {remedies[-1]}"
            )
    facts = [{"settings": shard.settings, "sources": of.sources} for shard, of in zip(shards, written)]
    write_sealed(plan, {"merging": facts})
    merged = work / "merged"
    merge_shards([shard.folder for shard in shards], merged)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, merged / "tokenizer")
    write_metadata(merged, {**settings, "sources": sources, "splits": counts})
    if out.exists():
        out.rmdir()  # empty, or _already_done would have refused it
    put_in_place(merged, out)
    return {split: count["windows"] for split, count in counts.items()}


def _write_all(shards: list[Shard], name: str, processes: int = 1, beam_options: str | None = None) -> list[Written]:
    """Write the shards here, in a pool of processes, or by Beam."""
    title = f"prepare {name}"
    if beam_options is not None:
        from fineline_jax.data.beam import write_shards  # only with the extra

        with progress.bar(title, len(shards), "files") as advance:
            return write_shards(shards, beam_options, advance)
    if processes == 1:
        total_bytes = sum(file.stat().st_size for shard in shards for _, file in shard.files)
        with progress.bar(title, total_bytes, "bytes") as advance:
            return [write_shard(shard, advance) for shard in shards]
    # Spawned: forking a process that runs JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    with (
        progress.bar(title, len(shards), "chunks") as advance,
        # Ctrl-C reaches the whole process group; only this process answers it.
        ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool,
    ):
        written = []
        try:
            for shard in pool.map(write_shard, shards):
                written.append(shard)
                advance(1)
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():  # else a chunk under way would be waited for
                child.terminate()
            raise
        except BrokenProcessPool as error:
            raise UserError(
                f"--processes {processes}: one was killed, most likely for lack of memory; run again with fewer, "
                "finished chunks are kept"
            ) from error
        return written


def _is_of(plan: Path, inputs: list[dict[str, Any]]) -> bool:
    try:
        return unsealed(plan.read_bytes()) == {"merging": inputs}
    except ValueError:  # damaged: begin again
        return False


def _total(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Counts per split, added up."""
    totals: dict[str, dict[str, int]] = {}
    for shard in counts:
        for split, count in shard.items():
            total = totals.setdefault(split, dict.fromkeys(count, 0))
            for name, number in count.items():
                total[name] += number
    return totals


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


def refuse_occupied(out: Path) -> None:
    """Raise UserError if `out` holds something else than a data set."""
    occupied = any(out.iterdir()) if out.is_dir() else out.exists()
    if occupied and not (out / "metadata.json").is_file():
        raise UserError(f"{out}: exists and is not empty; name another folder or remove it")


def _work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.incomplete"


def _already_done(
    out: Path, name: Path | str | None, settings: dict[str, Any], shards: Sequence[Shard]
) -> dict[str, int] | None:
    """Windows per split of the finished data set in `out`, called `name`, if it was prepared from the same; None if
    `out` is free; else UserError."""
    refuse_occupied(out)
    if not (out / "metadata.json").is_file():
        return None
    existing = open_data_set(out)
    different = next((key for key, value in settings.items() if existing.metadata.get(key) != value), None)
    sources = (source_of(split, file) for shard in shards for split, file in shard.files)
    if different is None and existing.metadata.get("sources") != list(sources):
        different = "input"
    if different is not None:
        raise UserError(f"{name}: holds a data set of another {different}; name another folder or remove it")
    return existing.splits
