"""The shape of a decoder, without JAX, so that recipes and tables can import it."""

import dataclasses

from fineline_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm before each block, rotary positions, SwiGLU, grouped queries."""

    vocab_size: int
    """Rows of the embedding table."""
    width: int
    """Features of the residual stream."""
    layers: int
    heads: int
    """Query heads."""
    mlp_width: int
    """Features of the SwiGLU hidden layer."""
    kv_heads: int = 0
    """Key/value heads; 0: as many as query heads."""
    head_dim: int = 0
    """Features per head; 0: width / heads."""
    context: int = 2048
    """Longest sequence the model is made for, in tokens."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    """The output head is the embedding table."""
    attention_bias: bool = False
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool = False
    """Biases on the gate, up and down projections."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "mlp_width", "context"):
            _positive(name, getattr(self, name))
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
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even for rotary positions")

    @property
    def parameters(self) -> int:
        """Number of weights, head and embedding counted once each (once in all if tied)."""
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads) * self.width
        if self.attention_bias:
            attention += self.head_dim * (self.heads + 2 * self.kv_heads) + self.width
        mlp = 3 * self.width * self.mlp_width + (2 * self.mlp_width + self.width if self.mlp_bias else 0)
        tables = (1 if self.tied_embeddings else 2) * self.vocab_size * self.width
        return tables + self.layers * (attention + mlp + 2 * self.width) + self.width

    def train_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of one trained token: forward and backward, causal attention counted as half.

        6 per matmul weight (the input embedding is a look-up and not counted) plus
        6 * layers * heads * head_dim * sequence_length for the two attention products.
        """
        matmul = self.parameters - (0 if self.tied_embeddings else self.vocab_size * self.width)
        return 6.0 * matmul + 6.0 * self.layers * self.heads * self.head_dim * sequence_length


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"model.{name}={value} must be at least 1")
