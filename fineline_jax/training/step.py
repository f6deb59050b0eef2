"""The state of a run, one optimizer step, and the validation loss: pure functions, compiled once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, UInt32

from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, abstract, batch_shards
from fineline_jax.models import attention, decoder, moe
from fineline_jax.models.sharding import check_fits
from fineline_jax.recipe import Loss, Recipe
from fineline_jax.training.loss import Scalar, cross_entropy
from fineline_jax.training.optimizer import SkipState, make_optimizer

P = jax.P
State = dict[str, Any]
"""{"params": float32 parameters, "opt_state": of `make_optimizer`}; the step is kept by the caller."""
Metrics = dict[str, Scalar]
Windows = Int32[Array, "sequences length+1"]
"""Inputs are the first, targets the last `length` tokens; a row of -1 fills up the batch and is trained on nowhere."""

BATCH_SPEC = P(BATCH, None)
"""How windows lie on the mesh: rows over (replica, fsdp)."""


def initial_state(recipe: Recipe, seed: UInt32[Array, ""] | None = None) -> State:
    """The state before the first step, a function of `seed` (None: recipe.seed); under `jax.jit` and `jax.set_mesh`."""
    params = decoder.init_params(recipe.model, jax.random.key(recipe.seed if seed is None else seed))
    return {"params": params, "opt_state": make_optimizer(recipe.optimizer).init(params)}


def abstract_state(recipe: Recipe, mesh: jax.sharding.Mesh) -> State:
    """Shapes, dtypes and shardings of the state on `mesh`: the target a checkpoint is restored onto.

    Raises UserError where the model or the batch cannot be split over the mesh, or the devices lack the kernel.
    """
    check_fits(recipe.model, mesh)
    attention_of(recipe, mesh)
    shards, loss = batch_shards(mesh), recipe.loss
    for sequences in recipe.batch.sizes:
        rows, filled = sequences // recipe.batch.accumulation, padded_rows(sequences, recipe, mesh)
        exact = not (loss.load_balance or loss.router_z_loss or recipe.compute.micro_gradient_norm)
        if filled != sequences and not (exact and rows >= shards):
            raise UserError(
                f"batch.sequences / batch.accumulation = {rows} is not a multiple of mesh.replica * mesh.fsdp = "
                f"{shards}, and cannot be filled up where it is less, nor with losses of routers or"
                " compute.micro_gradient_norm; choose another mesh or batch"
            )
    return abstract(lambda: initial_state(recipe), mesh)


def padded_rows(sequences: int, recipe: Recipe, mesh: jax.sharding.Mesh) -> int:
    """Rows of the array that holds a batch of so many windows: as many on every device in every micro-batch. Those
    behind the batch weigh nothing, so that loss and gradient are exact."""
    multiple = recipe.batch.accumulation * batch_shards(mesh)
    return -(-sequences // multiple) * multiple


def make_train_step(
    recipe: Recipe, mesh: jax.sharding.Mesh
) -> Callable[[State, Windows, Scalar, Scalar], tuple[State, Metrics]]:
    """`step(state, windows, rate, weight_decay) -> (state, metrics)`, not yet jitted; donate the state.

    windows lie on the mesh as BATCH_SPEC says. rate and weight_decay are float32 arguments (`schedule.rates`), not
    constants of the program: recipes that differ in schedule, weight decay, tokens or seed alone compile to the same.
    Metrics: loss (mean cross-entropy in nats over the trained targets), gradient_norm (before clipping), update_norm,
    learning_rate, trained_tokens, and skipped (updates so far) where skipping is on.
    """
    loss_sums = make_loss_sums(recipe, mesh)

    def gradients(params: dict, windows: Windows, count: Scalar) -> tuple[Scalar, dict]:
        def mean_loss(params: dict, windows: Windows) -> tuple[Scalar, Scalar]:
            with_z, plain, of_router = loss_sums(params, windows, target_weights(recipe, windows))
            return with_z / count + of_router / recipe.batch.accumulation, plain / count

        (_, loss), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, windows)
        return loss, grads

    def step(state: State, windows: Windows, rate: Scalar, weight_decay: Scalar) -> tuple[State, Metrics]:
        params = state["params"]
        optimizer = make_optimizer(recipe.optimizer, weight_decay)
        trained = jnp.sum(target_weights(recipe, windows))
        count = jnp.maximum(trained, 1.0)
        of_micro: Metrics = {}
        if recipe.batch.accumulation == 1:
            loss, grads = gradients(params, windows, count)
        else:
            micro = micro_batches(windows, recipe.batch.accumulation)

            def add(total: tuple[Scalar, dict], batch: Windows) -> tuple[tuple[Scalar, dict], dict]:
                part = gradients(params, batch, count)
                measured = {"norm": optax.tree.norm(part[1])} if recipe.compute.micro_gradient_norm else {}
                return jax.tree.map(jnp.add, total, part), measured

            zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
            (loss, grads), measured = jax.lax.scan(add, zero, micro)
            if measured:  # the gradients of parts of the mean, not of means over the parts
                of_micro["micro_gradient_norm"] = recipe.batch.accumulation * jnp.sqrt(jnp.mean(measured["norm"] ** 2))
        norm = optax.tree.norm(grads)
        directions, opt_state = optimizer.update(grads, state["opt_state"], params, loss=loss, gradient_norm=norm)
        updates = jax.tree.map(lambda direction: -rate * direction, directions)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "update_norm": optax.tree.norm(updates),
            "learning_rate": rate,
            "trained_tokens": trained,
        } | of_micro
        if isinstance(opt_state, SkipState):
            metrics["skipped"] = opt_state.skipped.astype(jnp.float32)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, metrics

    return step


def make_validation_step(
    recipe: Recipe, mesh: jax.sharding.Mesh
) -> Callable[[dict, Windows, Float32[Array, " sequences"]], tuple[Scalar, Scalar]]:
    """`step(params, windows, weights) -> (sum of cross-entropy in nats, number of targets)`, not yet jitted.

    weights: 1.0 for rows that count, 0.0 for those that fill up the batch.
    """
    loss_sums = make_loss_sums(recipe, mesh)

    def step(params: dict, windows: Windows, weights: Float32[Array, " sequences"]) -> tuple[Scalar, Scalar]:
        of_targets = target_weights(recipe, windows) * weights[:, None]
        return loss_sums(params, windows, of_targets)[1], jnp.sum(of_targets)

    return step


def make_loss_sums(
    recipe: Recipe, mesh: jax.sharding.Mesh
) -> Callable[[dict, Windows, Float32[Array, "sequences length"]], tuple[Scalar, Scalar, Scalar]]:
    """`sums(params, windows, weights)`: the sums over targets, by weight, of (loss with z-loss, plain cross-entropy),
    and the losses of the router, which are means over all tokens of the windows."""
    compute, dtype = recipe.compute, jnp.dtype(recipe.compute.dtype)
    implementation, end = attention_of(recipe, mesh), recipe.data.mask_documents_at

    def sums(
        params: dict, windows: Windows, weights: Float32[Array, "sequences length"]
    ) -> tuple[Scalar, Scalar, Scalar]:
        inputs, targets = jnp.maximum(windows[:, :-1], 0), windows[:, 1:]
        documents = None if end is None else attention.document_numbers(inputs, end)
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape, out_sharding=BATCH_SPEC)
        model, attend = decoder.decoder_of(recipe.model, params), attention.causal(implementation, documents)
        hidden, routing = model(inputs, positions, attend, dtype, compute.remat, compute.scan_layers)
        head = decoder.head_weight(recipe.model, params)
        losses = cross_entropy(hidden, head, targets, weights, recipe.loss.z_loss, recipe.loss.chunk_tokens)
        return *losses, router_losses(recipe.loss, routing, inputs.size)

    return sums


def router_losses(loss: Loss, routing: moe.Routing | None, tokens: int) -> Scalar:
    """The weighted losses of the routers of a model with experts, 0 without."""
    total = jnp.zeros((), jnp.float32)
    if routing is not None and loss.load_balance:
        total += loss.load_balance * moe.load_balance(routing, tokens)
    if routing is not None and loss.router_z_loss:
        total += loss.router_z_loss * moe.router_z(routing, tokens)
    return total


def target_weights(recipe: Recipe, windows: Windows) -> Float32[Array, "sequences length"]:
    """1.0 where the target is trained on, else 0.0."""
    targets = windows[:, 1:]
    trained = targets >= 0
    if recipe.loss.ignore_token is not None:
        trained &= targets != recipe.loss.ignore_token
    return trained.astype(jnp.float32)


def micro_batches(windows: Windows, count: int) -> Int32[Array, "count sequences/count length+1"]:
    """The windows of each micro-batch; every device splits its own rows, none move."""
    cut = lambda rows: rows.reshape(count, rows.shape[0] // count, rows.shape[1])
    return jax.shard_map(cut, in_specs=BATCH_SPEC, out_specs=P(None, BATCH, None))(windows)


def attention_of(recipe: Recipe, mesh: jax.sharding.Mesh) -> attention.Implementation:
    """The attention implementation that the recipe gets on these devices."""
    compute, platform = recipe.compute, mesh.devices.flat[0].platform
    within_documents = recipe.data.mask_documents_at is not None
    dtype, plain = jnp.dtype(compute.dtype), recipe.model.plain_scores
    if recipe.model.logit_softcap:
        raise UserError("model.logit_softcap has no loss here, only scores; train with model.logit_softcap=0")
    return attention.pick(compute.attention, dtype, platform, within_documents, plain)
