"""Optimizer steps of transformers' models in torch, from the definitions: what our training step is held to.

    peer = Peer(recipe, params, tmp_path / "peer")    # copies of our parameters, float32
    for index in range(3):
        expected = peer.step(windows, index)    # Step(loss, gradient_norm, learning_rate, ...)

Of ours only the recipe's values and the name maps of `checkpoints.formats.huggingface` are used.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape, Recipe

Params = dict[str, Any]
RouterLosses = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Step:
    loss: float
    """Mean cross-entropy over the trained targets of the whole batch, without z-loss and router losses."""
    gradient_norm: float
    """Before clipping."""
    update_norm: float
    learning_rate: float
    trained_tokens: int
    gradients: Params
    """Before clipping, in our names and shapes."""
    params: Params
    """After the step."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of the update that step `step`, from 0, makes: up from 0 over the warmup, down to `final` at the last token.

    In tokens, the clock of a recipe, as `Schedule` words it.
    """
    schedule, now, end = recipe.optimizer.schedule, step * recipe.tokens_per_step, recipe.tokens
    peak, final, warmup = schedule.peak, schedule.final, schedule.warmup_tokens
    if now < warmup:
        return peak * now / warmup
    done = (now - warmup) / (end - warmup)
    match schedule.kind:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - done) + final * done
        case "cosine":
            return final + (peak - final) * math.cos(math.pi * done / 2) ** 2
        case "wsd":
            return peak - (peak - final) * max(0, now - (end - schedule.decay_tokens)) / schedule.decay_tokens
    factors = [1.0] + [factor for share, factor in schedule.milestones if now >= share * end]
    return peak * factors[-1]


class Peer:
    """The torch model of a recipe's model, and its AdamW.

    params: ours, to start from. family: of the exported files; default: the first that holds the model. router_losses:
    from the output of transformers' forward pass (with `output_router_logits`) of one micro-batch to a scalar, weighted
    as the recipe says. decayed: whether a torch parameter of this name decays under decay='matrices'; default: those
    with two axes and more, other than Mamba's A_log. plain: gradient descent in place of AdamW.
    """

    def __init__(
        self,
        recipe: Recipe,
        params: Params,
        folder: Path,
        family: str | None = None,
        router_losses: RouterLosses | None = None,
        decayed: Callable[[str, Any], bool] = lambda name, p: p.ndim > 1 and not name.endswith("A_log"),
        plain: bool = False,
    ):
        torch = self.torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
        import transformers

        self.recipe, self.router_losses = recipe, router_losses
        huggingface.export_hf(recipe.model, params, folder, family=family)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.get_input_embeddings().padding_idx = None  # some families' default is an id that is trained
        optimizer, named = recipe.optimizer, dict(self.model.named_parameters())
        decays = lambda name: optimizer.decay == "all" or decayed(name, named[name])
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in named.items() if decays(name)], "weight_decay": optimizer.weight_decay},
                {"params": [p for name, p in named.items() if not decays(name)], "weight_decay": 0.0},
            ],
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
        )
        if plain:
            self.optimizer = torch.optim.SGD(list(named.values()))

    def sums(self, windows: np.ndarray) -> tuple[Any, Any, Any]:
        """Over the trained targets of `windows`: the sums of cross-entropy + z_loss * log-normaliser^2 and of plain
        cross-entropy, the validation loss's; and the model's output."""
        torch = self.torch
        windows = torch.asarray(np.asarray(windows), dtype=torch.long)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        output = self.model(inputs, **({"output_router_logits": True} if self.router_losses else {}))
        trained = torch.asarray(self.trained(windows))
        plain = torch.nn.functional.cross_entropy(output.logits.double()[trained], targets[trained], reduction="sum")
        normaliser = torch.logsumexp(output.logits.double(), -1)
        return plain + self.recipe.loss.z_loss * (normaliser[trained] ** 2).sum(), plain, output

    def trained(self, windows: np.ndarray) -> np.ndarray:
        """Which targets are trained on: not the recipe's ignore_token."""
        targets = np.asarray(windows)[:, 1:]
        ignored = self.recipe.loss.ignore_token
        return np.ones_like(targets, bool) if ignored is None else targets != ignored

    def step(self, windows: np.ndarray, index: int, parts: Sequence[Sequence[int]] | None = None) -> Step:
        """One optimizer step on windows [sequences, length + 1].

        parts: rows of each micro-batch; default: one of all. They matter to `router_losses` alone, of which the mean
        over micro-batches is taken.
        """
        windows = np.asarray(windows)
        parts = [range(len(windows))] if parts is None else parts
        assert sorted(row for part in parts for row in part) == list(range(len(windows)))
        trained = int(self.trained(windows).sum())
        count = max(1, trained)
        total, loss = 0.0, 0.0
        for part in parts:
            with_z, plain, output = self.sums(windows[list(part)])
            total, loss = total + with_z / count, loss + float(plain.detach()) / count
            if self.router_losses:
                total = total + self.router_losses(output) / len(parts)
        parameters = list(self.model.parameters())
        found = self.torch.autograd.grad(total, parameters, allow_unused=True)
        gradients = [self.torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        norm, clip = _norm(gradients), self.recipe.optimizer.clip_norm
        before = [p.detach().clone() for p in parameters]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient * (clip / norm) if norm > clip else gradient
        rate = learning_rate(self.recipe, index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        moved = _norm([p.detach() - b for p, b in zip(parameters, before, strict=True)])
        return Step(loss, norm, moved, rate, trained, self.in_our_names(gradients), self.in_our_names())

    def in_our_names(self, values: list[Any] | None = None) -> Params:
        """The parameters, or `values` in their places, as a tree of numpy arrays of ours."""
        parameters = list(self.model.parameters())
        kept = [p.data for p in parameters]
        for p, value in zip(parameters, values or kept, strict=True):
            p.data = value
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            _, params = huggingface.load_hf(
                Path(folder), make_mesh(MeshShape(), jax.devices()[:1]), config=self.recipe.model
            )
        for p, data in zip(parameters, kept, strict=True):
            p.data = data
        return jax.tree.map(np.array, params)


def _norm(tensors: list[Any]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def differing(ours: Params, theirs: Params, tolerance: float) -> dict[str, float]:
    """The parameters of which some element differs by more than `tolerance` of the largest, and by what share of it."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    found = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        share = float(np.abs(np.asarray(a, np.float64) - b).max() / max(float(np.abs(b).max()), 1e-30))
        if not share <= tolerance:
            found[jax.tree_util.keystr(path)] = share
    return found
