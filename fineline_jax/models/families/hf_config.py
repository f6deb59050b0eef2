"""A Hugging Face config.json, read key by key, with errors that name the file and the key."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fineline_jax.errors import UserError
from fineline_jax.models.config import RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim", "finetuned"
}  # fmt: skip
"""What may stand in a table of rotary angles."""
LARGEST = 1 << 40
"""No size and no number of a model is larger; products of them are then short to print."""


class Rope(NamedTuple):
    """What a family's class takes where the file says nothing of rotary positions."""

    theta: float = 10_000.0
    fraction: float = 1.0
    window_theta: float = 0.0
    """Of layers with a window, if they have angles of their own."""
    theta_keys: tuple[str, ...] = ("rope_theta",)
    """Where older files have the base; the first is written."""
    fraction_keys: tuple[str, ...] = ()
    """The same of the share of rotating features; (): the class turns all."""


class Windows(NamedTuple):
    """Which layers a family's class lets see everything, where the file says nothing of it."""

    window: int | None
    """None: no window."""
    is_full: Callable[[int, "HfConfig"], bool] = lambda layer, raw: False
    in_use: bool | None = None
    """Of use_sliding_window; None: the class has no such key."""
    by_layer: bool = True
    """The class reads layer_types; else all layers have the window."""


@dataclasses.dataclass(frozen=True)
class HfConfig:
    """The content of a config.json."""

    where: str
    """For messages: the path of the file."""
    raw: Mapping[str, Any]

    def find(self, *keys: str) -> Any:
        """The first of these keys that is there and not null; else None."""
        return next((self.raw[key] for key in keys if self.raw.get(key) is not None), None)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The whole number under the first of `keys`. Raises UserError without one, unless there is a default."""
        value = self._typed(keys, default, int, "a whole number")
        if abs(value) > LARGEST:
            raise UserError(f"{self.where}: {keys[0]}={str(value)[:20]}… is no size of a model; fetch the file again")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """The number, 0 or more, under the first of `keys`. Raises UserError without one, unless there is a default."""
        value = self._typed(keys, default, (int, float), "a number")
        if not 0 <= value <= LARGEST:  # NaN is neither
            raise UserError(
                f"{self.where}: {keys[0]}={str(value)[:20]} is not a number from 0 on; fetch the file again"
            )
        return float(value)

    def items(self, key: str, kind: type) -> list[Any]:
        """The list under `key`; empty without one."""
        value = self.find(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise UserError(f"{self.where}: {key}={value!r} is not a list of {kind.__name__}; fetch the file again")
        return value

    def flag(self, *keys: str, default: bool) -> bool:
        return self._typed(keys, default, bool, "true or false")

    def _typed(self, keys: tuple[str, ...], default: Any, kind: Any, name: str) -> Any:
        value = self.find(*keys)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where}: {keys[0]} is missing; fetch the file again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where}: {keys[0]}={value!r} is not {name}; fetch the file again")
        return value

    def only(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Raise UserError if `key` is there with a value that is none of `allowed`. default: what its absence means."""
        value = self.raw.get(key, default)
        if value is not None and value not in allowed:
            self.refuse(key, value)

    def refuse(self, key: str, value: Any) -> None:
        raise UserError(f"{self.where}: {key}={value!r} is not computed; use a model without it")

    def table(self, key: str) -> Mapping[str, Any]:
        """The table under `key`; empty without one."""
        values = self.raw.get(key) or {}
        if not isinstance(values, Mapping):
            raise UserError(f"{self.where}: {key}={values!r} is not a table; fetch the file again")
        return values

    def rotary(self, context: int, rope: Rope) -> dict[str, Any]:
        """Fields of the rotary positions, from rope_parameters (transformers 5) or rope_scaling and older keys.

        Raises UserError for a scaling that is not computed.
        """
        older, newer = self.table("rope_scaling"), self.table("rope_parameters")
        local: Mapping[str, Any] = {}
        if rope.window_theta:
            nested = HfConfig(f"{self.where}: rope_parameters", newer)
            for name in newer.keys() - {FULL, SLIDING}:
                nested.refuse(name, newer[name])
            newer, local = nested.table(FULL), nested.table(SLIDING)
            if local.get("rope_type", local.get("type", "default")) != "default":
                nested.refuse("sliding_attention", dict(local))
        key = "rope_scaling" if older else "rope_parameters"
        kind = older.get("rope_type", older.get("type")) if older else newer.get("rope_type", newer.get("type"))
        if kind not in (*SCALINGS, None) or (older and kind is None):
            raise UserError(f"{self.where}: {key}: {kind!r} rotary scaling is not computed; use a model without it")
        turns = HfConfig(f"{self.where}: {key}", {**newer, **older})
        for name in turns.raw.keys() - ROPE_KEYS:
            turns.refuse(name, turns.raw[name])
        usual = self.number(*rope.theta_keys, default=rope.theta)
        fields: dict[str, Any] = {"rope_theta": turns.number("rope_theta", default=usual)}
        share = self.number(*rope.fraction_keys, "partial_rotary_factor", default=rope.fraction)
        fields["rotary_fraction"] = share = turns.number("partial_rotary_factor", default=share)
        if share != 1 and not rope.fraction_keys:
            self.refuse("partial_rotary_factor", share)
        if rope.window_theta:
            older_local = self.number("rope_local_base_freq", default=rope.window_theta)
            base = HfConfig(f"{self.where}: rope_parameters", local).number("rope_theta", default=older_local)
            fields["window_rope_theta"] = base
        for name in ("rope_theta", "window_rope_theta"):
            if not fields.get(name, 1) > 0:
                raise UserError(f"{self.where}: {name}={fields[name]!r} is not above 0; fetch the file again")
        if kind not in ("default", None):
            fields["rope_scaling"] = self._scaling(turns, kind, context)
        return fields

    def _scaling(self, turns: "HfConfig", kind: str, context: int) -> RopeScaling:
        if kind in ("linear", "dynamic"):
            return RopeScaling(kind, turns.number("factor"))
        original = self.integer("original_max_position_embeddings", default=0)  # Phi-3 has it outside
        original = original or turns.integer("original_max_position_embeddings", default=context)
        if kind == "llama3":
            low, high = turns.number("low_freq_factor"), turns.number("high_freq_factor")
            return RopeScaling("llama3", turns.number("factor"), original, low, high)
        factor = turns.number("factor", default=context / original if "factor" in turns.raw else None)  # null
        stretch = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
        both = [turns.number(name, default=0.0) for name in ("mscale", "mscale_all_dim")]
        usual = stretch(both[0]) / stretch(both[1]) if all(both) else stretch(1.0)
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=turns.number("beta_fast", default=0.0) or 32.0,
            beta_slow=turns.number("beta_slow", default=0.0) or 1.0,
            truncate=turns.flag("truncate", default=True),
            attention_factor=turns.number("attention_factor", default=usual),
            mscale_all_dim=both[1],
        )

    def layer_types(self, layers: int, windows: Windows) -> tuple[int, list[str]]:
        """The window, 0 for none, and the kind of each layer."""
        null = "sliding_window" in self.raw and self.raw["sliding_window"] is None
        window = 0 if null else self.integer("sliding_window", default=windows.window or 0)
        if windows.in_use is not None and not self.flag("use_sliding_window", default=windows.in_use):
            window = 0
        usual = [FULL if not window or windows.is_full(layer, self) else SLIDING for layer in range(layers)]
        kinds = (self.items("layer_types", str) or usual)[:layers]
        known = {FULL, SLIDING} if windows.by_layer or not window else {SLIDING}
        if len(kinds) < layers or not known.issuperset(kinds):
            self.refuse("layer_types", next((kind for kind in kinds if kind not in known), kinds))
        return window, kinds

    def no_window(self, context: int, known: tuple[str, ...] = ()) -> None:
        """Raise UserError if attention reaches less far back than the context. known: further kinds of layers."""
        window = self.integer("sliding_window", default=context)
        if window < context and self.raw.get("use_sliding_window") is not False:
            self.refuse("sliding_window", window)
        others = [kind for kind in self.items("layer_types", str) if kind not in (FULL, *known)]
        if others and (self.find("sliding_window") is None or window < context):
            self.refuse("layer_types", others[0])
