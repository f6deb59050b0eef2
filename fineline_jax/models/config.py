"""The shape of a decoder, without JAX, so that recipes and tables can import it."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal

from fineline_jax.errors import UserError

GATED = ("swiglu", "geglu", "geglu_tanh")
"""Kinds of MLP that have a gate."""


SAY_HOW = {
    "experts": ("shared_expert_width", "dense_layers"),
    "qk_norm": ("qk_norm_per_head",),
    "parallel_residual": ("shared_norm",),
    "window": ("full_layers", "window_rope_theta"),
    "kv_lora_rank": ("q_lora_rank", "nope_head_dim", "v_head_dim"),
    "state_heads": ("state_groups",),
}
"""Field -> fields that mean nothing without it."""
NOT_NEGATIVE = (
    *("clip_qkv", "window", "attention_scale", "attention_softcap", "logit_softcap", "window_rope_theta"),
    *("kv_lora_rank", "q_lora_rank", "shared_expert_width"),
)
ATTENTION_ONLY = (
    *("heads", "kv_heads", "head_dim", "norm_after", "parallel_residual", "attention_bias", "qkv_bias", "mlp_bias"),
    *("qk_norm", "clip_qkv", "window", "unrotated_layers", "post_norms", "kv_lora_rank", "embed_norm", "head_bias"),
    *("attention_softcap", "attention_scale", "norm_offset", "rounded_alibi"),
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary angles of a model differ from those it was first trained with; as transformers computes it."""

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """dynamic: as none up to the context, beyond which no request reaches."""
    factor: float = 1.0
    """How many times longer the context has become."""
    original_context: int = 0
    """llama3, yarn: tokens of the context before."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are stretched by the factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this stay."""
    beta_fast: float = 32.0
    """yarn: angles that turn more often than this in the original context stay."""
    beta_slow: float = 1.0
    """yarn: angles that turn less often than this are stretched by the factor."""
    truncate: bool = True
    """yarn: the two bounds are rounded to whole features."""
    attention_factor: float = 1.0
    """yarn: cos and sin are multiplied with it."""
    mscale_all_dim: float = 0.0
    """yarn: with latent attention, scores are multiplied with the square of 0.1 * this * log(factor) + 1."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are Llama's: RMSNorm before each block, rotary positions, SwiGLU, grouped queries;
    the flags below turn it into its relatives (`models.families`)."""

    vocab_size: int
    """Rows of the embedding table."""
    width: int
    """Features of the residual stream."""
    layers: int
    """Blocks of a mixer and an MLP, or of Mamba, one after the other."""
    heads: int
    """Query heads; 0 where no layer has attention."""
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
    norm: Literal["rms", "layer", "unbiased", "nonparametric"] = "rms"
    """rms: RMSNorm with a scale. layer: LayerNorm with scale and bias (GPT-NeoX). unbiased: with a scale (Cohere).
    nonparametric: with neither (OLMo)."""
    norm_offset: float = 0.0
    """Added to the scale of every norm (1: Gemma)."""
    norm_after: bool = False
    """Norms act on what attention and MLP give, not on what they get (OLMo 2); not in recurrent layers."""
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
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2", "xielu"] = "swiglu"
    """swiglu, geglu: gate, up and down, the gate through SiLU or GELU. The others: up, a function, down. gelu is exact
    (GPT-NeoX), gelu_tanh its approximation (GPT-2), relu2 the square of ReLU (Nemotron), xielu 2411.13010 (Apertus)."""
    post_norms: bool = False
    """A second norm acts on what attention and MLP give (Gemma 2)."""
    shared_norm: bool = False
    """With parallel_residual: attention and MLP share one norm (GPT-J)."""
    embed_norm: bool = False
    """A norm acts on the embedding (BLOOM)."""
    positions: Literal["rotary", "learned", "alibi", "none"] = "rotary"
    """learned: a table that is added to the embedding (GPT-2). alibi: scores fall with the distance (2108.12409)."""
    rounded_alibi: bool = False
    """With positions='alibi': Falcon's, rounded to bfloat16 (`attention.Scores.rounded`)."""
    position_offset: int = 0
    """positions='learned': the row of the first position (2: OPT)."""
    rope_scaling: RopeScaling = RopeScaling()
    """How the rotary angles are stretched."""
    rotary_interleaved: bool = False
    """Neighbouring features rotate together, not those half the rotary features apart (GPT-J)."""
    window: int = 0
    """A query sees itself and the window - 1 tokens before, except in full_layers; 0: all tokens before."""
    full_layers: tuple[int, ...] = ()
    """With a window: layers, from 0, that see all tokens before."""
    window_rope_theta: float = 0.0
    """With a window: base of the angles, not scaled, except in full_layers; 0: as rope_theta, with rope_scaling."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers, from 0, without positions (SmolLM3)."""
    qk_norm_after_rotary: bool = False
    """With qk_norm: the norm acts on what has been rotated (HunYuan)."""
    output_bias: bool = False
    """A bias on the output projection of attention alone (GPT-Neo)."""
    attention_scale: float = 0.0
    """Factor of the attention scores; 0: 1 / sqrt(head_dim)."""
    scale_by_layer: bool = False
    """The scores of layer i, from 0, are also divided by i + 1 (GPT-2 of Stanford)."""
    attention_softcap: float = 0.0
    """Scores x become this * tanh(x / this); 0: not (Gemma 2)."""
    logit_softcap: float = 0.0
    """The same for logits."""
    embed_scale: float = 1.0
    """Factor of the embedding (sqrt(width): Gemma)."""
    residual_scale: float = 1.0
    """Factor of what attention and MLP add to the stream (Granite)."""
    logit_scale: float = 1.0
    """Factor of the logits (Cohere)."""
    head_bias: bool = False
    """A bias on the logits (Phi)."""
    experts: int = 0
    """MLPs of which each token goes through `experts_per_token`; 0: one MLP for all (OLMoE, Mixtral)."""
    experts_per_token: int = 0
    """Experts that each token goes through: those that the router weighs most."""
    normalise_experts: bool = False
    """The weights of a token's experts are scaled to sum to 1 (Mixtral)."""
    shared_expert_width: int = 0
    """Hidden features of one more expert that every token goes through, its result weighted by a sigmoid of the token;
    0: none (Qwen2-MoE)."""
    ungated_shared_expert: bool = False
    """The result of the shared expert is not weighted (DeepSeek)."""
    dense_layers: int = 0
    """With experts: so many layers, the first, have one MLP for all tokens (DeepSeek)."""
    dense_mlp_width: int = 0
    """Hidden features of the MLP of dense_layers."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid: each expert's own, and a bias on each expert counts when they are chosen, not when they are weighted
    (DeepSeek-V3, 2408.15664)."""
    expert_groups: int = 1
    """Groups of experts next to each other, of which each token goes to `groups_per_token` (DeepSeek-V2): those with
    the best expert, with router='sigmoid' with the best sum of two."""
    groups_per_token: int = 1
    """Groups that each token goes to."""
    expert_scale: float = 1.0
    """Factor of the weights of a token's experts (DeepSeek-V2)."""
    kv_lora_rank: int = 0
    """Features of the vector from which the keys and values of all heads are made (latent attention, 2405.04434); 0:
    they are made from the stream."""
    q_lora_rank: int = 0
    """With kv_lora_rank: the same of the queries."""
    nope_head_dim: int = 0
    """With kv_lora_rank: features of a head that do not rotate, the first ones."""
    v_head_dim: int = 0
    """With kv_lora_rank: features of a head's values."""
    head: Literal["linear", "normalised"] = "linear"
    """normalised: every token's row of the head has length 1 (Baichuan 2)."""
    mixer: Literal["attention", "mamba", "gated_delta"] = "attention"
    """mamba: each layer is a selective state-space block instead of attention and MLP (2312.00752; with state_heads
    that of Mamba-2, 2405.21060). gated_delta: a gated delta rule (2412.06464) stands for attention."""
    attention_layers: tuple[int, ...] = ()
    """mixer='gated_delta': layers, from 0, with attention all the same (OLMo Hybrid)."""
    inner_width: int = 0
    """mixer='gated_delta': features of the values of all heads."""
    negative_eigenvalues: bool = False
    """mixer='gated_delta': the strength of a correction is up to 2, not up to 1 (2411.12537)."""
    state_size: int = 0
    """Another mixer than attention: numbers of state per inner feature."""
    conv_width: int = 0
    """Another mixer than attention: tokens seen by the causal convolution."""
    step_rank: int = 0
    """mixer='mamba' without state_heads: rank of the projection to step sizes."""
    state_norm_eps: float = 0.0
    """mixer='mamba' without state_heads: steps, and what writes into and reads the states, are divided by their root
    mean square, to whose square this is added; 0: not (Falcon-Mamba). mixer='gated_delta': the same of the norm of
    what is read from the states; 0: as norm_eps."""
    state_heads: int = 0
    """Another mixer than attention: heads, each of inner features next to each other with one decay rate and step; 0:
    every feature has its own (Mamba)."""
    state_groups: int = 0
    """With state_heads: groups of heads that share what writes into the state and what reads it."""

    def __post_init__(self) -> None:
        self._positive("vocab_size", "width", "layers", "mlp_width", "context")
        if self.mixer == "mamba":
            self._check_mamba()
        else:
            self._check_attention()
        if self.mixer == "gated_delta":
            self._check_hybrid()
        else:
            for name in ("attention_layers", "inner_width", "negative_eigenvalues"):
                self._require(not getattr(self, name), name, "needs model.mixer='gated_delta'; set it as well")
        if self.experts:
            self._check_experts()
        for other, names in SAY_HOW.items():
            for name in names:
                if getattr(self, name) and not getattr(self, other):
                    raise UserError(f"model.{name} says how model.{other} works; set model.{other} as well")

    def _require(self, condition: bool, name: str, must: str) -> None:
        if not condition:
            raise UserError(f"model.{name}={getattr(self, name)} {must}")

    def _positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) > 0, name, "must be at least 1")

    def _check_attention(self) -> None:
        self._positive("heads")
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            whole, heads = self.width % self.heads == 0, f"model.heads={self.heads}"
            self._require(whole, "width", f"is not a multiple of {heads}; set model.head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        self._positive("kv_heads", "head_dim")
        whole = self.heads % self.kv_heads == 0
        self._require(whole, "heads", f"must be a multiple of model.kv_heads={self.kv_heads}")
        share = self.rotary_fraction
        self._require(0 < share <= 1, "rotary_fraction", "must be above 0 and at most 1")
        even = self.positions != "rotary" or self.rotary_dim % 2 == 0 < self.rotary_dim
        self._require(even, "head_dim", f"* model.rotary_fraction={share} must be even for rotary positions")
        known = self.positions == "alibi" or not self.rounded_alibi
        self._require(known, "rounded_alibi", "says how positions='alibi' work; set model.positions as well")
        if self.parallel_residual and self.norm_after:
            raise UserError("model.parallel_residual and model.norm_after exclude each other; choose one")
        if self.post_norms and (self.norm_after or self.parallel_residual):
            raise UserError("model.post_norms stands beside neither norm_after nor parallel_residual; choose one")
        for name in NOT_NEGATIVE:
            self._require(getattr(self, name) >= 0, name, "must not be negative; 0 means none")
        for name in ("full_layers", "unrotated_layers"):
            known = all(0 <= layer < self.layers for layer in getattr(self, name))
            self._require(known, name, f"must name layers from 0 to {self.layers - 1}")
        scaling = self.rope_scaling
        if scaling.kind in ("llama3", "yarn") and scaling.original_context < 1:
            raise UserError(f"model.rope_scaling.original_context={scaling.original_context} must be at least 1")
        if not scaling.factor > 0:
            raise UserError(f"model.rope_scaling.factor={scaling.factor} must be above 0")
        if self.kv_lora_rank:
            self._check_latent()

    def _check_latent(self) -> None:
        within = f"model.head_dim={self.head_dim}"
        still, values = 0 < self.nope_head_dim < self.head_dim, 0 < self.v_head_dim <= self.head_dim
        self._require(still, "nope_head_dim", f"must be at least 1 and below {within}")
        self._require(values, "v_head_dim", f"must be at least 1 and at most {within}")
        usual = {"kv_heads": self.heads, "positions": "rotary", "rotary_fraction": 1, "attention_bias": False}
        usual |= {"qkv_bias": False, "output_bias": False, "qk_norm": False, "clip_qkv": 0}
        for name, value in usual.items():
            self._require(getattr(self, name) == value, name, f"is not computed with kv_lora_rank; set {value}")

    def _check_experts(self) -> None:
        chosen, groups, known = self.experts_per_token, self.expert_groups, f"model.experts={self.experts}"
        self._require(1 <= chosen <= self.experts, "experts_per_token", f"must be between 1 and {known}")
        self._require(groups > 0 and self.experts % groups == 0, "expert_groups", f"must divide {known}")
        size = self.experts // groups
        enough = chosen <= self.groups_per_token * size <= self.experts
        must = f"of {size} experts must have between model.experts_per_token={chosen} and {known}"
        self._require(enough, "groups_per_token", must)
        paired = self.router == "softmax" or groups == 1 or size > 1
        self._require(paired, "expert_groups", "must leave each at least two experts")
        self._require(0 <= self.dense_layers < self.layers, "dense_layers", f"must be between 0 and {self.layers - 1}")
        if self.dense_layers:
            self._positive("dense_mlp_width")
        if self.mlp != "swiglu" or self.mlp_bias or self.mixer != "attention":
            raise UserError(
                "model.experts needs mlp='swiglu', mlp_bias=false and mixer='attention'; set model.experts=0"
            )

    def _check_mamba(self) -> None:
        self._positive("state_size", "conv_width", "state_groups" if self.state_heads else "step_rank")
        if self.state_heads:
            for name in ("step_rank", "state_norm_eps"):
                self._require(not getattr(self, name), name, "means nothing with model.state_heads; leave it 0")
            whole = self.mlp_width % self.state_heads == 0 == self.state_heads % self.state_groups
            must = f"must divide model.mlp_width={self.mlp_width} and be a multiple of state_groups={self.state_groups}"
            self._require(whole, "state_heads", must)
        for name in ATTENTION_ONLY:
            self._require(not getattr(self, name), name, "means nothing for model.mixer='mamba'; leave it 0")
        if self.norm != "rms":
            raise UserError(f"model.norm={self.norm!r} is not computed for model.mixer='mamba'; use 'rms'")

    def _check_hybrid(self) -> None:
        self._positive("inner_width", "state_size", "conv_width", "state_heads", "state_groups")
        must = f"must divide model.inner_width={self.inner_width} and be a multiple of state_groups={self.state_groups}"
        whole = self.inner_width % self.state_heads == 0 == self.state_heads % self.state_groups
        self._require(whole, "state_heads", must)
        at = self.attention_layers
        some = sorted({*at}) == [*at] and 0 < len(at) < self.layers and 0 <= at[0] <= at[-1] < self.layers
        self._require(some, "attention_layers", f"must name some, not all, of layers 0 to {self.layers - 1}, in order")
        for name in ("step_rank", "parallel_residual", "post_norms", "kv_lora_rank"):
            self._require(not getattr(self, name), name, f"is not computed with model.mixer={self.mixer!r}; leave it 0")

    def layers_of(self, stack: str) -> Sequence[int]:
        """The numbers, from 0, of the layers whose parameters are stacked under this name: `layers`, `dense_layers` or,
        of a model that has attention beside another mixer, `recurrent_layers`."""
        if not self.attention_layers:
            ends = {"dense_layers": (0, self.dense_layers), "layers": (self.dense_layers, self.layers)}
            return range(*ends.get(stack, (0, 0)))
        others = [layer for layer in range(self.layers) if layer not in self.attention_layers]
        return {"layers": self.attention_layers, "recurrent_layers": others}.get(stack, ())

    @property
    def key_heads(self) -> int:
        """mixer='gated_delta': heads of queries and keys, which may be split over devices; else 0."""
        return self.state_groups if self.mixer == "gated_delta" else 0

    @property
    def value_dim(self) -> int:
        """mixer='gated_delta': features of the values of a head."""
        return self.inner_width // self.state_heads

    @property
    def rotary_dim(self) -> int:
        """Features of each head that rotate."""
        return self.head_dim - self.nope_head_dim if self.kv_lora_rank else int(self.head_dim * self.rotary_fraction)

    @property
    def query_scale(self) -> float:
        """Factor of the queries for attention that scales scores by 1 / sqrt(head_dim)."""
        scaling, stretch = self.rope_scaling, 1.0
        if self.kv_lora_rank and scaling.factor > 1:
            stretch += 0.1 * scaling.mscale_all_dim * math.log(scaling.factor)
        return (self.attention_scale * self.head_dim**0.5 or 1.0) * stretch**2

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.context + self.position_offset

    @property
    def plain_scores(self) -> bool:
        """Attention is a softmax of scaled products under a causal mask, as the kernels of GPU and TPU compute it."""
        return not self.window and not self.attention_softcap and self.positions != "alibi"

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
        norm = {"rms": self.width, "layer": 2 * self.width, "unbiased": self.width, "nonparametric": 0}[self.norm]
        tables = (1 if self.tied_embeddings else 2) * self.vocab_size * self.width
        tables += self.position_rows * self.width if self.positions == "learned" else 0
        tables += (norm if self.embed_norm else 0) + (self.vocab_size if self.head_bias else 0)
        if self.mixer == "mamba":
            return tables + self.layers * (self._mamba_parameters() + norm) + norm
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads) * self.width
        attention += self.head_dim * (self.heads + 2 * self.kv_heads) if self.has_qkv_bias else 0
        attention += self.width if self.attention_bias or self.output_bias else 0
        if self.qk_norm:
            attention += self.head_dim * (2 if self.qk_norm_per_head else self.heads + self.kv_heads)
        if self.kv_lora_rank:
            attention = self._latent_parameters()
        into = 2 if self.mlp in GATED else 1  # projections into the hidden layer
        mlp = (into + 1) * self.width * self.mlp_width + (4 if self.mlp == "xielu" else 0)
        mlp += into * self.mlp_width + self.width if self.mlp_bias else 0
        others, norms = 0, 4 if self.post_norms else 1 if self.shared_norm else 2
        if self.mixer == "gated_delta":  # what its layers have more, as below what those without experts have
            others = len(self.layers_of("recurrent_layers")) * (self._delta_parameters() - attention)
        if self.experts:
            mlp = experts * mlp + self.width * self.experts + (self.experts if self.router == "sigmoid" else 0)
            gate = 0 if self.ungated_shared_expert else self.width
            mlp += 3 * self.width * self.shared_expert_width + gate if self.shared_expert_width else 0
            others = self.dense_layers * (3 * self.width * self.dense_mlp_width - mlp)
        return tables + self.layers * (attention + mlp + norms * norm) + others + norm

    def _latent_parameters(self) -> int:
        queries, rank = self.heads * self.head_dim, self.q_lora_rank
        queries *= rank or self.width
        down = (self.width + 1) * (rank + self.kv_lora_rank) + self.width * self.rotary_dim
        up = self.kv_lora_rank * self.heads * (self.nope_head_dim + self.v_head_dim)
        return queries + down + up + self.heads * self.v_head_dim * self.width

    @property
    def state_io_width(self) -> int:
        """Mamba-2: features of what writes into the states and what reads them, of all groups."""
        return 2 * self.state_groups * self.state_size

    def _delta_parameters(self) -> int:
        keys, heads = 2 * self.state_groups * self.state_size, self.state_heads
        projections = self.width * (keys + 3 * self.inner_width + 2 * heads)
        return projections + self.conv_width * (keys + self.inner_width) + 2 * heads + self.value_dim

    def _mamba_parameters(self) -> int:
        if self.state_heads:
            convolved, of_heads = self.mlp_width + self.state_io_width, 3 * self.state_heads
            projections = self.width * (convolved + 2 * self.mlp_width + self.state_heads)
            return projections + convolved * (self.conv_width + 1) + of_heads + self.mlp_width
        projections = 3 * self.width + (self.step_rank + 2 * self.state_size) + self.step_rank
        convolution, step_bias, skip = self.conv_width + 1, 1, 1
        return self.mlp_width * (projections + convolution + step_bias + self.state_size + skip)

    def train_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of one trained token: forward and backward, causal attention counted as half.

        6 per weight the token goes through (the input embedding is a look-up and not counted) plus
        6 * layers * heads * head_dim * sequence_length for the two attention products (of which latent attention has
        half with v_head_dim); for a layer of another mixer instead 3 * 7 * inner width * state_size: Mamba's scan
        (step * A, exp, state * decay, input * B, their sum, state * C, its sum), or the gated delta rule token by token
        (state * decay, and products and sums of what a key reads, what is written, and what a query reads).
        """
        weights = self.active_parameters - (0 if self.tied_embeddings else self.vocab_size * self.width)
        recurrent = 0 if self.mixer == "attention" else self.layers - len(self.attention_layers)
        attention = 3.0 * (self.layers - recurrent) * self.heads * (self.head_dim + (self.v_head_dim or self.head_dim))
        attention *= sequence_length
        return 6.0 * weights + attention + 21.0 * recurrent * (self.inner_width or self.mlp_width) * self.state_size


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
