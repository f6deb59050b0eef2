"""Checkpoints of Megatron-LM: `iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt`, a file of each tensor and pipeline
rank, or torch_dist, `.metadata` with `common.pt`; read only, dense models alone.

Outputs and inputs of matrices are joined over the ranks, gate and up apart. Older names become those of Megatron Core.
Sources: Megatron-LM's tools/checkpoint/{loader_base,schema_core}.py, megatron/training/arguments.py, core/models/gpt.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints.formats.lazy_tensor import Tensor, box, joined, unstacked
from fineline_jax.checkpoints.formats.torch_bin import read_torch_bin, torch_value
from fineline_jax.checkpoints.formats.torch_pickle import Record, View
from fineline_jax.checkpoints.formats.trainers.torch_distributed import DCP, read_dcp
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError, reading
from fineline_jax.models.families.gpt import GPT2
from fineline_jax.models.families.lines import GROUPED, fused, fused_mlp, lines
from fineline_jax.models.families.llama import LLAMA, LLAMA3_SCALING, QWEN2, QWEN3

RECORDS = r"(argparse|megatron|transformer_engine|apex|numpy|torch|_codecs|_io|builtins|__builtin__|pathlib)\.[\w.]+"
"""What the state of a trainer names beside tensors; each is a `Record`, nothing is called."""
_LAYER = "decoder.layers.{layer}."
_LINES = (
    *lines(
        _LAYER,
        "embed=embedding.word_embeddings position_embed=embedding.position_embeddings norm=decoder.final_layernorm"
        " head=output_layer attention_norm=input_layernorm mlp_norm=pre_mlp_layernorm o=self_attention.linear_proj"
        " q_norm=self_attention.q_layernorm k_norm=self_attention.k_layernorm down=mlp.linear_fc2",
    ),
    *fused(_LAYER + "self_attention.linear_qkv", GROUPED, "(heads group)"),
)
_GATED, _PLAIN = fused_mlp(_LAYER + "mlp.linear_fc1"), lines(_LAYER, "up=mlp.linear_fc1")
FAMILIES = tuple(
    dataclasses.replace(one, weights=(*_LINES, *more), tied_copies=("output_layer.weight",))
    for one, more in ((LLAMA, _GATED), (QWEN2, _GATED), (QWEN3, _GATED), (GPT2, _PLAIN))
)
RENAMED = {
    r"^language_model\.": "",
    r"^word_embeddings_for_head\.": "output_layer.",
    r"^(transformer|encoder)\.": "decoder.",
    r"\.final_(layer)?norm\.": ".final_layernorm.",
    r"\.input_norm\.|\.self_attention\.linear_qkv\.layer_norm_": ".input_layernorm.",
    r"\.post_attention_(layer)?norm\.|\.mlp\.linear_fc1\.layer_norm_": ".pre_mlp_layernorm.",
    r"\.query_key_value\.": ".linear_qkv.",
    r"\.self_attention\.dense\.": ".self_attention.linear_proj.",
    r"\.dense_h_to_4h\.": ".linear_fc1.",
    r"\.dense_4h_to_h\.": ".linear_fc2.",
}
"""Names of older code, and of Transformer Engine's norms within the matrix behind them."""
_BY_ROWS = r".*(word_embeddings|output_layer)\.weight|.*(linear_qkv|linear_fc1)\.(weight|bias)"
_BY_COLUMNS = r".*(linear_proj|linear_fc2)\.weight"
_SAME = r".*(norm\.(weight|bias)|position_embeddings\.weight|(linear_proj|linear_fc2)\.bias)"
NOT_READ = (
    *("num_experts", "multi_latent_attention", "rotary_interleaved", "apply_layernorm_1p", "window_size"),
    *("apply_residual_connection_post_layernorm", "rotary_seq_len_interpolation_factor", "hybrid_override_pattern"),
)
"""Arguments that make another model."""


def read_megatron(path: Path) -> dict[str, Tensor]:
    """The tensors of all ranks beside that of `path`, by Megatron Core's names. Raises UserError naming the file."""
    args, folder = _state(path)[1], path.parent.parent
    with reading(path, what="its args are no numbers"):
        ranks, stages = (int(args.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline"))
    files: dict[tuple[int, int], Path] = {}
    for stage, rank in itertools.product(range(stages), range(ranks)):
        file = folder / f"mp_rank_{rank:02}{f'_{stage:03}' if stages > 1 else ''}" / path.name
        if not file.is_file():
            raise UserError(f"{file}: missing; fetch it, the args mean {ranks} tensor and {stages} pipeline ranks")
        files[stage, rank] = file
    parts: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
    for (stage, rank), file in files.items():
        for name, tensor in read_torch_bin(file, RECORDS, _model).items():
            part, _, inner = name.partition(".")
            parts.setdefault((int(part), stage), [{} for _ in range(ranks)])[rank][inner] = tensor
    tensors: dict[str, Tensor] = {}
    layers = 0
    for _, of_rank in sorted(parts.items()):
        numbers = set()
        for name in dict.fromkeys(name for rank in of_rank for name in rank):
            if lost := [rank for rank, held in enumerate(of_rank) if name not in held]:
                raise UserError(f"{folder}: tensor {name} is not in that of tensor rank {lost[0]}; fetch it again")
            before, number, inner = re.fullmatch(r"(.*\.layers\.|)(\d*)(.*)", name).groups()  # pyright: ignore
            numbers |= {int(number or -1)}
            meant = f"{before}{layers + int(number) if number else ''}{inner}"
            tensors[meant] = _joined(meant, [held[name] for held in of_rank], args.get("swiglu"))
        layers += 1 + max(numbers)
    return tensors


def read_torch_dist(path: Path) -> dict[str, Tensor]:
    """The tensors of the folder of `path`, its common.pt, by Megatron Core's names. Raises UserError."""
    _state(path)
    found = unstacked(read_dcp(path.with_name(DCP.key)))
    return {_renamed(name): tensor for name, tensor in found.items() if not name.endswith("_extra_state")}


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of the model, from the arguments of the run. Raises UserError naming one that is not read."""
    file = next(path for key in KEYS if (path := folder / key).is_file())
    args = {"norm_epsilon": 1e-5, "init_method_std": 0.02, "rotary_base": 10_000} | _state(file)[1]
    needed = ("hidden_size", "num_layers", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
    if lost := [name for name in (*needed, "padded_vocab_size") if not args.get(name)]:
        raise UserError(f"{file}: its args have no {lost[0]}; put the model's config.json into {folder}")
    width, layers, inner, heads, context = (args[name] for name in needed)
    common = {
        "vocab_size": args.get("vocab_size") or args["padded_vocab_size"],
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights"),
        "initializer_range": args["init_method_std"],
    }
    positions = "rope" if args.get("use_rotary_position_embeddings") else args.get("position_embedding_type")
    kind = ("swiglu" if args.get("swiglu") else "gelu", args.get("normalization", "LayerNorm"), positions)
    kind += tuple(
        name for name in ("add_bias_linear", "add_qkv_bias", "qk_layernorm", "squared_relu") if args.get(name)
    )
    if kind == ("gelu", "LayerNorm", "learned_absolute", "add_bias_linear"):
        tanh = args.get("openai_gelu") or args.get("bias_gelu_fusion")
        return common | {
            "architectures": ["GPT2LMHeadModel"], "n_embd": width, "n_layer": layers, "n_inner": inner,
            "n_head": heads, "n_positions": context, "layer_norm_epsilon": args["norm_epsilon"],
            "activation_function": "gelu_new" if tanh else "gelu",
        }  # fmt: skip
    named = {(): "Llama", ("add_qkv_bias",): "Qwen2", ("qk_layernorm",): "Qwen3"}.get(kind[3:])
    if kind[:3] != ("swiglu", "RMSNorm", "rope") or named is None or args.get("rotary_percent", 1.0) != 1.0:
        raise UserError(f"{file}: a model of {', '.join(map(str, kind))} is not read, only Llama, Qwen2, Qwen3, GPT-2")
    scaling = LLAMA3_SCALING | {"factor": args.get("rope_scaling_factor", LLAMA3_SCALING["factor"])}
    return common | {
        "architectures": [f"{named}ForCausalLM"], "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": inner, "num_attention_heads": heads, "max_position_embeddings": context,
        "num_key_value_heads": (args.get("group_query_attention") and args.get("num_query_groups")) or heads,
        "head_dim": args.get("kv_channels") or width // heads, "rms_norm_eps": args["norm_epsilon"],
        "rope_theta": float(args["rotary_base"]), "rope_scaling": scaling if args.get("use_rope_scaling") else None,
    }  # fmt: skip


def step_and_tokens(folder: Path) -> tuple[int | None, int | None]:
    """What a checkpoint of Megatron-LM says of itself; None: it does not, or is none. Raises UserError."""
    if (path := next((path for key in KEYS if (path := folder / key).is_file()), None)) is None:
        return None, None
    state, args = _state(path)
    with reading(path, what="its args are no numbers"):
        tokens = int(args.get("consumed_train_samples") or 0) * int(args.get("seq_length") or 0)
        step = state.get("iteration", args.get("iteration"))
        return step if step is None else int(step), tokens or None


def _state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file of a rank, or common.pt, holds, and in it the arguments of the run. Raises UserError naming both."""
    value = torch_value(path, RECORDS)
    args = value.get("args") if isinstance(value, dict) else None
    old = str(value.get("checkpoint_version", 3))[:1] in "012" if isinstance(args, Record) else True
    if not isinstance(args, Record) or not isinstance(args.state, dict) or old:
        raise UserError(f"{path}: has no args of Megatron-LM, or a checkpoint_version before 3; save it again there")
    if other := [name for name in NOT_READ if args.state.get(name)]:
        raise UserError(f"{path}: {other[0]} = {args.state[other[0]]!r} is not read; convert it to Hugging Face")
    return value, args.state


def _model(value: Any) -> dict[str, View]:
    """The tensors of each part of the model in the file of a rank, "PART.NAME"; a virtual pipeline has several."""
    parts = [key for key in value if re.fullmatch(r"model\d*", str(key))] if isinstance(value, dict) else []
    return {f"{part[5:] or 0}.{_renamed(name)}": view for part in parts for name, view in _leaves(value[part])}


def _leaves(tree: Any, above: str = "") -> Iterator[tuple[str, View]]:
    """The tensors in nested dicts by path, without the scales of Transformer Engine."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, View) and not str(key).endswith("_extra_state"):
            yield f"{above}{key}", value
        yield from _leaves(value, f"{above}{key}.")


def _renamed(name: str) -> str:
    for pattern, stands in RENAMED.items():
        name = re.sub(pattern, stands, name)
    return name


def _joined(name: str, parts: Sequence[Tensor], gated: Any) -> Tensor:
    """One tensor of all ranks."""
    first = parts[0]
    axis = 0 if re.fullmatch(_BY_ROWS, name) else 1 if re.fullmatch(_BY_COLUMNS, name) else None
    same = [part.shape == first.shape and part.dtype == first.dtype for part in parts]
    if not all(same) or len(first.shape) <= (axis or 0):
        raise UserError(f"{parts[same.index(False)].file}: tensor {name} has another shape or dtype than in rank 0")
    if axis is None:
        if not re.fullmatch(_SAME, name):
            raise UserError(f"{first.file}: tensor {name} is of no dense model; convert it to Hugging Face")
        return first
    halves = 2 if gated and ".linear_fc1." in name else 1
    size = first.shape[axis] // halves
    along = lambda value, others: tuple(value if one == axis else other for one, other in enumerate(others))
    start = lambda number: along(number * size, (0,) * len(first.shape))
    pieces = [
        (start(half * len(parts) + rank), box(part, start(half), along(size, first.shape)))
        for half in range(halves)
        for rank, part in enumerate(parts)
    ]
    return joined(name, along(size * len(pieces), first.shape), pieces)


_RANK = "model_optim_rng.pt"
KEYS = (f"mp_rank_00/{_RANK}", f"mp_rank_00_000/{_RANK}", "common.pt")
MEGATRON = tuple(
    WeightFormat("Megatron-LM", pattern, read, key=key, config=config_of, families=FAMILIES, padded_vocabulary=True)
    for key, pattern, read in (
        *((key, rf"mp_rank_\d+(_\d+)?/{_RANK}", read_megatron) for key in KEYS[:2]),
        (KEYS[2], rf"common\.pt|metadata\.json|{DCP.pattern}", read_torch_dist),
    )
)
