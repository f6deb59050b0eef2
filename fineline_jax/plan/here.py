"""What a run takes on the devices of this machine, told before anything is compiled."""

import logging

import jax

from fineline_jax.data.loader import check_local_sources
from fineline_jax.errors import UserError
from fineline_jax.mesh import batch_shards, device_bytes, make_mesh
from fineline_jax.plan.costs import least_bytes, tokens_per_second
from fineline_jax.plan.topologies import CHIPS, GIB
from fineline_jax.progress import duration, short
from fineline_jax.recipe import Recipe
from fineline_jax.scoring.series.auto_mesh import memory_of_device
from fineline_jax.training.loop import LESS_MEMORY
from fineline_jax.training.step import abstract_state, padded_rows

_LOG = logging.getLogger(__name__)


def check_memory(recipe: Recipe) -> None:
    """Log memory, speed and time of the run on these devices; nothing on a CPU. Raises UserError where the least that
    the step can need is more than a device has, on a CPU its part of the machine's memory."""
    device, mesh = jax.local_devices()[0], make_mesh(recipe.mesh)
    state = abstract_state(recipe, mesh)
    sequences = max(recipe.batch.sizes)
    rows = padded_rows(sequences, recipe, mesh)
    of_device = rows // recipe.batch.accumulation // batch_shards(mesh)
    least = least_bytes(recipe, device_bytes(state["params"]), device_bytes(state["opt_state"]), of_device)
    limit = memory_of_device() * (jax.local_device_count() / mesh.local_mesh.size if device.platform == "cpu" else 1)
    needs = f"at least {least / GIB:.2f} GiB of {limit / GIB:.2f} per device"
    if 0 < limit < least:
        check_local_sources(recipe.data, recipe.model.vocab_size)  # what is to be done first is said first
        raise UserError(f"{recipe.name} cannot fit on {mesh.size} x {device.device_kind}: {needs}; {LESS_MEMORY}")
    if device.platform == "cpu":
        return
    said = f"{recipe.name} on {mesh.size} x {device.device_kind}: {needs}"
    if rows != sequences:
        said += f"; {rows - sequences} of {rows} rows of a batch are filler ({1 - sequences / rows:.1%} for nothing)"
    named = [chip for chip in CHIPS.values() if device.device_kind.startswith(chip.kind)]
    if named:
        chip = max(named, key=lambda chip: len(chip.kind))
        slow, fast = (tokens_per_second(recipe, chip, mfu) for mfu in chip.mfu)
        took = lambda rate: duration(recipe.tokens / rate / mesh.size)
        said += (
            f"; at the {chip.mfu[0]:.0%} to {chip.mfu[1]:.0%} MFU published for 7B {short(slow)} to {short(fast)}"
            f" tokens/s per device, {took(fast)} to {took(slow)} in all"
        )
    if jax.process_index() == 0:
        _LOG.info(said)
