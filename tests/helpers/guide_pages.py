"""The pages docs/guides/add_*.md, followed word by word in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from docs_pages import CHECKOUT, page


def follow(name: str, folder: Path) -> list[str]:
    """Make the files and the changes that a page shows under `path`: in a copy of the package; the paths, each once.

    A block under the path of a new file is the file; of one that is there, lines to replace: "-" gone, "+" new.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "fineline_jax", folder / "fineline_jax", ignore=ignored)
    shutil.copytree(CHECKOUT / "configs", folder / "fineline_jax/configs", ignore=ignored, dirs_exist_ok=True)
    shown = re.findall(r"`([\w/]+\.\w+)`:\n\n((?:^ {4}.*\n(?:\n+(?= {4}))*)+)", page(name), flags=re.M)
    made: dict[str, None] = {}
    for path, block in shown:
        lines, file = [line[4:] for line in block.splitlines()], folder / path
        if file.exists():
            old, new = ("".join(f"\n{line[1:]}" for line in lines if line[:1] != sign) for sign in "+-")
            text = file.read_text()
            assert text.count(f"{old}\n") == 1, f"{path} has {text.count(old)} times:{old}"
            file.write_text(text.replace(f"{old}\n", f"{new}\n"))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
        made[path] = None
    return list(made)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python in that folder, whose copy of the package it imports; the helpers of the tests are there too."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parent}"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def prints(folder: Path, *arguments: str) -> str:
    """What such a program prints; it has to end well."""
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
