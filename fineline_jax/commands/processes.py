"""`--distributed`: joining the other processes of a job, which its launcher has started."""

from fineline_jax.errors import UserError


def join_processes() -> None:
    """Connect to the other processes of the job; called before anything else of JAX.

    jax.distributed itself recognises a TPU pod, SLURM, MPI and Kubernetes. Raises UserError where it recognises no
    job, or the other processes do not connect in time.
    """
    import jax

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--distributed: the processes did not find each other ({reason}); start them by SLURM, MPI or on every"
            " host of a TPU pod, or leave it out for one process"
        ) from error
