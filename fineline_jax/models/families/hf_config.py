"""A Hugging Face config.json, read key by key, with errors that name the file and the key."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fineline_jax.errors import UserError

LARGEST = 1 << 40
"""No size and no number of a model is larger; products of them are then short to print."""


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

    def rope(self) -> Mapping[str, Any]:
        """rope_parameters (transformers 5). Raises UserError for any scaling of the rotary angles."""
        rope, scaling = self.raw.get("rope_parameters") or {}, self.raw.get("rope_scaling") or {}
        for key, values in (("rope_parameters", rope), ("rope_scaling", scaling)):
            if not isinstance(values, Mapping):
                raise UserError(f"{self.where}: {key}={values!r} is not a table; fetch the file again")
            kind = values.get("rope_type", values.get("type"))
            if kind not in ("default", None) or (key == "rope_scaling" and values and kind is None):
                raise UserError(f"{self.where}: {key}: {kind!r} rotary scaling is not computed; use a model without it")
        return rope

    def rope_theta(self, *keys: str, default: float = 10_000.0) -> float:
        """The base of the rotary angles, from rope_parameters or the older `keys` (default: rope_theta)."""
        older = self.number(*(keys or ("rope_theta",)), default=default)
        theta = HfConfig(f"{self.where}: rope_parameters", self.rope()).number("rope_theta", default=older)
        if not theta > 0:
            raise UserError(f"{self.where}: rope_theta={theta!r} is not above 0; fetch the file again")
        return theta

    def no_window(self, context: int) -> None:
        """Raise UserError if attention reaches less far back than the context."""
        window = self.integer("sliding_window", default=context)
        if window < context and self.raw.get("use_sliding_window") is not False:
            self.refuse("sliding_window", window)
        others = [kind for kind in self.items("layer_types", str) if kind != "full_attention"]
        if others and (self.find("sliding_window") is None or window < context):
            self.refuse("layer_types", others[0])
