"""A model for lm-eval: its evaluator asks, our engine answers.

    fineline lm-eval --model fineline --model_args pretrained=runs/llama_60m,revision=step1000 --tasks piqa
    lm_eval.simple_evaluate(model=FinelineLM("runs/llama_60m", revision="step1000"), tasks=["piqa"])

Importing this module registers the name `fineline` with lm-eval.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import lm_eval.models  # noqa: F401  registers lm-eval's own models, which it does only while there are none
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from fineline_jax import progress
from fineline_jax.checkpoints.load import fetch, load, tokenizer_folder
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine.scorer import make_scorer
from fineline_jax.scoring.modes.encode import Encoder, Tokens
from fineline_jax.scoring.requests.pack import Ragged, RequestTokens
from fineline_jax.scoring.series.auto_mesh import scoring_mesh
from fineline_jax.tokenizers.open import Bos, open_tokenizer


@register_model("fineline")
class FinelineLM(TemplateLM):
    """A checkpoint behind lm-eval's interface, for tasks that are scored by log-likelihood."""

    def __init__(
        self,
        pretrained: str = "",
        revision: str | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_tokens: int | None = None,
        replica: int = 1,
        fsdp: int = -1,
        tensor: int = 1,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        """Read the weights.

        pretrained: whatever `fineline score` takes: a run, a checkpoint of a run, a Hugging Face folder, a series.
        revision: the checkpoint's name, where there are several. dtype: float32 or bfloat16, of the matrix products.
        tokenizer: its folder; default: the one beside the checkpoint. max_length: tokens of the longest row; default:
        the model's context. add_bos_token: default: as the tokenizer does. batch_tokens: tokens per step over all
        devices. replica, fsdp, tensor: devices per axis; default: a whole copy of the weights on every device if that
        fits easily, else shards. batch_size, max_batch_size and device come from lm-eval and mean nothing here.
        Raises UserError for bad values.
        """
        super().__init__()
        if jax.process_count() > 1:
            raise UserError("the lm-eval backend runs in one process; use `fineline score --distributed`")
        if unknown:
            known = "revision, dtype, tokenizer, max_length, add_bos_token, batch_tokens, replica, fsdp, tensor"
            raise UserError(f"model fineline has no argument {', '.join(unknown)}; known: pretrained, {known}")
        if not pretrained:
            raise UserError("model fineline: give --model_args pretrained=RUN, what `fineline score` takes")
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype} must be float32 or bfloat16")
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        checkpoint = find_checkpoint(pretrained, revision)
        folder = Path(tokenizer) if tokenizer else tokenizer_folder(checkpoint)
        if folder is None:
            raise UserError(f"{pretrained}: no tokenizer beside the checkpoint; give tokenizer=FOLDER")
        bos: Bos = "auto" if add_bos_token is None else "always" if add_bos_token else "never"
        self.encoder = Encoder(open_tokenizer(folder, bos), bos)
        self.tokenizer = self.encoder.tokenizer
        series = Series(checkpoint.series, (checkpoint,))
        self.mesh = scoring_mesh(MeshShape(replica, fsdp, tensor), [series], dtype)
        fetch(checkpoint)
        self.config, self.params = load(checkpoint, self.mesh, dtype)
        self.checkpoint, self.dtype, self.batch_tokens = checkpoint, dtype, batch_tokens
        self._max_length = max_length

    @property
    def max_length(self) -> int:
        return self._max_length or self.config.context

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoder.texts([string], special=add_special_tokens)[0].tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.encoder.chat(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is the greedy one) of each request."""
        pairs: list[Any] = [request.args for request in requests]
        encoded = self.encoder.pairs(pairs)
        return self._score(encoded, [_task(request) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of each request, in disjoint windows with as much left context as fits."""
        texts = self.encoder.texts([request.args[-1] for request in requests])
        scored = self._score([(None, tokens) for tokens in texts], [_task(request) for request in requests])
        return [loglikelihood for loglikelihood, _ in scored]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        encoded = [(np.array(context, np.int32), np.array(tokens, np.int32)) for _, context, tokens in requests]
        return self._score(encoded, [""] * len(requests))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises UserError: nothing is generated here."""
        tasks = ", ".join(sorted({_task(request) for request in requests}))
        raise UserError(f"model fineline scores log-likelihoods and generates no text; leave out {tasks}")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into `config` of its results."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return {
            "model_num_parameters": count,
            "model_dtype": self.dtype,
            "model_revision": self.checkpoint.name,
            "model_sha": "",
        }

    def _score(self, encoded: Sequence[tuple[Tokens | None, Tokens]], tasks: Sequence[str]) -> list[tuple[float, bool]]:
        scorer = make_scorer(
            request_tokens(encoded, tasks, self.encoder.prefix),
            self.config,
            self.mesh,
            self.dtype,
            context=self.max_length,
            batch_tokens=self.batch_tokens,
        )
        with progress.bar(f"score {self.checkpoint.name}", len(encoded), "requests") as advance:
            loglikelihood, is_greedy = scorer(self.params, advance)
        return list(zip(loglikelihood.tolist(), is_greedy.tolist(), strict=True))


def find_checkpoint(pretrained: str, revision: str | None) -> Checkpoint:
    """The one checkpoint of a series with the name `revision`. Raises UserError that lists the names."""
    series = open_series(pretrained)
    named = [one for one in series.checkpoints if revision in (None, one.name, str(one.step))]
    if len(named) != 1:
        names = ", ".join(one.name for one in series.checkpoints[:20])
        asked = f"none is called {revision!r}" if revision else "give revision=NAME"
        raise UserError(f"{pretrained} has {len(series.checkpoints)} checkpoints, {asked}; known: {names}")
    return named[0]


def _task(request: Instance) -> str:
    return request.task_name or ""


def request_tokens(encoded: Sequence[tuple[Tokens | None, Tokens]], tasks: Sequence[str], prefix: int) -> RequestTokens:
    """What the engine reads of (context, continuation) pairs; context None: a text scored whole, after `prefix`."""
    rows: dict[bytes, int] = {}
    contexts: list[Tokens] = []
    context_row = []
    for context, _ in encoded:
        row = -1 if context is None else rows.setdefault(context.tobytes(), len(rows))
        if context is not None and row == len(contexts):
            contexts.append(context)
        context_row.append(row)
    number = {task: index for index, task in enumerate(dict.fromkeys(tasks))}
    return RequestTokens(
        contexts=_ragged([*contexts, np.array([prefix], np.int32)]),
        continuations=_ragged([tokens for _, tokens in encoded]),
        context_row=np.array([len(contexts) if row < 0 else row for row in context_row], np.int32),
        task=np.array([number[task] for task in tasks], np.int32),
    )


def _ragged(rows: Sequence[Tokens]) -> Ragged:
    values = np.concatenate([*rows, np.zeros(0, np.int32)])
    return Ragged(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))
