"""The shape of a decoder, without JAX, so that recipes and tables can import it."""

import dataclasses
from collections.abc import Collection
from typing import Literal

from fineline_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are Llama's: RMSNorm before each block, rotary positions, SwiGLU, grouped queries;
    the flags below turn it into its relatives (`models.families`)."""

    vocab_size: int
    """Rows of the embedding table."""
    width: int
    """Features of the residual stream."""
    layers: int
    """Blocks of attention and MLP, or of Mamba, one after the other."""
    heads: int
    """Query heads; 0 for mixer='mamba'."""
    mlp_width: int
    """Features of the MLP's hidden layer, of each expert where there are some; of the inner stream of mixer='mamba'."""
    kv_heads: int = 0
    """Key/value heads; 0: as many as query heads."""
    head_dim: int = 0
    """Features per head; 0: width / heads."""
    context: int = 2048
    """Longest sequence the model is made for, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of the rotary positions."""
    norm_eps: float = 1e-6
    """Added to the variance (RMSNorm: to the mean square) before its root is taken."""
    tied_embeddings: bool = False
    """The output head is the embedding table."""
    attention_bias: bool = False
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool = False
    """Biases on all projections of the MLP."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    norm: Literal["rms", "layer", "nonparametric"] = "rms"
    """rms: RMSNorm with a scale. layer: LayerNorm with scale and bias (GPT-NeoX). nonparametric: LayerNorm with
    neither (OLMo)."""
    norm_after: bool = False
    """Norms act on what attention and MLP give, not on what they get (OLMo 2)."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input (GPT-NeoX)."""
    rotary_fraction: float = 1.0
    """Share of each head's features that rotate, the first ones (GPT-NeoX)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections alone (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of queries and of keys over all heads at once, before they rotate (OLMo 2, OLMoE)."""
    qk_norm_per_head: bool = False
    """With qk_norm: over each head alone, all heads with the same scale (Qwen3)."""
    clip_qkv: float = 0.0
    """Queries, keys and values are clipped to +- this; 0: not (OLMo)."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu: gate, up and down. gelu: up, exact GELU, down (GPT-NeoX)."""
    experts: int = 0
    """MLPs of which each token goes through `experts_per_token`; 0: one MLP for all (OLMoE, Mixtral)."""
    experts_per_token: int = 0
    """Experts that each token goes through: those that the router weighs most."""
    normalise_experts: bool = False
    """The weights of a token's experts are scaled to sum to 1 (Mixtral)."""
    shared_expert_width: int = 0
    """Hidden features of one more expert that every token goes through, its result weighted by a sigmoid of the token;
    0: none (Qwen2-MoE)."""
    head: Literal["linear", "normalised"] = "linear"
    """normalised: every token's row of the head has length 1 (Baichuan 2)."""
    mixer: Literal["attention", "mamba"] = "attention"
    """mamba: each layer is a selective state-space block instead of attention and MLP (2312.00752)."""
    state_size: int = 0
    """mixer='mamba': numbers of state per inner feature."""
    conv_width: int = 0
    """mixer='mamba': tokens seen by the causal convolution."""
    step_rank: int = 0
    """mixer='mamba': rank of the projection to step sizes."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "mlp_width", "context"):
            _positive(name, getattr(self, name))
        if self.mixer == "mamba":
            self._check_mamba()
        else:
            self._check_attention()
        if self.experts:
            self._check_experts()
        if self.shared_expert_width and not self.experts:
            raise UserError(
                f"model.shared_expert_width={self.shared_expert_width} stands beside experts; set model.experts"
            )
        if self.qk_norm_per_head and not self.qk_norm:
            raise UserError("model.qk_norm_per_head says how model.qk_norm works; set model.qk_norm as well")

    def _check_attention(self) -> None:
        _positive("heads", self.heads)
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            if self.width % self.heads:
                raise UserError(
                    f"model.width={self.width} is not a multiple of model.heads={self.heads}; set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        _positive("kv_heads", self.kv_heads)
        _positive("head_dim", self.head_dim)
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f"model.rotary_fraction={self.rotary_fraction} must be above 0 and at most 1")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise UserError(
                f"model.head_dim={self.head_dim} * model.rotary_fraction={self.rotary_fraction}"
                " must be even for rotary positions"
            )
        if self.parallel_residual and self.norm_after:
            raise UserError("model.parallel_residual and model.norm_after exclude each other; choose one")
        if self.clip_qkv < 0:
            raise UserError(f"model.clip_qkv={self.clip_qkv} must not be negative; 0 means no clipping")

    def _check_experts(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} must be between 1 and model.experts={self.experts}"
            )
        if self.shared_expert_width < 0:
            raise UserError(f"model.shared_expert_width={self.shared_expert_width} must not be negative; 0 means none")
        if self.mlp != "swiglu" or self.mlp_bias or self.mixer != "attention":
            raise UserError(
                "model.experts needs mlp='swiglu', mlp_bias=false and mixer='attention'; set model.experts=0"
            )

    def _check_mamba(self) -> None:
        for name in ("state_size", "conv_width", "step_rank"):
            _positive(name, getattr(self, name))
        attention_only = ("heads", "kv_heads", "head_dim", "norm_after", "parallel_residual", "attention_bias")
        attention_only += ("qkv_bias", "mlp_bias", "qk_norm", "clip_qkv")
        for name in attention_only:
            if getattr(self, name):
                raise UserError(f"model.{name}={getattr(self, name)} means nothing for model.mixer='mamba'; leave it 0")
        if self.norm != "rms":
            raise UserError(f"model.norm={self.norm!r} is not computed for model.mixer='mamba'; use 'rms'")

    @property
    def rotary_dim(self) -> int:
        """Features of each head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias or self.qkv_bias

    @property
    def parameters(self) -> int:
        """Number of weights, head and embedding counted once each (once in all if tied)."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Number of weights that one token goes through: all but the experts it is not sent to."""
        return self._parameters(self.experts_per_token)

    def _parameters(self, experts: int) -> int:
        norm = {"rms": self.width, "layer": 2 * self.width, "nonparametric": 0}[self.norm]
        tables = (1 if self.tied_embeddings else 2) * self.vocab_size * self.width
        if self.mixer == "mamba":
            return tables + self.layers * (self._mamba_parameters() + norm) + norm
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads) * self.width
        attention += self.head_dim * (self.heads + 2 * self.kv_heads) if self.has_qkv_bias else 0
        attention += self.width if self.attention_bias else 0
        if self.qk_norm:
            attention += self.head_dim * (2 if self.qk_norm_per_head else self.heads + self.kv_heads)
        into = 2 if self.mlp == "swiglu" else 1  # projections into the hidden layer
        mlp = (into + 1) * self.width * self.mlp_width
        mlp += into * self.mlp_width + self.width if self.mlp_bias else 0
        if self.experts:
            mlp = experts * mlp + self.width * self.experts
            mlp += (3 * self.width * self.shared_expert_width + self.width) if self.shared_expert_width else 0
        return tables + self.layers * (attention + mlp + 2 * norm) + norm

    def _mamba_parameters(self) -> int:
        projections = 3 * self.width + (self.step_rank + 2 * self.state_size) + self.step_rank
        convolution, step_bias, skip = self.conv_width + 1, 1, 1
        return self.mlp_width * (projections + convolution + step_bias + self.state_size + skip)

    def train_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of one trained token: forward and backward, causal attention counted as half.

        6 per weight the token goes through (the input embedding is a look-up and not counted) plus
        6 * layers * heads * head_dim * sequence_length for the two attention products; for mixer='mamba' instead
        3 * 7 * layers * mlp_width * state_size for the scan (step * A, exp, state * decay, input * B, their sum,
        state * C, its sum).
        """
        weights = self.active_parameters - (0 if self.tied_embeddings else self.vocab_size * self.width)
        attention = 6.0 * self.layers * self.heads * self.head_dim * sequence_length
        return 6.0 * weights + attention + 21.0 * self.layers * self.mlp_width * self.state_size


def following(model: ModelConfig, changed: Collection[str]) -> dict[str, int]:
    """{"model.kv_heads": 0, "model.head_dim": 0}, as far as they follow heads and width: where the model's did and
    `changed`, dotted names of a recipe's fields, names those and not them.

    A recipe holds resolved values; without this a change of model.heads alone would turn full attention into grouped
    queries.
    """
    more = {}
    if "model.heads" in changed and "model.kv_heads" not in changed and model.kv_heads == model.heads:
        more["model.kv_heads"] = 0
    resized = "model.heads" in changed or "model.width" in changed
    if resized and "model.head_dim" not in changed and model.heads * model.head_dim == model.width:
        more["model.head_dim"] = 0
    return more


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"model.{name}={value} must be at least 1")
