"""A prepared data set on disk: a TFDS folder of ArrayRecord files, one window per record.

Written with `tfds.core.SequentialWriter` and not with a GeneratorBasedBuilder: once a split passes 1 GB, the
generator path of TFDS 4.9 spills to temporary files through TensorFlow and sorts them (`core/shuffle.py`). The
sequential writer streams in the order given and needs no TensorFlow. The folder opens anywhere with
`tfds.builder_from_directory(DIR).as_data_source("train")`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fineline_jax.atomic_files import check_local, sealed, unsealed
from fineline_jax.errors import UserError

NAME = "windows"
WINDOWS_PER_FILE = 1 << 18  # 1 GB of uint16 windows of 2,049 tokens
WINDOWS_PER_WRITE = 1024  # the writer rewrites dataset_info.json at each call


class WindowWriter:
    """Writes windows to the splits of one folder, each split in the order given."""

    def __init__(self, folder: Path, splits: Sequence[str], *, window_tokens: int, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        # Half the disk and twice the reading speed of int32 where ids fit.
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        feature = tfds.features.Tensor(shape=(window_tokens,), dtype=self._dtype, encoding="bytes")
        self._info = tfds.core.DatasetInfo(
            builder=_identity(folder),
            features=tfds.features.FeaturesDict({"tokens": feature}),
            disable_shuffling=True,
        )
        self._writer = tfds.core.SequentialWriter(
            self._info, max_examples_per_shard=WINDOWS_PER_FILE, file_format="array_record"
        )
        self._writer.initialize_splits(list(splits))
        self.windows = dict.fromkeys(splits, 0)

    def add(self, split: str, windows: np.ndarray) -> None:
        """Append windows, int [n, window_tokens]."""
        for start in range(0, len(windows), WINDOWS_PER_WRITE):
            batch = windows[start : start + WINDOWS_PER_WRITE].astype(self._dtype)
            with self._naming_the_folder():
                self._writer.add_examples({split: [{"tokens": window} for window in batch]})
        self.windows[split] += len(windows)

    def close(self) -> None:
        with self._naming_the_folder():
            self._writer.close_all()

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
            raise UserError(f"{self._info.data_dir}: cannot be written ({error}); free space and run again") from error


def merge_shards(shards: Sequence[Path], folder: Path) -> None:
    """Make `folder` one data set of shards, in the order given; a split that several have is laid end to end.

    The shards' record files are moved. An interrupted merge is finished by calling it again with the same shards.
    """
    folder.mkdir(exist_ok=True)
    infos = [tfds.builder_from_directory(shard).info for shard in shards]
    splits: dict[str, Any] = {}
    for info in infos:
        for split in info.splits.values():
            template = split.filename_template
            assert template is not None  # a split read from a folder has one
            before = splits.get(split.name)
            splits[split.name] = dataclasses.replace(
                split,
                shard_lengths=[*(before.shard_lengths if before else []), *split.shard_lengths],
                num_bytes=split.num_bytes + (before.num_bytes if before else 0),
                filename_template=template.replace(data_dir=folder),
            )
    targets = {name: iter(map(Path, split.filepaths)) for name, split in splits.items()}
    for shard, info in zip(shards, infos, strict=True):
        for split in info.splits.values():
            for source, target in zip(map(Path, split.filepaths), targets[split.name]):
                if source.exists():
                    source.rename(target)
                elif not target.exists():  # else an earlier call has moved it
                    raise UserError(f"{source}: is gone; remove {shard.parent} and run again")
    wanted = {Path(file).name for split in splits.values() for file in split.filepaths}
    for left_over in [path for path in folder.iterdir() if path.name not in wanted]:
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    info = tfds.core.DatasetInfo(builder=_identity(folder), features=infos[0].features, disable_shuffling=True)
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(list(splits.values())))
    info.write_to_directory(folder)


def _identity(folder: Path) -> Any:
    return tfds.core.DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
    )


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write metadata.json, which TFDS reads as `builder.info.metadata`, with the digests of itself and of TFDS's two
    files. The record files have checksums of their own."""
    record = sealed({**metadata, "layout_sha256": _layout_digest(folder)})
    (folder / "metadata.json").write_text(json.dumps(record, indent=2) + "\n")


def _layout_digest(folder: Path) -> str:
    files = (folder / name for name in ("dataset_info.json", "features.json"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """A prepared data set, opened for random access."""

    path: Path
    metadata: dict[str, Any]
    splits: dict[str, int]
    """Windows per split."""
    source: Callable[[str], Any]
    """The TFDS data source of a split, or of several as `a+b+c`."""

    @property
    def window_tokens(self) -> int:
        return self.metadata["sequence_length"] + 1

    @functools.cached_property  # Amber's order asks for it once for each of 360 chunks
    def data_hash(self) -> str:
        """sha256 of its metadata: the settings, the tokenizer and the digest of every input file it was made from."""
        return hashlib.sha256(json.dumps(self.metadata, sort_keys=True).encode()).hexdigest()

    def read(self, split: str, records: Sequence[int]) -> np.ndarray:
        """The windows at those positions of a split (or of `a+b+c`), int32 [len(records), window_tokens].

        Raises UserError where record files are gone or damaged.
        """
        windows = np.empty((len(records), self.window_tokens), np.int32)
        try:
            for row, record in enumerate(self.source(split).__getitems__(list(records))):
                windows[row] = record["tokens"]
        except (OSError, RuntimeError, ValueError) as error:  # array_record's are RuntimeErrors
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.path}: split {split} cannot be read ({reason}); restore its files or prepare it again"
            ) from error
        return windows


def open_data_set(path: Path, option: str = "the path") -> DataSet:
    """Open a folder that `fineline data prepare` wrote. Raises UserError where it is none; option: what named it."""
    check_local(path, option)
    if not path.is_dir():
        raise UserError(f"{path}: no such data set; prepare it with `fineline data prepare` or correct {option}")
    try:
        text = (path / "metadata.json").read_bytes()
        if not all(type(json.loads(text)[key]) is int for key in ("sequence_length", "vocab_size")):
            raise TypeError("sizes are integers")
        builder = tfds.builder_from_directory(path)
        splits = {name: int(split.num_examples) for name, split in builder.info.splits.items()}
        layout = _layout_digest(path)
    except Exception as error:  # TFDS raises many kinds here
        raise UserError(f"{path}: not a prepared data set; prepare it with `fineline data prepare`") from error
    try:
        metadata = unsealed(text)
        if metadata.pop("layout_sha256", None) != layout:
            raise ValueError("dataset_info.json or features.json has changed")
    except ValueError as error:
        raise UserError(f"{path}: a damaged data set, or an older one ({error}); prepare it again") from error
    # An open split holds a file descriptor per record file; Amber has 360 splits, read one after another.
    return DataSet(path, metadata, splits, functools.lru_cache(maxsize=4)(builder.as_data_source))
