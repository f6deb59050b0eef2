"""`fineline traces`: what a folder tells of the machine and the person that made it, and a copy without it."""

import dataclasses
import functools
import getpass
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fineline_jax.errors import Incomplete, UserError
from fineline_jax.folder_lock import writing

_PATH = re.compile(r"(?<![\w/:.<~$}-])/(?:[\w.@+ =-]*[\w.@+=-]/)+[\w.@+=-]+")
"""An absolute path of two parts or more; not the rest of an address or of a relative path."""
_TEXTS = (".json", ".jsonl", ".csv", ".html", ".md", ".txt", ".yaml", ".yml", ".svg", ".log", ".ndjson")
_EVENTS = re.compile(r"(events\.out\.tfevents\.\d+\.)(.+?)((?:\.\d+)*(?:\.v2)?)$")
"""TensorBoard's files have the host in their name."""
_RECORD = "complete.json"
"""Beside it lie files whose digests it holds; they are left as they are."""
_SHOWN = 200


def traces(
    folder: Positional[Path],
    relative: Annotated[Path | None, arg(metavar="COPY")] = None,
) -> None:
    """List the absolute paths, the user's and the host's name in the files of a folder, before you publish it.

    Args:
        folder: A run, scores, a report, an export.
        relative: Folder to write a copy to, without them: of a path inside FOLDER its rest, of any other its last part.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that is to be published")
    if relative is None:
        if not (rows := list(found_in(folder))):
            print(f"{folder}: no absolute path, user or host name found")
            return
        from fineline_jax.text_table import counted, text_table

        rest = f"\n… and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        print(text_table([("file", "what", "text"), *rows[:_SHOWN]]) + rest)
        print(f"{counted(len(rows), 'trace')}; `fineline traces {folder} --relative COPY` writes a copy without them")
        return
    with writing(relative, "--relative"):
        write_without(folder, relative)
    if left := list(found_in(relative)):
        raise Incomplete(
            f"{relative}: written; left in it, as these files cannot be rewritten:"
            f" {', '.join(dict.fromkeys(f'{text} in {file}' for file, _, text in left[:5]))}; remove them"
        )
    print(f"{relative}: written without absolute paths, user and host names")


def found_in(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file, kind, text) of each distinct trace of each file below `folder`, and of the files' names."""
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        text = file.read_bytes().decode("utf-8", "replace")
        if file.suffix in _TEXTS:
            yield from ((name, "path", found) for found in dict.fromkeys(_PATH.findall(text)))
        elif home := next((one for one in _own_folders(folder) if one in text), ""):
            yield name, "path", home
        for kind, word in _names():
            if (text_has := _word(word).search(text)) or _word(word).search(name):
                yield name, kind, word if text_has else f"{word} (name of the file)"


def write_without(folder: Path, out: Path) -> None:
    """A copy of `folder`, complete or not at all, in which the texts, records, score files and event files are free of
    traces; what is read by its digest is sealed anew."""
    from fineline_jax.atomic_files import atomic_folder
    from fineline_jax.scoring import score_files

    if out.exists() or out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--relative {out}: must be a new folder outside {folder}")
    plain = functools.partial(_without, folder)
    with atomic_folder(out, exclusive=True) as partial:
        for file in _files(folder):
            target = partial / file.relative_to(folder)
            target = target.with_name(_EVENTS.sub(r"\1host\3", target.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            digested = any(
                (above / _RECORD).is_file() for above in (file.parent, *file.parents) if above != folder.parent
            )
            if file.suffix in _TEXTS and not (digested and file.name != _RECORD):
                target.write_text(_rewritten(file, plain), encoding="utf-8")
            elif file.suffix == ".parquet" and (header := _header_of(file)) is not None:
                scores = score_files.read(file)
                header = dataclasses.replace(
                    header, **{key: plain(one) for key, one in vars(header).items() if isinstance(one, str)}
                )
                written = score_files.write(target.parent.parent, dataclasses.replace(scores, header=header))
                if written != target:
                    written.rename(target)
            else:
                shutil.copyfile(file, target)


def _files(folder: Path) -> list[Path]:
    """Hidden files, such as locks, are not published."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]


def _rewritten(file: Path, plain: Any) -> str:
    from fineline_jax.atomic_files import DIGEST, sealed, unsealed

    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    if file.suffix != ".json":
        return plain(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return plain(text)
    if not isinstance(content, dict) or DIGEST not in content:
        return plain(text)
    try:
        record = unsealed(text)
    except ValueError as error:
        raise UserError(f"{file}: a damaged record ({error}); restore it before it is published") from error
    return json.dumps(sealed(json.loads(plain(json.dumps(record, ensure_ascii=False)))), indent=1)


def _header_of(file: Path) -> Any:
    from fineline_jax.scoring import score_files

    try:
        return score_files.read_header(file)
    except UserError:  # another Parquet file
        return None


def _without(folder: Path, text: str) -> str:
    """`text` with paths cut short and names replaced."""
    roots = {str(folder.absolute()), os.path.realpath(folder)}

    def short(match: re.Match[str]) -> str:
        path = match[0]
        for root in roots:
            if path == root or path.startswith(root + "/"):
                return os.path.relpath(path, root)
        return path.rpartition("/")[2]

    text = _PATH.sub(short, text)
    for kind, word in _names():
        text = _word(word).sub(kind, text)
    return text


def _names() -> tuple[tuple[str, str], ...]:
    """(kind, name) of the user and the host, where they are no words of everyday."""
    common = {"", "root", "user", "home", "localhost", "runner", "admin", "data", "test", "main"}
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = ""
    host = socket.gethostname()
    named = {"user": user, "host": host} | ({"host ": host.partition(".")[0]} if "." in host else {})
    return tuple((kind.strip(), name) for kind, name in named.items() if name.lower() not in common and len(name) > 2)


@functools.cache
def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")


def _own_folders(folder: Path) -> tuple[str, ...]:
    """Paths that files of numbers are searched for."""
    own = {os.path.expanduser("~"), str(folder.resolve().parent), os.getcwd()}
    return tuple(path for path in own if path.count("/") > 1)
