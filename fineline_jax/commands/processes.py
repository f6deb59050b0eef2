"""`--distributed`: one process of several, told apart by what their launcher has set."""

from fineline_jax.errors import UserError


def join_processes() -> None:
    """Meet the other processes of the job, before anything else of JAX runs.

    A TPU pod, SLURM, MPI and Kubernetes are recognised by jax.distributed itself. Raises UserError where nothing says
    who the others are, or they do not come.
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
