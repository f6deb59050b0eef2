"""What one family of released models is: its config.json as a table, read and written by the same lines, and its name
map."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.hf_config import FULL, SLIDING, HfConfig, Rope, Windows
from fineline_jax.models.families.name_map import Weight


class Turned(NamedTuple):
    """A key whose number is not the field's own."""

    key: str
    default: float | None
    field_of: Callable[[float], float]
    key_of: Callable[[float], float]


Keys = Mapping[str, "str | tuple[Any, ...] | Turned"]
"""Field of `ModelConfig` -> its key, which the file must have, or its keys (the first is written), then what the class
takes where the file is silent: ... for nothing, None for the default of `ModelConfig` or of `Family.read_more`."""
SCALINGS = {
    "none": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_context", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale_all_dim"),
    ),
}
"""The fields of `RopeScaling` that count for each kind."""
KINDS = {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
USUAL = Rope()
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
GATES |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "geglu_tanh")
"""Name of a gate's function in config.json -> `ModelConfig.mlp`."""
ACTIVATIONS = {name: name for name in ("gelu", "relu", "relu2", "xielu")}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
"""The same of an MLP without a gate."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of model is described and named in Hugging Face folders."""

    name: str
    architectures: tuple[str, ...]
    """The classes that config.json names; the first one is written."""
    keys: Keys
    weights: tuple[Weight, ...]
    """A line whose parameter a model does not have (biases, the untied head) does not count for it."""
    model_type: str = ""
    """As in config.json; default: the name."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that all models of the family share."""
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Keys that have one of these values or are absent; the first is written, unless it is None."""
    gated: bool = True
    rope: Rope | None = USUAL
    """None: no rotary positions."""
    windows: Windows | None = None
    """None: the class knows no windows; one that is shorter than the context is refused."""
    read_more: Callable[[HfConfig, dict[str, Any]], Mapping[str, Any]] = lambda raw, fields: {}
    """Further fields, from the file and those read. Raises UserError naming the key for what is not computed."""
    write_more: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}
    kinds: tuple[str, ...] = ()
    """Of layer_types, those that `read_more` reads."""
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Parts of tensor names in some files -> what `weights` has for them."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensor names that hold nothing the model needs."""
    tied_copies: tuple[str, ...] = ("lm_head.weight",)
    """Tensors that some files hold as a second copy of the embedding when it is the head."""

    def like(self, name: str, architecture: str, **changes: Any) -> "Family":
        """This family but for `changes`; the tables among them add to its own, where None takes a line away.

        silent: field -> what this class takes where the file is silent.
        """
        keys = dict(self.keys)
        for field, default in changes.pop("silent", {}).items():
            keys[field] = (*keys[field][:-1], default)
        changes["keys"] = {**keys, **changes.get("keys", {})}
        for table in ("keys", "fixed", "only"):
            merged = {**getattr(self, table), **changes.get(table, {})}
            changes[table] = {key: value for key, value in merged.items() if value is not None}
        return dataclasses.replace(
            self, **{"model_type": "", "name": name, "architectures": (architecture,), **changes}
        )

    def holds(self, config: ModelConfig) -> bool:
        """Whether this family's files can describe the model."""
        try:
            return self.from_hf(HfConfig(self.name, self.to_hf(config))) == config
        except UserError:
            return False

    def means(self, raw: HfConfig) -> bool:
        """Whether the file's `only` keys are this family's, where two have the same class."""
        return all(raw.raw.get(key) in (None, *allowed) for key, allowed in self.only.items())

    def lines(self, config: ModelConfig) -> tuple[Weight, ...]:
        """The name map of a model: `weights` with the sizes in braces filled in: h heads, k key heads and g = h / k;
        r of a short vector of keys and values, n features of a head that do not rotate, v of its values; of Mamba-2 i
        features of the inner stream and c with what writes and reads the states."""
        if not config.heads:
            inner, io = config.mlp_width, config.state_io_width
            sizes = {"i": inner, "ii": 2 * inner, "c": inner + io, "ic": 2 * inner + io}
            sizes["all"] = sizes["ic"] + config.state_heads
            return tuple(dataclasses.replace(one, axes=one.axes.format(**sizes)) for one in self.weights)
        h, k = config.heads, config.kv_heads
        sizes = {"h": h, "hk": h + k, "hkk": h + 2 * k, "g": h // k, "g1": h // k + 1, "g2": h // k + 2}
        rank, still = config.kv_lora_rank, config.nope_head_dim
        sizes |= {"r": rank, "rr": rank + config.rotary_dim, "n": still, "nv": still + config.v_head_dim}
        numbers = {stack: config.layers_of(stack) for stack in ("layers", "dense_layers", "recurrent_layers")}
        of = lambda weight: numbers.get(weight.ours.partition(".")[0])
        fill = lambda weight: dataclasses.replace(weight, axes=weight.axes.format(**sizes), layers=of(weight))
        return tuple(map(fill, self.weights))

    def from_hf(self, raw: HfConfig) -> ModelConfig:
        """Raises UserError naming the key for anything the decoder does not compute."""
        for key, allowed in {"quantization_config": (None,), **self.only}.items():
            raw.only(key, *allowed)
        fields = {field: self._value(raw, field, key) for field, key in self.keys.items()}
        if "num_key_value_heads" in raw.raw and raw.raw["num_key_value_heads"] is None:
            fields.pop("kv_heads", None)
        fields = {field: value for field, value in fields.items() if value is not None} | dict(self.fixed)
        rotary = raw.rotary(fields["context"], self.rope) if self.rope is not None else {}
        if self.windows is None:
            raw.no_window(fields["context"], self.kinds)
            rotary.pop("window_rope_theta", None)
        else:
            _add_windows(fields, rotary, *raw.layer_types(fields["layers"], self.windows))
        return ModelConfig(**fields | rotary | dict(self.read_more(raw, fields)))

    def _value(self, raw: HfConfig, field: str, key: "str | tuple[Any, ...] | Turned") -> Any:
        if isinstance(key, Turned):
            value = raw.number(key.key, default=key.default)
            if not value > 0:
                raise UserError(f"{raw.where}: {key.key}={value!r} is not above 0; fetch the file again")
            return key.field_of(value)
        *names, default = (key, ...) if isinstance(key, str) else key
        if field == "mlp":
            value: Any = raw.find(*names) or default
            known = GATES if self.gated else ACTIVATIONS
            if value not in list(known):
                raw.refuse(names[0], value)
            return known[value]
        if raw.find(*names) is None:
            if default is None:
                return None
            if field.endswith("softcap") and names[0] in raw.raw:
                return 0.0
        read: Any = {bool: raw.flag, float: raw.number}.get(KINDS[field], raw.integer)
        return read(*names, default=None if default is ... else default)

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """config.json of a model, without architectures and dtype, for transformers 4 and 5. A family can hold a model
        if `from_hf` gives it back."""
        written: dict[str, Any] = {"model_type": self.model_type or self.name}
        for field, key in self.keys.items():
            value: Any = getattr(config, field)
            if field == "mlp":
                known = GATES if self.gated else ACTIVATIONS
                names = [name for name in (str(key[-1]), *known) if known.get(name) == value]
                value = names[0] if names else None
            elif field.endswith("softcap"):
                value = value or None
            if isinstance(key, Turned):
                number = round(key.key_of(value), 10) if value else 0.0
                written[key.key] = int(number) if number.is_integer() else number
            else:
                written[key if isinstance(key, str) else key[0]] = value
        written |= {key: allowed[0] for key, allowed in self.only.items() if allowed[0] is not None}
        if self.windows is not None:
            full = config.full_layers if config.window else range(config.layers)
            written["sliding_window"] = config.window or None
            if self.windows.by_layer:
                written["layer_types"] = [FULL if layer in full else SLIDING for layer in range(config.layers)]
            if self.windows.in_use is not None:
                written["use_sliding_window"] = bool(config.window)
        if self.rope is not None:
            written |= self._rope_to_hf(config, self.rope)
        return written | {"use_cache": True} | dict(self.write_more(config))

    def _rope_to_hf(self, config: ModelConfig, rope: Rope) -> dict[str, Any]:
        scaling, theta = config.rope_scaling, config.rope_theta
        names = {"original_context": "original_max_position_embeddings"}
        scaled = {names.get(field, field): getattr(scaling, field) for field in SCALINGS[scaling.kind]}
        turns = {"rope_type": "default" if scaling.kind == "none" else scaling.kind, **scaled}
        parameters: dict[str, Any] = {**turns, "rope_theta": theta}
        older: dict[str, Any] = {rope.theta_keys[0]: theta}
        for key in rope.fraction_keys[:1]:
            parameters["partial_rotary_factor"] = older[key] = config.rotary_fraction
        if rope.window_theta:
            local = config.window_rope_theta or theta
            parameters = {FULL: parameters, SLIDING: {"rope_type": "default", "rope_theta": local}}
            older["rope_local_base_freq"] = local
        return {**older, "rope_parameters": parameters} | ({"rope_scaling": turns} if scaled else {})


def _add_windows(fields: dict[str, Any], rotary: dict[str, Any], window: int, kinds: list[str]) -> None:
    """The fields of windows; of angles of their own only where these differ, and of a window only where it is shorter
    than the context or its layers turn otherwise."""
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)
    local = rotary.pop("window_rope_theta", None)
    own = local is not None and (local != rotary["rope_theta"] or "rope_scaling" in rotary)
    if window and len(full) < len(kinds) and (own or window < fields["context"]):
        fields |= {"window": window, "full_layers": full} | ({"window_rope_theta": local} if own else {})
