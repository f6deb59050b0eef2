"""The critical batch size of a 5 M model on real text, measured by branches, and a batch warmup made from it.

    python benchmarks/batch_from_branches.py TEXTS OUT

TEXTS: folder of .txt files. A base run of constant batch; from three of its checkpoints, branches of four batch sizes
and two data orders each; then a run whose batch follows the critical batch sizes (Merrill et al. 2025, arXiv
2505.23971). Killed and started again, it goes on. The figures are in docs/ablate.md.
"""

import dataclasses
import sys
from pathlib import Path

import tokenizers

from fineline_jax import interface
from fineline_jax import recipe as of
from fineline_jax.ablation import batch_branches, changed
from fineline_jax.data.corpora import prepare_text
from fineline_jax.models.config import ModelConfig
from fineline_jax.training.metrics import read_metrics

VOCABULARY, LENGTH, BATCH = 4096, 128, 4
STEP = BATCH * LENGTH
STEPS, POINTS, BRANCH = 480, (60, 120, 240), 32
BATCHES, ORDERS = (4, 8, 16, 32), (0, 1)
HELD = "validation_loss/held_out"


def tokenizer(texts: list[Path], folder: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<|endoftext|>"], tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    made.train([str(path) for path in texts], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def base_recipe(data: Path) -> of.Recipe:
    return of.Recipe(
        name="base",
        model=ModelConfig(vocab_size=VOCABULARY, width=256, layers=4, heads=4, mlp_width=688, context=LENGTH),
        data=of.Data((of.Source(str(data)),), sequence_length=LENGTH),
        batch=of.Batch(BATCH),
        optimizer=of.Optimizer(of.Schedule(1e-3, 1e-4, STEPS // 16 * STEP, "wsd", decay_tokens=STEPS // 5 * STEP)),
        tokens=STEPS * STEP,
        checkpoints=of.Checkpoints(at_tokens=tuple(point * STEP for point in POINTS), latest_every_tokens=100 * STEP),
        mesh=of.MeshShape(fsdp=1),
        compute=of.Compute(dtype="float32", remat="none", scan_layers=False),
        logging=of.Logging(tensorboard=False, validation=(of.Validation(windows=128),)),
    )


def main(texts: Path, out: Path) -> None:
    files, data = sorted(texts.glob("*.txt")), out / "data"
    if not (data / "metadata.json").is_file():
        options = {"sequence_length": LENGTH, "text_unit": "paragraph", "validation_fraction": 0.02}
        prepare_text(files, data, tokenizer=tokenizer(files, out / "tokenizer"), **options)
    base = base_recipe(data)
    if interface.pretrain(base, out / "base").stopped_by:
        return
    branches = batch_branches(out / "base", POINTS, BATCHES, tokens=BRANCH * STEP)
    two_orders = dataclasses.replace(branches, seeds=ORDERS, seeded="data", keep="last")
    measured = interface.ablate(two_orders, out / "branches")
    if measured.left:  # stopped by a signal
        return
    found = measured.comparisons["critical_batch"]
    print(found.T.to_string())
    # between the smallest batch and the largest, the largest that is still within the tolerance
    within = found["critical"].fillna(found["largest"])
    schedule: list[tuple[int, int]] = []
    for point, critical in zip(found["branch"], within, strict=True):
        size = max(batch for batch in BATCHES if batch <= max(critical, BATCH))
        if size > max([BATCH, *(larger for _, larger in schedule)]):
            schedule.append((int(point), size))
    print(f"batch.schedule {schedule}, learning rate by the square root")
    warmed = changed(base, {"batch.schedule": tuple(schedule), "batch.learning_rate_rule": "square_root"})
    interface.pretrain(dataclasses.replace(warmed, name="batch_warmup"), out / "batch_warmup")
    for run in ("base", "batch_warmup"):
        last = [line for line in read_metrics(out / run) if HELD in line][-1]
        print(
            f"{run}, {base.model.parameters:,} parameters: {last['step']} steps, {last['tokens']} tokens, {last[HELD]}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
