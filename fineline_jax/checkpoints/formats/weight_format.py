"""What a format of weight files is: how its files are named and read. `weight_files.FORMATS` lists all of them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints.formats.lazy_tensor import Tensor
from fineline_jax.models.families.family import Family


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """One format of weight files."""

    label: str
    """For messages that list what was looked for."""
    pattern: str
    """Regular expression of the names of weight files."""
    read: Callable[[Path], Mapping[str, Tensor]]
    """The tensors of one file by name, without their data. Raises UserError naming the file."""
    single: str = ""
    """The name of the file that holds all weights; "": it may have any name that fits the pattern."""
    suffixes: tuple[str, ...] = ()
    """Of a file that is given by its path, whatever it is called."""
    recognises: Callable[[Path], bool] | None = None
    """Whether a local file has this format; None: its name fits the pattern. Not asked where `single` is given."""
    one_file: bool = True
    """Without `single`: of several files in a folder one has to be given; False: together they hold the weights."""
    key: str = ""
    """The file whose `read` gives the tensors of a whole folder; the others, also of its subfolders, are named by the
    pattern as paths in the folder, and hold their data."""
    config: Callable[[Path], dict[str, Any]] | None = None
    """What config.json says, of a folder or file without one."""
    families: tuple[Family, ...] = ()
    """The only families of models in such files, with the names and axes that their tensors have there; (): any family,
    as in Hugging Face's folders."""
    padded_vocabulary: bool = False
    """Whether the embedding and the head may have rows behind those of the vocabulary, which are left out."""

    @property
    def index(self) -> str:
        """The name of the index that says in which file each tensor lies."""
        return f"{self.single}.index.json" if self.single else ""

    def shard(self, number: int, count: int) -> str:
        """The name of one of `count` files; number: from 1."""
        stem, _, suffix = self.single.rpartition(".")
        return self.single if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{suffix}"

    def files(self, folder: Path) -> list[Path]:
        """The files of this format in `folder`, sorted; with a key, it is the first."""
        if self.key:
            if not (folder / self.key).is_file():
                return []
            inside = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            named = [path for path, name in inside.items() if re.fullmatch(self.pattern, name)]
            return sorted(named, key=lambda path: (inside[path] != self.key, path))
        recognises = self.recognises or (lambda path: bool(re.fullmatch(self.pattern, path.name)))
        return sorted(path for path in folder.glob("*") if path.is_file() and recognises(path))
