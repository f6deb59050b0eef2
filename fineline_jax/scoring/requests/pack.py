"""The request pack: every request of a suite, tokenised once, in one folder.

    manifest.json        suite, mode, tasks, groups, tokenizer, BOS policy, counts, hash; the digest of itself
    contexts.parquet     one row per distinct context: context, text, tokens
    requests.parquet     one row per request: request, task, doc, choice, context (row above; -1 for rolling), text,
                         tokens (of the continuation)
    documents.parquet    one row per document: gold, lengths of the choices, its requests, the document itself

Tokens are not cut to a model's context: that is done when a model is known. Nothing here needs JAX or lm-eval;
`build.prepare` makes a pack.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fineline_jax.atomic_files import atomic_folder, sealed, unsealed
from fineline_jax.errors import UserError

FORMAT = 4
_NAME = pa.dictionary(pa.int32(), pa.string())
_INTS = pa.list_(pa.int32())
SCHEMAS = {
    "contexts": pa.schema(
        [("context", pa.int32()), ("text", pa.large_string()), ("tokens", pa.large_list(pa.int32()))]
    ),
    "requests": pa.schema(
        [
            ("request", pa.int32()),
            ("task", _NAME),
            ("doc", pa.int32()),
            ("choice", pa.int32()),
            ("context", pa.int32()),
            ("text", pa.large_string()),
            ("tokens", pa.large_list(pa.int32())),
        ]
    ),
    "documents": pa.schema(
        [
            ("task", _NAME),
            ("doc", pa.int32()),
            ("first_request", pa.int32()),
            ("requests", pa.int32()),
            ("gold", _INTS),
            ("choice_chars", _INTS),
            ("choice_bytes", _INTS),
            ("choice_tokens", _INTS),
            ("words", pa.int64()),
            ("bytes", pa.int64()),
            ("target", pa.large_string()),
            ("content", pa.large_string()),
            ("doc_hash", pa.string()),
            ("prompt_hash", pa.string()),
            ("target_hash", pa.string()),
        ]
    ),
}


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different length in one array."""

    values: np.ndarray
    offsets: np.ndarray
    """int64 [rows + 1]"""

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class RequestTokens:
    """The tokens of all requests: what an engine reads of a pack."""

    contexts: Ragged
    """int32 tokens of each distinct context; the last row is the prefix token, which texts scored as a whole follow"""
    continuations: Ragged
    """int32 tokens of each request; of a text scored as a whole (loglikelihood_rolling) all of them"""
    context_row: np.ndarray
    """int [requests]: the row of `contexts`"""
    task: np.ndarray
    """int [requests]: requests of different tasks share no prefix"""

    def __len__(self) -> int:
        return len(self.continuations)

    @property
    def is_rolling(self) -> np.ndarray:
        """bool [requests]: texts that are scored as a whole."""
        return self.context_row == len(self.contexts) - 1

    @property
    def largest_token(self) -> int:
        """The largest token that is read or scored; 0 where there is none."""
        contexts = self.contexts.values if self.is_rolling.any() else self.contexts.values[:-1]
        tokens = (contexts, self.continuations.values)
        return max((int(part.max()) for part in tokens if len(part)), default=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Pack:
    """A pack in memory; two are the same if their hashes are."""

    manifest: dict[str, Any]
    contexts: pa.Table
    requests: pa.Table
    documents: pa.Table

    @property
    def hash(self) -> str:
        """Of what is asked and of what the metrics need; not of domains, chance levels or versions of libraries."""
        return self.manifest["hash"]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        return self.manifest["tasks"]

    @functools.cached_property
    def context_tokens(self) -> Ragged:
        """Per row of contexts."""
        return ragged(self.contexts["tokens"])

    @functools.cached_property
    def continuation_tokens(self) -> Ragged:
        """Per request; for loglikelihood_rolling the whole text."""
        return ragged(self.requests["tokens"])

    @functools.cached_property
    def request_context(self) -> np.ndarray:
        """int32 [requests]: the row of contexts, -1 for loglikelihood_rolling."""
        return self.requests["context"].to_numpy()

    @functools.cached_property
    def request_tasks(self) -> pa.DictionaryArray:
        """The task of each request; its indices are those of `request_tokens`."""
        tasks = self.requests["task"].combine_chunks()
        return tasks if isinstance(tasks, pa.DictionaryArray) else tasks.dictionary_encode()

    @functools.cached_property
    def request_keys(self) -> list[bytes]:
        """Per request a digest of its task, document and choice, and of what is read and scored: the same in every pack
        that asks it, and in a pack no other's."""
        heads = [hashlib.blake2b(self.context_tokens[row].tobytes()).digest() for row in range(len(self.contexts))]
        heads.append(b"")  # row -1: texts that are scored as a whole
        names = [name.encode() for name in self.request_tasks.dictionary.to_pylist()]
        places = np.stack([self.requests["doc"].to_numpy(), self.requests["choice"].to_numpy()], axis=1)
        keys = []
        for row, (task, context) in enumerate(zip(self.request_tokens.task, self.request_context, strict=True)):
            asked = (names[task], heads[context], places[row].tobytes(), self.continuation_tokens[row].tobytes())
            keys.append(hashlib.blake2b(b"\0".join(asked), digest_size=16).digest())
        return keys

    def rows_in(self, other: "Pack") -> np.ndarray | None:
        """int [requests]: where `other` asks each request of this pack in the same way; None: not all of them."""
        kept = ("mode", "max_context", "prefix_token", "bos")
        same = all(self.manifest[name] == other.manifest[name] for name in kept)
        if not same or self.manifest["tokenizer"]["tokenizer_hash"] != other.manifest["tokenizer"]["tokenizer_hash"]:
            return None
        place = {key: row for row, key in enumerate(other.request_keys)}
        rows = [place.get(key, -1) for key in self.request_keys]
        return None if -1 in rows else np.array(rows, np.int32)

    @functools.cached_property
    def request_tokens(self) -> RequestTokens:
        """The requests as an engine reads them."""
        contexts = self.context_tokens
        values = np.append(contexts.values, np.int32(self.manifest["prefix_token"]))
        # Texts that are scored as a whole follow the prefix token.
        context_row = np.where(self.request_context < 0, len(contexts), self.request_context)
        contexts = Ragged(values, np.append(contexts.offsets, len(values)))
        return RequestTokens(contexts, self.continuation_tokens, context_row, np.asarray(self.request_tasks.indices))


def load(path: Path) -> Pack:
    """Read a pack. Raises UserError if it is not one, is of another format, or was damaged."""
    try:
        text = (path / "manifest.json").read_bytes()
        if (version := json.loads(text)["format"]) != FORMAT:
            raise UserError(f"{path}: pack format {version} is not {FORMAT}; prepare it again")
        manifest = unsealed(text)
        tables = {
            name: pq.read_table(path / f"{name}.parquet", schema=schema, page_checksum_verification=True)
            for name, schema in SCHEMAS.items()
        }
        pack = Pack(manifest, **tables)
        whole = content_hash(pack) == pack.hash
    except FileNotFoundError:
        raise UserError(f"{path}: not a request pack; make one with `fineline tasks prepare`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged request pack ({' '.join(str(error).split())}); prepare it again") from None
    if not whole:
        raise UserError(f"{path}: the files do not match the hash in manifest.json; prepare the pack again")
    return pack


def save(pack: Pack, path: Path) -> None:
    """Write a pack; it appears under its name complete or not at all."""
    refuse_to_replace(path)
    with atomic_folder(path, replace=True) as partial:
        write_files(pack, partial)


def write_files(pack: Pack, folder: Path) -> None:
    """Write the files of a pack into a folder that is there."""
    for name in SCHEMAS:
        # Contexts of neighbouring documents share their solved examples: long pages let zstd see that.
        pq.write_table(
            getattr(pack, name),
            folder / f"{name}.parquet",
            compression="zstd",
            compression_level=9,
            use_dictionary=False,
            data_page_size=16 << 20,
            write_page_checksum=True,
        )
    manifest = json.dumps(sealed(pack.manifest), indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def refuse_to_replace(path: Path) -> None:
    """Raise UserError if `path` exists and is not a pack."""
    if path.exists() and not (path / "manifest.json").is_file():
        raise UserError(f"{path} exists and is not a request pack; choose another --out")


def content_hash(pack: Pack) -> str:
    """sha256 over the columns and the parts of the manifest that decide a log-likelihood or a metric."""
    digest = hashlib.sha256()
    manifest = pack.manifest
    decisive = {key: manifest[key] for key in ("format", "mode", "max_context", "prefix_token")}
    decisive["tokenizer"] = manifest["tokenizer"]["tokenizer_hash"]
    decisive["tasks"] = [[task["task"], task["output_type"], task["shots"]] for task in manifest["tasks"]]
    digest.update(json.dumps(decisive, sort_keys=True).encode())
    for name, schema in SCHEMAS.items():
        for column in schema.names:
            digest.update(f"{name}.{column}".encode())
            _digest(digest, getattr(pack, name)[column])
    return digest.hexdigest()


def ragged(column: pa.ChunkedArray) -> Ragged:
    """A list column as flat values and offsets that start at 0."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return Ragged(array.flatten().to_numpy(), offsets - offsets[0])


def _digest(digest: Any, column: pa.ChunkedArray) -> None:
    """Feed the values, not the buffers: those depend on chunks and versions."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(pa.large_string()), pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        rows = ragged(column)
        digest.update(rows.lengths.tobytes())
        digest.update(rows.values.tobytes())
    elif pa.types.is_integer(kind):
        digest.update(column.to_numpy().tobytes())
    else:
        for text in column.cast(pa.large_binary()).to_pylist():
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
