"""Next-token cross-entropy that never holds the logits of more than one chunk of tokens.

The loss of a batch is linear in its cotangent, so its gradients can be computed while the logits exist: the forward
pass of the differentiated loss already accumulates d/d(hidden) and d/d(head), chunk by chunk, and the backward pass
only scales them. Three products with the head instead of the four of a recomputing loss (the idea of Liger's fused
linear cross-entropy, 2410.10989), and the head is gathered and its gradient scattered once per step.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fineline_jax.mesh import BATCH, scattered_sum

P = jax.P
_ROWS = P(BATCH, None)
_HIDDEN = P(BATCH, None, None)
_HEAD = P("fsdp", "tensor")

Scalar = Float32[Array, ""]


@jax.named_scope("head")
def cross_entropy(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "width vocab"],
    targets: Int32[Array, "batch length"],
    weights: Float32[Array, "batch length"],
    z_loss: float,
    chunk_tokens: int,
) -> tuple[Scalar, Scalar]:
    """Weighted sums over the batch of (cross-entropy + z_loss * log_normaliser^2, cross-entropy), in nats.

    head: sharded (fsdp, tensor). chunk_tokens: tokens of one device whose logits exist at a time. Only the first sum
    has gradients. Call it under `jax.set_mesh`.
    """
    return _cross_entropy(hidden, head, targets, weights, z_loss, chunk_tokens)


def reference_cross_entropy(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "width vocab"],
    targets: Int32[Array, "batch length"],
    weights: Float32[Array, "batch length"],
    z_loss: float,
) -> tuple[Scalar, Scalar]:
    """The same from the whole logits at once; what the chunked version is tested against."""
    logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (losses + z_loss * normaliser**2)), jnp.sum(weights * losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, head, targets, weights, z_loss, chunk_tokens):
    run = functools.partial(_local_sums, z_loss=z_loss, chunk_tokens=chunk_tokens)
    return _on_each_device(run, (P(), P()))(hidden, head, targets, weights)


def _forward(hidden, head, targets, weights, z_loss, chunk_tokens):
    run = functools.partial(_local_sums_and_gradients, z_loss=z_loss, chunk_tokens=chunk_tokens)
    mapped = _on_each_device(run, ((P(), P()), _HIDDEN, _HEAD))
    sums, hidden_gradient, head_gradient = mapped(hidden, head, targets, weights)
    return sums, (hidden_gradient, head_gradient)


def _backward(z_loss, chunk_tokens, gradients, cotangents):
    hidden_gradient, head_gradient = gradients
    scale = cotangents[0]
    return scale.astype(hidden_gradient.dtype) * hidden_gradient, scale * head_gradient, None, None


_cross_entropy.defvjp(_forward, _backward)


def _on_each_device(run, out_specs):
    return jax.shard_map(run, in_specs=(_HIDDEN, _HEAD, _ROWS, _ROWS), out_specs=out_specs, check_vma=False)


def _chunks(hidden, targets, weights, chunk_tokens):
    """The device's tokens, flattened and cut into [chunks, chunk_tokens, ...]; the last chunk padded with weight 0."""
    tokens, width = targets.size, hidden.shape[-1]
    size = min(chunk_tokens, tokens)
    count = -(-tokens // size)
    pad = count * size - tokens
    flat = jnp.pad(hidden.reshape(tokens, width), ((0, pad), (0, 0))).reshape(count, size, width)
    cut = lambda x: jnp.pad(x.reshape(tokens), (0, pad)).reshape(count, size)
    return flat, cut(targets), cut(weights)


def _chunk_losses(hidden, head, targets):
    """exp(logits - max), their sum, log-normaliser, loss and column of the target of one chunk; the vocabulary is split
    over `tensor`, and a column outside this device's part belongs to another's."""
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    largest = jax.lax.pmax(jnp.max(logits, axis=-1), "tensor")
    exponentials = jnp.exp(logits - largest[:, None])
    total = jax.lax.psum(jnp.sum(exponentials, axis=-1), "tensor")
    normaliser = jnp.log(total) + largest
    columns = targets - jax.lax.axis_index("tensor") * head.shape[1]
    target_logit = jax.lax.psum(jax.lax.platform_dependent(logits, columns, cpu=_taken, default=_picked), "tensor")
    return exponentials, total, normaliser, normaliser - target_logit, columns


def _picked(matrix, columns):
    """The element of each row in its column, 0.0 where there is no such column; fused with what makes the matrix."""
    return jnp.sum(matrix, axis=-1, where=jnp.arange(matrix.shape[1])[None, :] == columns[:, None])


def _taken(matrix, columns):
    """The same by gathering: where nothing is fused, a pass over the matrix costs more than a gather."""
    columns = jnp.where(columns < 0, matrix.shape[1], columns)
    return matrix.at[jnp.arange(columns.size), columns].get(mode="fill", fill_value=0.0)


def _lowered(matrix, columns, amounts):
    """The matrix with the amount of each row taken from the element in its column, if there is one."""
    hit = jnp.arange(matrix.shape[1])[None, :] == columns[:, None]
    return matrix - jnp.where(hit, amounts[:, None], 0.0)


def _lowered_in_place(matrix, columns, amounts):
    columns = jnp.where(columns < 0, matrix.shape[1], columns)
    return matrix.at[jnp.arange(columns.size), columns].add(-amounts, mode="drop", unique_indices=True)


def _local_sums(hidden, head, targets, weights, *, z_loss, chunk_tokens):
    head = jax.lax.all_gather(head.astype(hidden.dtype), "fsdp", axis=0, tiled=True)

    def add(sums, chunk):
        hidden, targets, weights = chunk
        _, _, normaliser, losses, _ = _chunk_losses(hidden, head, targets)
        return (
            sums[0] + jnp.sum(weights * (losses + z_loss * normaliser**2)),
            sums[1] + jnp.sum(weights * losses),
        ), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(add, (zero, zero), _chunks(hidden, targets, weights, chunk_tokens))
    return jax.lax.psum(sums, BATCH)


def _local_sums_and_gradients(hidden, head, targets, weights, *, z_loss, chunk_tokens):
    gathered = jax.lax.all_gather(head.astype(hidden.dtype), "fsdp", axis=0, tiled=True)

    def add(carry, chunk):
        with_z, plain, head_gradient = carry
        hidden, targets, weights = chunk
        exponentials, total, normaliser, losses, columns = _chunk_losses(hidden, gathered, targets)
        with_z += jnp.sum(weights * (losses + z_loss * normaliser**2))
        plain += jnp.sum(weights * losses)
        # The slope of the logits is weight / total * (exponentials * (1 + 2 z_loss normaliser) - total at the target).
        if z_loss:
            exponentials *= (1.0 + 2.0 * z_loss * normaliser)[:, None]
        slope = jax.lax.platform_dependent(exponentials, columns, total, cpu=_lowered_in_place, default=_lowered)
        factor = (weights / total)[:, None]
        if hidden.dtype == jnp.float32:  # a factor of the row: cheaper on the smaller sides of the products
            scaled, factor_after = hidden * factor, factor
        else:
            slope, scaled, factor_after = (slope * factor).astype(hidden.dtype), hidden, 1.0
        head_gradient += jnp.einsum("tw,tv->wv", scaled, slope, preferred_element_type=jnp.float32)
        hidden_gradient = jnp.dot(slope, gathered.T, preferred_element_type=jnp.float32) * factor_after
        return (with_z, plain, head_gradient), hidden_gradient.astype(hidden.dtype)

    zero = jnp.zeros((), jnp.float32)
    start = zero, zero, jnp.zeros(gathered.shape, jnp.float32)
    chunks = _chunks(hidden, targets, weights, chunk_tokens)
    (with_z, plain, head_gradient), hidden_gradient = jax.lax.scan(add, start, chunks)
    hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    head_gradient = scattered_sum(head_gradient)
    sums = jax.lax.psum((with_z, plain), BATCH)
    return sums, jax.lax.psum(hidden_gradient, "tensor"), jax.lax.psum(head_gradient, "replica").astype(head.dtype)
