"""The whole way on real text: a 7 M model, killed again and again, and scored on real benchmarks."""

import random
import time
from pathlib import Path

import pytest
import tokenizers
from commands import assert_same_run, start, wait_for_step

from fineline_jax.checkpoints.open import open_series
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Compute,
    Data,
    Every,
    Logging,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    Validation,
    to_json,
)
from fineline_jax.scoring.metrics import tidy
from fineline_jax.training.metrics import read_metrics

VOCABULARY, LENGTH, SEQUENCES, STEPS = 4096, 256, 8, 45


def train_tokenizer(texts: list[Path], folder: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in texts], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run_command(*arguments: str) -> str:
    process = start(list(arguments))
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_five_sigkills_on_real_text_leave_no_trace_and_the_series_is_scored(shared_data, tmp_path):
    texts = [
        shared_data / "text" / name for name in ("tinyshakespeare.txt", "wikitext2_valid.txt", "wikitext2_test.txt")
    ]
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer")
    data = tmp_path / "data"
    run_command(
        "data", "prepare", "text", *map(str, texts), "--tokenizer", str(tokenizer), "--out", str(data),
        "--sequence-length", str(LENGTH), "--text-unit", "paragraph", "--validation-fraction", "0.02",
    )  # fmt: skip
    tokens_per_step = SEQUENCES * LENGTH
    recipe = Recipe(
        name="real",
        model=ModelConfig(vocab_size=VOCABULARY, width=256, layers=6, heads=8, mlp_width=688, context=LENGTH),
        data=Data((Source(str(data)),), sequence_length=LENGTH),
        batch=Batch(SEQUENCES),
        optimizer=Optimizer(Schedule(peak=1e-3, final=1e-4, warmup_tokens=5 * tokens_per_step)),
        tokens=STEPS * tokens_per_step,
        checkpoints=Checkpoints(every=(Every(5 * tokens_per_step),), latest_every_tokens=3 * tokens_per_step),
        mesh=MeshShape(fsdp=1),
        compute=Compute(dtype="float32", remat="none", scan_layers=False),
        logging=Logging(tensorboard=False, validation=(Validation(windows=8),)),
    )
    assert 5e6 < recipe.model.parameters < 10e6
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_command("pretrain", str(tmp_path / "recipe.json"), "--run", str(whole))
    moments = random.Random(11)
    for _ in range(5):
        process = start(["pretrain", str(tmp_path / "recipe.json"), "--run", str(killed)])
        done = max((line["step"] for line in read_metrics(killed)), default=0)
        wait_for_step(killed, min(done + moments.randrange(3, 9), STEPS - 1), process)
        time.sleep(moments.random())
        process.kill()
        process.communicate()
    run_command("pretrain", str(tmp_path / "recipe.json"), "--run", str(killed))
    assert_same_run(killed, whole, recipe)
    assert len(open_series(str(killed)).checkpoints) == 10
    losses = [line["loss"] for line in read_metrics(killed) if "loss" in line]
    assert losses[-1] < losses[0] - 1.5

    run_command(
        "score", str(killed), "--suite", "piqa,lambada_openai", "--benchmarks", str(shared_data / "benchmarks"),
        "--limit", "100", "--out", str(tmp_path / "scores"),
    )  # fmt: skip
    table = tidy.tidy(tmp_path / "scores")
    assert set(table.task) == {"piqa", "lambada_openai"}
    assert table.groupby(["task", "metric"]).checkpoint.nunique().eq(10).all()
    perplexity = table[(table.task == "lambada_openai") & (table.metric == "perplexity")].sort_values("tokens").value
    assert perplexity.iloc[-1] < perplexity.iloc[0] / 3
