"""Compiling one step for absent devices in a process of its own, and what is read off the result.

XLA plans a module's memory before it generates code, which takes nine tenths of the time; unless the whole is asked
for, the process is stopped in between.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.plan import hlo
from fineline_jax.plan.topologies import GIB, Topology, environment
from fineline_jax.recipe import MeshShape, Recipe, to_json

LONGEST_SECONDS = 1800.0
_PLANNED = "*after_optimizations.txt"
_MEMORY = "*after_optimizations*memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is compiled."""

    topology: Topology
    mesh: MeshShape
    recipe: Recipe | None = None
    """The training step of this recipe; None: a scoring step of `model`."""
    model: ModelConfig | None = None
    dtype: str = "bfloat16"
    step: Literal["rows", "vocabulary"] = "rows"
    flags: Mapping[str, str | bool | int] = dataclasses.field(default_factory=dict)
    """Options of the compiler."""
    full: bool = False
    """Compile to the end."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler makes of a step; bytes are those of one device."""

    job: Job
    mesh: tuple[int, int, int]
    kinds: Mapping[str, int]
    """Bytes of the arguments: parameters, moments, batch."""
    peak: int
    """Bytes that the compiler allots to the step, with the room between arrays."""
    living: int
    """Bytes of the arrays that live at the fullest moment, without that room; 0: not compiled to the end."""
    products: float
    """FLOPs of the step's products over all devices, recomputed ones included; attention kernels are not in it."""
    collectives: tuple[hlo.Collective, ...]
    largest: tuple[hlo.Value, ...]
    involuntary: int
    """Messages of the compiler on arrays that it moves to every device for want of a better way."""
    seconds: float
    module: str
    """The module's text; empty where it does not fit."""

    @property
    def fits(self) -> bool:
        return self.peak <= self.job.topology.chip.memory


def compiled(job: Job) -> Compiled:
    """The job's step, compiled. Raises UserError where the devices or the mesh cannot be, or the compiler fails for
    another reason than memory."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fineline-plan-") as name:
        folder = Path(name)
        _write(job, folder)
        log = _run(job, folder)
        failed = _read(folder / "failed.json")
        if "refused" in failed:
            raise UserError(failed["refused"])
        lowered, finished = _read(folder / "lowered.json"), _read(folder / "compiled.json")
        modules = sorted((folder / "dump").glob(_PLANNED))
        module = modules[-1].read_text() if modules else ""
        peak = _wanted(failed["compiler"]) if failed else _planned(folder / "dump")
        if not lowered or peak is None or (job.full and not (finished or failed)):
            last = " ".join((failed.get("compiler") or log).split())[-300:]
            raise UserError(f"--topology {job.topology.name}: the step was not compiled: {last}")
    return Compiled(
        job,
        tuple(lowered["mesh"]),
        lowered["kinds"],
        peak,
        finished.get("living", 0),
        lowered["products"],
        tuple(hlo.collectives(module)) if module else (),
        tuple(hlo.largest(module)) if module else (),
        log.count("nvoluntary full rematerialization"),
        time.monotonic() - started,
        module,
    )


def _write(job: Job, folder: Path) -> None:
    mesh = (job.mesh.replica, job.mesh.fsdp, job.mesh.tensor)
    record: dict[str, Any] = {"topology": job.topology.name, "mesh": mesh, "flags": dict(job.flags)}
    if job.recipe is not None:
        record["recipe"] = job.recipe.name
        (folder / "recipe.json").write_text(to_json(job.recipe))
    else:
        assert job.model is not None
        record |= {"model": dataclasses.asdict(job.model), "dtype": job.dtype, "step": job.step}
    (folder / "job.json").write_text(json.dumps(record))


def _run(job: Job, folder: Path) -> str:
    """Run the child until it ends, or has planned the memory; what it has said."""
    more = environment(job.topology)
    dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
    # What is set for this machine's own devices is not for those.
    own = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_NUM_CPU_DEVICES")}
    variables = own | more | {"XLA_FLAGS": f"{more.get('XLA_FLAGS', '')} {dump}"}
    log = folder / "log"
    command = [sys.executable, "-m", "fineline_jax.plan.child", str(folder)]
    with log.open("w") as out, subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT) as child:
        try:
            until = time.monotonic() + LONGEST_SECONDS
            while child.poll() is None and time.monotonic() < until:
                if not job.full and _is_planned(folder / "dump"):
                    break
                time.sleep(0.2)
        finally:
            child.kill()
    return log.read_text(errors="replace")


def _is_planned(dump: Path) -> bool:
    """Whether the plan of the memory is on disk to its end."""
    return _planned(dump) is not None and any(path.read_text().rstrip().endswith("}") for path in dump.glob(_PLANNED))


def _planned(dump: Path) -> int | None:
    """Bytes of the memory that XLA has planned, of its report."""
    reports = sorted(dump.glob(_MEMORY))
    match = re.search(r"Total bytes(?: used)?: (\d+)\D", reports[-1].read_text()) if reports else None
    return int(match[1]) if match else None


def _wanted(message: str) -> int | None:
    """Bytes that the compiler says the step would use, where it says that there are fewer."""
    match = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    if match is None:
        match = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM", message)
    return int(float(match[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[match[2]]) if match else None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
