"""Checkpoints of torch.distributed.checkpoint: torch wrote them, its own values are the oracle; nothing is executed."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.checkpoints.formats.lazy_tensor import ComputedTensor, joined, permuted
from fineline_jax.checkpoints.formats.trainers.torch_distributed import read_dcp
from fineline_jax.checkpoints.formats.weight_files import holds_weights, open_weights, weight_files
from fineline_jax.errors import UserError

SHARDED = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
import torch.multiprocessing as mp
def value(rows, columns):
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
def work(rank, folder, port):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    mesh = init_device_mesh("cpu", (2,))
    put = lambda tensor, how: distribute_tensor(tensor, mesh, [how])
    model = {"model.layers.0.mlp.up_proj.weight": put(value(7, 4), Shard(0)),
             "model.layers.0.mlp.down_proj.weight": put(value(4, 6).bfloat16(), Shard(1)),
             "model.norm.weight": put(value(1, 4)[0], Replicate())}
    state = {"model": model, "optim": {"state": {"a.exp_avg": put(value(7, 4), Shard(0))}, "lr": 0.1}, "step": 3}
    dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], int(sys.argv[2])), 2)
"""


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="pip install -e '.[test]'")


def save(torch: Any, state: Any, folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=str(folder), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    return folder


def olmo_core(torch: Any, per_head: bool) -> dict[str, Any]:
    """The names that OLMo-core gives a model of one layer, 2 heads of 3; as its export maps them."""
    torch.manual_seed(0)
    shapes = {
        "embeddings.weight": (10, 6),
        **{f"blocks.0.attention.w_{one}.weight": (6, 6) for one in ("q", "k", "v", "out")},
        **{f"blocks.0.attention.{one}_norm.weight": (3 if per_head else 6,) for one in "qk"},
        "blocks.0.attention_norm.weight": (6,),
        "blocks.0.feed_forward_norm.weight": (6,),
        "blocks.0.feed_forward.w1.weight": (8, 6),
        "blocks.0.feed_forward.w2.weight": (6, 8),
        "blocks.0.feed_forward.w3.weight": (8, 6),
        "lm_head.norm.weight": (6,),
        "lm_head.w_out.weight": (10, 6),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


LAYER = "model.layers.0."
HF_NAMES = {
    "embeddings.weight": "model.embed_tokens.weight",
    **{f"blocks.0.attention.w_{one}.weight": f"{LAYER}self_attn.{one}_proj.weight" for one in "qkv"},
    "blocks.0.attention.w_out.weight": f"{LAYER}self_attn.o_proj.weight",
    **{f"blocks.0.attention.{one}_norm.weight": f"{LAYER}self_attn.{one}_norm.weight" for one in "qk"},
    "blocks.0.feed_forward.w1.weight": f"{LAYER}mlp.gate_proj.weight",
    "blocks.0.feed_forward.w2.weight": f"{LAYER}mlp.down_proj.weight",
    "blocks.0.feed_forward.w3.weight": f"{LAYER}mlp.up_proj.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
"""OLMo-core src/olmo_core/nn/hf/convert.py; the norms of a block below."""


@pytest.mark.parametrize("per_head", [False, True])
def test_a_checkpoint_of_olmo_core_has_hugging_faces_names(tmp_path: Path, torch: Any, per_head: bool) -> None:
    model = olmo_core(torch, per_head)
    optimizer = {f"optim.state.{name}.exp_avg": torch.ones(2) for name in model}
    folder = save(torch, {f"model.{name}": tensor for name, tensor in model.items()} | optimizer, tmp_path / "dcp")
    found = open_weights(folder).tensors
    first, second = ("input", "post_attention") if per_head else ("post_attention", "post_feedforward")
    names = HF_NAMES | {
        "blocks.0.attention_norm.weight": f"{LAYER}{first}_layernorm.weight",
        "blocks.0.feed_forward_norm.weight": f"{LAYER}{second}_layernorm.weight",
    }
    assert found.keys() == set(names.values())
    for name, theirs in names.items():
        assert np.array_equal(found[theirs].whole(), model[name].numpy()), name
    assert holds_weights(folder) and {file.suffix for file in weight_files(folder)} == {"", ".distcp"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64"])
def test_every_dtype_has_the_bits_that_torch_wrote(tmp_path: Path, torch: Any, dtype: str) -> None:
    value = torch.arange(-6, 6).reshape(3, 4).to(getattr(torch, dtype))
    found = read_dcp(save(torch, {"w": value, "b": value[1]}, tmp_path) / ".metadata")
    for name, tensor in (("w", value), ("b", value[1])):
        assert found[name].dtype.name == dtype and found[name].shape == tuple(tensor.shape)
        assert found[name].whole().tobytes() == bytes(tensor.contiguous().view(torch.uint8).numpy())
    assert np.array_equal(found["w"][slice(1, 3), slice(0, 2)].astype(float), value[1:3, :2].float().numpy())


@pytest.mark.slow
def test_tensors_sharded_by_two_processes_along_either_axis_are_put_together(tmp_path: Path, torch: Any) -> None:
    script = tmp_path / "write.py"
    script.write_text(SHARDED)
    subprocess.run([sys.executable, str(script), str(tmp_path / "dcp"), "29581"], check=True, capture_output=True)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) >= 2
    found = open_weights(tmp_path / "dcp").tensors
    value = lambda rows, columns: np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    assert found.keys() == {f"layers.0.mlp.{one}_proj.weight" for one in ("up", "down")} | {"norm.weight"} or (
        found.keys() == {f"{LAYER}mlp.{one}_proj.weight" for one in ("up", "down")} | {"model.norm.weight"}
    )
    by = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    assert np.array_equal(by["layers.0.mlp.up_proj.weight"].whole(), value(7, 4))
    assert np.array_equal(by["layers.0.mlp.down_proj.weight"].whole().astype(np.float32), value(4, 6))
    assert np.array_equal(by["layers.0.mlp.up_proj.weight"][slice(2, 6), slice(1, 3)], value(7, 4)[2:6, 1:3])
    assert np.array_equal(by["norm.weight"].whole(), value(1, 4)[0])


def test_damaged_metadata_and_lost_pieces_are_named_in_one_line(tmp_path: Path, torch: Any) -> None:
    folder = save(torch, {"w": torch.ones(3, 4)}, tmp_path / "dcp")
    metadata = (folder / ".metadata").read_bytes()
    for content, said in (
        (b"", "holds a pickle that breaks off"),
        (metadata[:-9], "holds a pickle that"),
        (pickle.dumps({"a": 1}), "not the metadata of a distributed checkpoint"),
        (
            metadata.replace(b"torch.distributed.checkpoint.metadata", b"os.system.of.the.evil.who.metadata.x", 1),
            "holds",
        ),
    ):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            read_dcp(folder / ".metadata")
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    (folder / ".metadata").write_bytes(metadata)
    piece = next(folder.glob("*.distcp"))
    kept = piece.read_bytes()
    for content in (None, kept[:100], b"x" * len(kept)):
        piece.unlink() if content is None else piece.write_bytes(content)
        with pytest.raises(UserError, match=r"__0_0\.distcp") as error:
            open_weights(folder).tensors["w"].whole()
        assert "\n" not in str(error.value)
        piece.write_bytes(kept)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boxes_are_joined_and_rows_permuted_as_numpy_does(data: st.DataObject) -> None:
    """Universal: whatever the cuts, any part of the joined tensor is that part of the whole."""
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    whole = np.arange(rows * columns).reshape(rows, columns)
    cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in (rows, columns)]
    stored = lambda array: ComputedTensor("w", Path("f"), array.dtype, array.shape, lambda index: array[index])
    boxes = [
        ((r, c), stored(whole[r:s, c:d])) for r, s in zip(cuts[0], cuts[0][1:]) for c, d in zip(cuts[1], cuts[1][1:])
    ]
    part = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in whole.shape
    )
    assert np.array_equal(joined("w", whole.shape, boxes)[part], whole[part])
    order = np.array(data.draw(st.permutations(range(rows))))
    assert np.array_equal(permuted(stored(whole), order)[part], whole[order][part])
