"""What one family of released models is: its config.json both ways, and its name map."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of model is described and named in Hugging Face folders."""

    name: str
    architectures: tuple[str, ...]
    """The classes that config.json names; the first one is written."""
    from_hf: Callable[[HfConfig], ModelConfig]
    """Raises UserError naming the key for anything the decoder does not compute."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """config.json of a model, without architectures and dtype. A family can hold a model if `from_hf` gives it back."""
    weights: tuple[Weight, ...]
    """A line whose parameter a model does not have (biases, the untied head) does not count for it."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensor names that hold nothing the model needs."""
    tied_copies: tuple[str, ...] = ("lm_head.weight",)
    """Tensors that some files hold as a second copy of the embedding when it is the head."""

    def holds(self, config: ModelConfig) -> bool:
        """Whether this family's files can describe the model."""
        try:
            return self.from_hf(HfConfig(self.name, self.to_hf(config))) == config
        except UserError:
            return False
