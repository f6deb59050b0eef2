"""What is read off a scheduled module, against modules written by hand and one that XLA made here."""

import jax
import jax.numpy as jnp
import pytest

from fineline_jax.plan import hlo
from fineline_jax.plan.child import products

MODULE = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%started (p: bf16[8,4]) -> (bf16[8,4], u32[]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %inside = bf16[8,4]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %begun = (bf16[8,4]{1,0}, u32[]) custom-call(%p, %inside), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %inside = bf16[8,4]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%all-reduce-scatter.3 (p: bf16[32,4]) -> bf16[4,4] {
  %p = bf16[32,4]{1,0} parameter(0)
  %sum = bf16[32,4]{1,0} all-reduce(%p), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %own = bf16[4,4]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={4,4}
}

%body (state: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %state = (s32[], f32[64,32]{1,0}) parameter(0)
  %gather-start = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %dot.1 = f32[64,32]{1,0} fusion(%a), kind=kOutput, calls=%other, metadata={op_name="jit(step)/while/body/mlp/dot"}
  %gather-done = bf16[16,4]{1,0} all-gather-done(%gather-start)
  %late-start = ((bf16[2,4]{1,0}, f32[1,2]{1,0}), (bf16[16,4]{1,0}, f32[8,2]{1,0}), u32[]) all-gather-start(%w, %v), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %late-done = bf16[16,4]{1,0} all-gather-done(%late-start)
  %scatter = f32[8,4]{1,0} reduce-scatter(%g), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %async-collective-start.2 = (bf16[8,4]{1,0}, u32[]) fusion(%h), kind=kCustom, calls=%started
  %fusion.7 = bf16[8,4]{1,0} fusion(%h), kind=kCustom, calls=%async_collective_fusion.7
  %async-collective-done.2 = bf16[8,4]{1,0} fusion(%h), kind=kCustom, calls=%async_collective_fusion.7
  %own = bf16[4,4]{1,0} fusion(%h), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %out = (s32[], f32[64,32]{1,0}) tuple(%i, %dot.1)
}

%condition (state: (s32[], f32[64,32])) -> pred[] {
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (w: f32[64,32]) -> f32[64,32] {
  %w = f32[1024,1024]{1,0} parameter(0)
  %loop = (s32[], f32[64,32]{1,0}) while(%start), condition=%condition, body=%body
  %known = (s32[], f32[64,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %reduced = f32[64,32]{1,0} all-reduce(%x), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_go_round() -> None:
    entry, found = hlo.computations(MODULE)
    assert entry == "main" and hlo.times_run(entry, found) == {"main": 1, "body": 5 + 3}


def test_each_collective_has_its_whole_size_its_times_and_whether_it_is_hidden() -> None:
    found = {(one.kind, one.bytes, one.times, one.overlapped, one.devices) for one in hlo.collectives(MODULE)}
    assert found == {
        ("all-gather", 16 * 4 * 2, 8, 8, 8),  # over a product
        ("all-gather", 16 * 4 * 2 + 8 * 2 * 4, 8, 0, 8),  # of two arrays together, over nothing
        ("all-gather", 8 * 4 * 2, 8, 8, 4),  # in three fusions, of which one computes as well
        ("reduce-scatter", 4 * 8 * 4 * 4, 8, 0, 4),  # the whole is four times what a device keeps
        ("reduce-scatter", 32 * 4 * 2, 8, 0, 8),  # the sum of the whole, of which a fusion keeps a part
        ("all-reduce", 64 * 32 * 4, 1, 0, 8),
    }


def test_the_largest_values_are_no_arguments_and_have_their_scope() -> None:
    first = hlo.largest(MODULE)[0]
    assert first == hlo.Value("f32[64,32]", 64 * 32 * 4, "mlp")


def test_a_module_of_xla_is_read_as_it_is_written() -> None:
    """Eight devices: a gather and a scatter in each of seven rounds, and one sum."""
    mesh = jax.make_mesh((8,), ("fsdp",))

    def local(w: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jax.lax.psum_scatter(jnp.sin(x @ whole), "fsdp", scatter_dimension=0, tiled=True), None

        y = jax.lax.scan(lambda x, w: (jnp.tile(layer(x, w)[0], (8, 1)), None), x, w)[0]
        return jax.lax.psum(y, "fsdp")

    specs = jax.P(None, "fsdp"), jax.P()
    shapes = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(((7, 64, 64), (64, 64)), specs)
    )
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False))
    text = mapped.lower(*shapes).compile().as_text()
    counts = {(one.kind, one.bytes): one.times for one in hlo.collectives(text)}
    assert counts == {
        ("all-gather", 64 * 64 * 4): 7,
        ("reduce-scatter", 64 * 64 * 4): 7,
        ("all-reduce", 64 * 64 * 4): 1,
    }


def test_products_are_counted_over_loops_branches_and_devices() -> None:
    """2 * 16**3 FLOPs each: 10 in a loop, as XLA counts them where it is unrolled, and 1 on each of 8 devices."""
    one = 2 * 16**3

    def looped(x: jax.Array, unroll: bool) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=10, unroll=10 if unroll else 1)[0]

    x = jnp.ones((16, 16))
    assert products(jax.make_jaxpr(lambda x: looped(x, False))(x).jaxpr, 1) == 10 * one
    counted = jax.jit(lambda x: looped(x, True)).lower(x).compile().cost_analysis()
    assert counted["flops"] == pytest.approx(10 * one, rel=0.01)
    mesh = jax.make_mesh((8,), ("fsdp",))
    mapped = jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    assert products(jax.make_jaxpr(mapped)(x).jaxpr, 8) == 8 * one
    branched = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x, x)
    assert products(jax.make_jaxpr(branched)(x).jaxpr, 1) == one
    again = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x)))
    assert products(jax.make_jaxpr(again)(x).jaxpr, 1) == pytest.approx((2 + 1 + 4) * one)
