"""What a finished run keeps of its checkpoints. No JAX here."""

import shutil
from pathlib import Path
from typing import Literal

from fineline_jax.atomic_files import write_sealed
from fineline_jax.checkpoints.runs.digest_record import RECORD, read_record


def keep_only(checkpoints: Path, what: Literal["all", "weights", "last"]) -> None:
    """Free disk in the folder `checkpoints` of a run that nobody writes; interrupted, it goes on when called again.

    all: every checkpoint as it is. weights: of all but the last only the parameters. last: the last one alone. A
    checkpoint without an optimizer state can be scored, exported and analyzed, but no run goes on from it.
    """
    complete = {int(path.name): path for path in checkpoints.iterdir() if path.name.isdigit() and read_record(path)}
    for step, path in complete.items():
        if what == "all" or step == max(complete):
            continue
        if what == "last":
            remove(path)
        else:
            record = read_record(path) or {"files": {}}
            kept = {name: entry for name, entry in record["files"].items() if not name.startswith("opt_state/")}
            if len(kept) < len(record["files"]):  # replaced first: a record may list less than there is, not more
                write_sealed(path / RECORD, record | {"files": kept, "weights": "float32"})
            shutil.rmtree(path / "opt_state", ignore_errors=True)
    for path in checkpoints.glob("*.deleting"):
        shutil.rmtree(path)


def remove(path: Path) -> None:
    """Remove a checkpoint's folder: renamed first, since what is half deleted must not look complete."""
    doomed = path.with_suffix(".deleting")
    path.rename(doomed)
    shutil.rmtree(doomed)
