"""`--distributed`: joining the other processes of a job."""

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Iterator

from fineline_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of `--distributed` find each other.

    Args:
        coordinator: HOST:PORT of process 0, a free port there; default: from the TPU pod, SLURM, MPI or Kubernetes.
        processes: How many there are, with --coordinator.
        process: Number of this one, from 0, with --coordinator.
        start_timeout: Seconds that the others are waited for at the start.
        stuck_after: Training: end a process, with its stacks, after so many seconds without a step, a save or a
            compilation that ends, as when a collective waits for ever; 0: never.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    start_timeout: int = 300
    stuck_after: float = 0.0

    def check(self, distributed: bool) -> None:
        given = (self.coordinator, self.processes, self.process)
        if any(one is not None for one in given) and (None in given or not distributed):
            raise UserError("--coordinator, --processes and --process go together, and with --distributed")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"--coordinator {self.coordinator}: give HOST:PORT of process 0")
        if self.processes is not None and self.process is not None and not 0 <= self.process < self.processes:
            raise UserError(f"--process {self.process} must lie between 0 and {self.processes - 1}")
        if self.start_timeout < 1:
            raise UserError(f"--start-timeout {self.start_timeout}: must be at least one second")


@contextlib.contextmanager
def joined(distributed: bool, how: Processes = Processes()) -> Iterator[None]:
    """Connect to the other processes of the job, before anything else of JAX; inside, the end of one is that of all.

    jax.distributed itself recognises a TPU pod, SLURM, MPI and Kubernetes. Raises UserError where it recognises no job.
    Where the others do not connect in time, this process ends with one line and LOST_STATUS: JAX would abort it.
    """
    how.check(distributed)
    if not distributed:
        yield
        return
    import jax
    from jax._src.distributed import global_state

    from fineline_jax.multihost import LOST_STATUS, watching_each_other

    def end() -> None:
        line = f"fineline: --distributed: not all processes connected within {how.start_timeout} s (--start-timeout)"
        print(f"{line}; start all of them again, with the address of process 0", file=sys.__stderr__, flush=True)
        os._exit(LOST_STATUS)

    late = threading.Timer(how.start_timeout, end)
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            how.coordinator, how.processes, how.process, initialization_timeout=how.start_timeout + 60
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--distributed: the processes did not find each other ({reason}); start them by SLURM, MPI or on every"
            " host of a TPU pod, name process 0 by --coordinator, or leave it out for one process"
        ) from error
    finally:
        late.cancel()
    if global_state.client is None or jax.process_count() == 1:
        yield
        return
    with watching_each_other(str(global_state.coordinator_address), global_state.client):
        yield
