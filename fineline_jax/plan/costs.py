"""What a step and a run take on named devices: time at a stated utilisation, disk, and all of it as text."""

from fineline_jax.models.config import GATED
from fineline_jax.plan.compiled import Compiled, Job
from fineline_jax.plan.topologies import GIB, Chip
from fineline_jax.progress import duration, short
from fineline_jax.recipe import Recipe
from fineline_jax.training.metrics import PEAK_TFLOPS

STATE_BYTES = 12
"""Of a parameter in a checkpoint: weight and two moments in float32."""
EFFICIENCY = 0.7
"""Of a chip's peak, what large products in bfloat16 reach; of the cost model alone."""


def tokens_per_second(recipe: Recipe, chip: Chip, mfu: float) -> float:
    """Of one device. mfu: model FLOPs (`ModelConfig.train_flops_per_token`) over the peak in bfloat16."""
    return mfu * PEAK_TFLOPS[chip.kind] * 1e12 / recipe.model.train_flops_per_token(recipe.data.sequence_length)


def least_bytes(recipe: Recipe, parameters: int, moments: int, rows: int) -> int:
    """Bytes that a training step needs on a device whatever the compiler does: parameters, moments, the gradient, and
    the inputs of the layers, at which the backward pass begins.

    parameters, moments: their bytes on a device. rows: windows of a device in a micro-batch.
    """
    itemsize = {"float32": 4, "bfloat16": 2}[recipe.compute.dtype]
    inputs = rows * recipe.data.sequence_length * recipe.model.width * itemsize * recipe.model.layers
    return 2 * parameters + moments + (0 if recipe.compute.remat == "offload" else inputs)


def saved_bytes(recipe: Recipe, rows: int, tensor: int) -> int:
    """Bytes that the policy of recomputation keeps on a device besides the inputs of the layers, at least; of layers in
    a loop, whose kernel of attention needs its operands and its result. rows: as of `least_bytes`."""
    model, compute = recipe.model, recipe.compute
    if model.mixer != "attention" or model.v_head_dim or compute.attention == "xla" or not compute.scan_layers:
        return 0
    context, qkv = model.heads * model.head_dim, (model.heads + 2 * model.kv_heads) * model.head_dim
    # Operands of the products (two norms, what goes down) and of what stands between gate, up and down.
    dense = 0 if model.experts else 2 * model.width + (3 if model.mlp in GATED else 2) * model.mlp_width
    features = {"context": context, "qkv_context": context + qkv, "none": context + qkv + dense}.get(compute.remat, 0)
    itemsize = {"float32": 4, "bfloat16": 2}[compute.dtype]
    return rows * recipe.data.sequence_length * features * itemsize * model.layers // tensor


def least_seconds(job: Job) -> tuple[float, float]:
    """Of a training step: its products, and the traffic that no program is without, both as in `step_seconds`, which is
    not less than either.

    Products: of the model, and of layers in a loop what the policy computes again: all matrices but the MLP's last, no
    attention; `offload` counts as `full`, for the copies to the host. Traffic: weights are gathered over `fsdp` for
    each micro-batch, those of the layers once more for the backward pass, and gradients are scattered once; over
    `tensor`, two sums a layer of the hidden states, forward and backward.
    """
    recipe, chip, mesh = job.recipe, job.topology.chip, job.mesh
    assert recipe is not None
    model, devices = recipe.model, job.topology.count
    flops = model.train_flops_per_token(recipe.data.sequence_length)
    if model.mixer == "attention" and not model.experts and not model.v_head_dim and recipe.compute.scan_layers:
        mlp, qkv = (
            (2 if model.mlp in GATED else 1) * model.mlp_width,
            (model.heads + 2 * model.kv_heads) * model.head_dim,
        )
        again = {"none": 0, "qkv_context": mlp + model.heads * model.head_dim}
        flops += 2.0 * model.layers * model.width * again.get(recipe.compute.remat, again["qkv_context"] + qkv)
    itemsize = {"float32": 4, "bfloat16": 2}[recipe.compute.dtype]
    outside = model.vocab_size * model.width * (1 if model.tied_embeddings else 2)
    gathered = (2 * model.active_parameters - outside) * recipe.batch.accumulation + model.active_parameters
    sums = 0.0
    if mesh.tensor > 1:
        sums = 8.0 * model.layers * model.width * recipe.tokens_per_step / (mesh.replica * mesh.fsdp)
    traffic = gathered / mesh.tensor * (1 - 1 / mesh.fsdp) + sums * (1 - 1 / mesh.tensor)
    flops *= recipe.tokens_per_step / devices
    return flops / (EFFICIENCY * PEAK_TFLOPS[chip.kind] * 1e12), itemsize * traffic / chip.bandwidth


def step_flops(step: Compiled) -> float:
    """Of all devices, with what is computed again. Of attention kernels, which are no products of the program: two
    products forward and five backward over the half that is seen, and two more where the policy runs them again."""
    recipe = step.job.recipe
    if recipe is None or recipe.compute.attention == "xla" or recipe.model.mixer != "attention":
        return step.products
    model, again = recipe.model, 2 if recipe.compute.remat in ("full", "offload") else 0
    of_token = model.layers * model.heads * model.head_dim * recipe.data.sequence_length
    return step.products + recipe.tokens_per_step * of_token * (7 + again)


def step_seconds(step: Compiled) -> float:
    """The cost model by which a search orders what fits: products at EFFICIENCY of the peak, or the collectives that
    overlap them if these take longer, and behind them those that overlap nothing, at the bandwidth of the links."""
    chip, devices = step.job.topology.chip, step.job.topology.count
    compute = step_flops(step) / devices / (EFFICIENCY * PEAK_TFLOPS[chip.kind] * 1e12)
    hidden = exposed = 0.0
    for one in step.collectives:
        rounds = 2 if one.kind == "all-reduce" else 1
        seconds = rounds * one.bytes * (1 - 1 / max(one.devices, 2)) / chip.bandwidth
        hidden += seconds * one.overlapped
        exposed += seconds * (one.times - one.overlapped)
    return max(compute, hidden) + exposed


def report(step: Compiled, mfu: float | None = None) -> str:
    """The plan of a step as text. mfu: for speed and time; None: the middle of what was published."""
    job, (replica, fsdp, tensor) = step.job, step.mesh
    chip, count = job.topology.chip, job.topology.count
    what = f"training {job.recipe.name}" if job.recipe else f"scoring, the step of the {job.step}, {job.dtype}"
    gib = lambda amount: f"{amount / GIB:.2f} GiB"
    left = chip.memory - step.peak
    lines = [
        f"{what} on {job.topology.name}: {count} x {chip.kind}, mesh replica {replica}, fsdp {fsdp}, tensor {tensor}",
        f"memory   {gib(step.peak)} of {gib(chip.memory)} per device: "
        + (f"fits, {gib(left)} left" if left >= 0 else f"does NOT fit, {gib(-left)} too much"),
        "         " + ", ".join(f"{kind} {gib(amount)}" for kind, amount in step.kinds.items())
        + f", all else {gib(max(0, step.peak - sum(step.kinds.values())))}"
        + (f"; {gib(step.living)} live at the fullest moment" if step.living else ""),
    ]  # fmt: skip
    lines += [f"         {value.shape} {gib(value.bytes)} {value.scope}".rstrip() for value in step.largest]
    for kind in dict.fromkeys(one.kind for one in step.collectives):
        found = [one for one in step.collectives if one.kind == kind]
        times, total = sum(one.times for one in found), sum(one.times * one.bytes for one in found)
        hidden, part = sum(one.overlapped for one in found), sum(one.overlapped * one.bytes for one in found)
        lines.append(f"traffic  {kind}: {times:,} per step, {gib(total)}; {hidden:,} ({gib(part)}) while it computes")
    if step.involuntary:
        lines.append(f"warning  {step.involuntary} arrays are moved to every device for want of a better way")
    if job.recipe:
        lines += _of_run(step, job.recipe, mfu or sum(chip.mfu) / 2)
    return "\n".join([*lines, f"         {'compiled to the end' if job.full else 'planned'} in {step.seconds:.0f} s"])


def _of_run(step: Compiled, recipe: Recipe, mfu: float) -> list[str]:
    chip, count, batch = step.job.topology.chip, step.job.topology.count, recipe.batch
    flops = recipe.tokens_per_step * recipe.model.train_flops_per_token(recipe.data.sequence_length)
    slow, expected, fast = (tokens_per_second(recipe, chip, one) for one in (chip.mfu[0], mfu, chip.mfu[1]))
    took = lambda rate: duration(recipe.tokens / rate / count)
    kept, each = len(recipe.kept_steps()), STATE_BYTES * recipe.model.parameters / 1e9
    filler = -batch.sequences % (step.mesh[0] * step.mesh[1] * batch.accumulation)
    share = filler / (batch.sequences + filler)
    return [
        f"work     {flops:.3g} FLOPs a step of the model, {step_flops(step):.3g} with what is computed again"
        + (f"; {filler} rows fill up the batch, {share:.1%} for nothing" if filler else ""),
        f"speed    {expected:,.0f} tokens/s per device at {mfu:.1%} MFU, {short(expected * count)} in all, a step in"
        f" {recipe.tokens_per_step / expected / count:.3g} s",
        f"         published: {chip.mfu[0]:.0%} to {chip.mfu[1]:.0%} ({chip.source}), {slow:,.0f} to {fast:,.0f}"
        " tokens/s",
        f"run      {recipe.steps:,} steps, {short(recipe.tokens)} tokens: {took(expected)}"
        f" ({took(fast)} to {took(slow)}), {short(recipe.tokens / expected / 3600)} device-hours",
        f"disk     {kept:,} checkpoints of {each:,.1f} GB (weights and moments in float32),"
        f" {kept * each / 1e3:,.1f} TB; {each:,.1f} GB more for the newest",
    ]  # fmt: skip
