"""The models whose files transformers opens with foreign code only, in torch, as their own modelling files say.

Names of the tensors, and what is done with each, follow modeling_baichuan.py (baichuan-inc/Baichuan-7B and
Baichuan2-7B-Base), modeling_yi.py (the first uploads of 01-ai/Yi-34B) and olmo/model.py (allenai/OLMo).
transformers loads into them by name.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class ForeignConfig(PretrainedConfig):
    model_type = "foreign"


class Rotary(nn.Module):
    """Feature j rotates with j + dim / 2."""

    def __init__(self, theta: float):
        super().__init__()
        self.theta = theta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, dim]"""
        length, dim = x.shape[-2:]
        angles = torch.arange(length)[:, None] / self.theta ** (torch.arange(0, dim, 2) / dim)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, theta: float) -> torch.Tensor:
    """Causal attention of [batch, length, features]."""
    batch, length, width = q.shape
    dim = width // heads
    q, k, v = (x.view(batch, length, -1, dim).transpose(1, 2) for x in (q, k, v))
    q, k = Rotary(theta)(q), Rotary(theta)(k)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
    scores = scores + torch.full((length, length), -torch.inf).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)


class PackedAttention(nn.Module):
    """Baichuan."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.W_pack(x).unflatten(-1, (3, -1)).unbind(-2)
        return self.o_proj(attend(q, k, v, self.config.num_attention_heads, self.config.rope_theta))


class SeparateAttention(nn.Module):
    """Yi."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        inner = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(attend(q, k, v, self.config.num_attention_heads, self.config.rope_theta))


class LlamaLikeLayer(nn.Module):
    def __init__(self, config: Any, attention: type[nn.Module], norms: tuple[str, str]):
        super().__init__()
        self.norms = norms
        self.self_attn, self.mlp = attention(config), LlamaMLP(config)
        for name in norms:
            self.add_module(name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, after = (self.get_submodule(name) for name in self.norms)
        x = x + self.self_attn(before(x))
        return x + self.mlp(after(x))


class NormHead(nn.Linear):
    """Baichuan2: the rows have length 1 when they are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, functional.normalize(self.weight))


class LlamaLike(PreTrainedModel):
    config_class = ForeignConfig
    attention: type[nn.Module] = PackedAttention
    norms = ("input_layernorm", "post_attention_layernorm")
    head: type[nn.Linear] = nn.Linear

    def __init__(self, config: Any):
        super().__init__(config)
        config.mlp_bias = False
        layers = [LlamaLikeLayer(config, self.attention, self.norms) for _ in range(config.num_hidden_layers)]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = self.head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


class BaiChuanForCausalLM(LlamaLike):
    pass


class BaichuanForCausalLM(LlamaLike):
    head = NormHead


class YiForCausalLM(LlamaLike):
    attention = SeparateAttention
    norms = ("ln1", "ln2")


class OLMoBlock(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.att_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size // 2, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.att_proj(_plain_norm(x))
        if self.config.clip_qkv is not None:
            qkv = qkv.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        x = x + self.attn_out(attend(*qkv.chunk(3, -1), self.config.n_heads, self.config.rope_theta))
        up, gate = self.ff_proj(_plain_norm(x)).chunk(2, -1)
        return x + self.ff_out(functional.silu(gate) * up)


def _plain_norm(x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-5)


class OLMoForCausalLM(PreTrainedModel):
    config_class = ForeignConfig

    def __init__(self, config: Any):
        super().__init__(config)
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList([OLMoBlock(config) for _ in range(config.n_layers)]),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(parts)
        self.post_init()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self.model.transformer
        x = parts["wte"](tokens)
        for block in parts["blocks"]:
            x = block(x)
        head = parts["wte"] if self.config.weight_tying else parts["ff_out"]
        return functional.linear(_plain_norm(x), head.weight)


def opened(folder: Any, architecture: str) -> PreTrainedModel:
    """The model in `folder`, loaded by transformers: every tensor has a place, and every place a tensor."""
    kind = {cls.__name__: cls for cls in (BaiChuanForCausalLM, BaichuanForCausalLM, YiForCausalLM, OLMoForCausalLM)}
    model, report = kind[architecture].from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()
