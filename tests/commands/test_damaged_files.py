"""Every kind of file that is read, damaged at random: the same result, or one line that names the file.

A damage is a truncation, one flipped bit, two blocks that change places, or (of JSON) two values that do. A format
without a digest cannot notice every damage: how often its result was another one without a word is counted and
printed, and is zero where the file carries a digest of its content.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_examples import jsonl, letters_tokenizer
from easylm_examples import write_stream
from metric_examples import docs, packed, task
from safetensors.numpy import save_file
from scoring_examples import write_tokenizer

from fineline_jax import recipe as recipes
from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.formats.huggingface import config_from_hf
from fineline_jax.checkpoints.formats.weight_files import open_weights
from fineline_jax.checkpoints.registry.entries import checkpoints, entries, series_files
from fineline_jax.checkpoints.registry.step_names import step_and_tokens
from fineline_jax.checkpoints.runs.digest_record import read_record, write_record
from fineline_jax.data.corpora import prepare_text
from fineline_jax.data.documents import read_documents
from fineline_jax.data.storage import open_data_set
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.llama import LLAMA
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.requests.suite import read_suite
from fineline_jax.tokenizers.identity import encode
from fineline_jax.tokenizers.open import open_tokenizer
from fineline_jax.trajectories.table import read_table

LONGEST = 20
"""Seconds for one file of a few kB."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file that is read: `make` writes it, and what belongs to it, into a folder; `read` gives all that it says."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    has_digest: bool = False
    share: float = 1.0
    """Of the number of damages; fewer where reading takes long."""


RNG = np.random.default_rng(5)
TENSORS = {f"model.layers.{i}.w": RNG.normal(size=(4, 6)).astype(np.float32) for i in range(4)}
SHAPE = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, mlp_width=24, context=32)
TEXTS = [f"the cat {i} runs under the house" for i in range(40)]


def tensors(folder: Path) -> Any:
    return {name: (one.shape, one.whole().tobytes()) for name, one in open_weights(folder).tensors.items()}


def torch_bin(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    torch.save({name: torch.asarray(one) for name, one in TENSORS.items()}, folder / "pytorch_model.bin")


def megatron(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    names = {"embedding.word_embeddings.weight": (8, 4), "decoder.layers.0.mlp.linear_fc1.weight": (6, 4)}
    state = {"args": argparse.Namespace(num_layers=1, swiglu=True, seq_length=16, consumed_train_samples=4)}
    state |= {"iteration": 4, "model": {name: torch.asarray(RNG.normal(size=size)) for name, size in names.items()}}
    (folder / "mp_rank_00").mkdir()
    torch.save(state, folder / "mp_rank_00/model_optim_rng.pt")


def maxtext(folder: Path) -> None:
    state = {
        "params": {"params": {"decoder": {"decoder_norm": {"scale": np.ones(4, np.float32)}}}},
        "step": np.int32(4),
    }
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(folder / "items", state)
    (folder / "config.json").write_text("{}")


def index(folder: Path) -> None:
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    for file, name in zip(names, TENSORS):
        save_file({name: TENSORS[name]}, folder / file)
    weight_map = dict(zip(TENSORS, names))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def documents(name: str) -> Callable[[Path], Any]:
    return lambda folder: list(read_documents(folder / name, text_key="text", text_unit="line"))


def compressed(name: str, kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with pa.CompressedOutputStream(folder / name, kind) as out:
            out.write(jsonl(folder / "plain", TEXTS).read_bytes())

    return make


def data_set(folder: Path) -> None:
    letters_tokenizer(folder)
    jsonl(folder / "text", ["abcdefgh"] * 20).rename(folder / "text.jsonl")
    prepare_text([folder / "text.jsonl"], folder / "set", tokenizer=folder, sequence_length=4)


def windows(folder: Path) -> Any:
    data = open_data_set(folder / "set")
    return data.metadata, {name: data.read(name, range(count)).tobytes() for name, count in data.splits.items()}


def scores(folder: Path) -> None:
    key = score_files.Key("weights", "pack", "float32", "auto", "1")
    header = score_files.Header("tiny", "step1", 1, 4096, 128, key)
    made = score_files.Scores(header, RNG.normal(size=300), RNG.random(300) < 0.5)
    score_files.write(folder, made)


def read_scores(folder: Path) -> Any:
    read = score_files.read(score_files.path_of(folder, "tiny", "step1"))
    return read.header, read.loglikelihood.tobytes(), read.is_greedy.tobytes()


def request_pack(folder: Path) -> None:
    pack.save(packed([(task("piqa"), docs(20))]), folder / "pack")


def read_pack(folder: Path) -> Any:
    read = pack.load(folder / "pack")
    return read.manifest, read.contexts.to_pydict(), read.requests.to_pydict(), read.documents.to_pydict()


def run_record(folder: Path) -> None:
    step = folder / "checkpoints/10"
    (step / "params").mkdir(parents=True)
    (step / "params/data").write_bytes(bytes(100))
    write_record(step, {"step": 10, "tokens": 640, "kept": True, "recipe": "tiny"})


def record(folder: Path) -> Any:
    read = read_record(folder / "checkpoints/10")
    if read is None:
        raise UserError("checkpoints/10: no record")
    return read


def tidy(folder: Path) -> None:
    rows = [f"tiny,step{i},{i},{i * 1000},piqa,acc,{0.5 + i / 100:.4f},0.01,100,0.5" for i in range(10)]
    heading = "series,checkpoint,step,tokens,task,metric,value,stderr,n,chance"
    (folder / "table.csv").write_text("\n".join([heading, *rows]) + "\n")


def results(folder: Path) -> None:
    content = {
        "results": {"piqa": {"alias": "piqa", "acc,none": 0.75, "acc_stderr,none": 0.01}}, "n-shot": {"piqa": 0},
        "versions": {"piqa": 1.0}, "n-samples": {"piqa": {"original": 1838, "effective": 1838}},
        "config": {"model": "hf", "model_args": "pretrained=org/tiny,revision=step1000-tokens4B"},
        "model_name": "org/tiny",
    }  # fmt: skip
    (folder / "results_1.json").write_text(json.dumps(content))


def tables(name: str) -> Callable[[Path], Any]:
    return lambda folder: read_table(folder / name).to_json()


def copied(source: Path, name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(source, folder / name)


def text(name: str, content: Callable[[], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content())


AMBER = series_files()["amber"]
STATE = {"global_step": 500, "num_input_tokens_seen": 2_048_000, "epoch": 1.0}
SENTENCES = ["the cat runs", "Fäden under 東京"]
KINDS = [
    Kind("model.safetensors", lambda f: save_file(TENSORS, f / "model.safetensors"), tensors),
    Kind("pytorch_model.bin", torch_bin, tensors, has_digest=True),
    Kind(
        "weights.msgpack",
        lambda f: write_stream(f / "weights.msgpack", {(n,): t for n, t in TENSORS.items()}),
        lambda f: tensors(f / "weights.msgpack"),
    ),
    Kind("model.safetensors.index.json", index, tensors),
    Kind("mp_rank_00/*", megatron, lambda f: (step_and_tokens(f), tensors(f)), has_digest=True),
    Kind("items/_METADATA", maxtext, tensors, share=0.5),
    Kind(
        "config.json",
        text("config.json", lambda: json.dumps({"architectures": ["LlamaForCausalLM"], **LLAMA.to_hf(SHAPE)})),
        lambda f: config_from_hf(f / "config.json"),
    ),
    Kind("trainer_state.json", text("trainer_state.json", lambda: json.dumps(STATE)), step_and_tokens),
    Kind(
        "amber.yaml",
        copied(AMBER, "amber.yaml"),
        lambda f: [(e.tokenizer, checkpoints(e, ask=False)) for e in entries(f / "amber.yaml")],
        share=0.5,
    ),
    Kind(
        "tokenizer/tokenizer.json",
        lambda f: write_tokenizer(f / "tokenizer", adds_bos=True),
        lambda f: encode(open_tokenizer(f / "tokenizer"), SENTENCES),
        share=0.3,
    ),
    Kind(
        "tokenizer/tokenizer_config.json",
        lambda f: write_tokenizer(f / "tokenizer", adds_bos=True),
        lambda f: encode(open_tokenizer(f / "tokenizer"), SENTENCES),
        share=0.3,
    ),
    Kind("text.jsonl", lambda f: jsonl(f / "text.jsonl", TEXTS), documents("text.jsonl")),
    Kind("text.jsonl.gz", compressed("text.jsonl.gz", "gzip"), documents("text.jsonl.gz")),
    Kind("text.jsonl.zst", compressed("text.jsonl.zst", "zstd"), documents("text.jsonl.zst")),
    Kind(
        "text.parquet",
        lambda f: pq.write_table(pa.table({"text": TEXTS}), f / "text.parquet", write_page_checksum=True),
        documents("text.parquet"),
    ),
    Kind("set/metadata.json", data_set, windows, has_digest=True, share=0.5),
    Kind("set/dataset_info.json", data_set, windows, has_digest=True, share=0.5),
    Kind("set/*array_record*", data_set, windows, has_digest=True, share=0.5),
    Kind(
        "recipe.json",
        text("recipe.json", lambda: recipes.to_json(load_recipe("llama_60m"))),
        lambda f: recipes.from_json(f / "recipe.json"),
        share=0.5,
    ),
    Kind("checkpoints/10/complete.json", run_record, record, has_digest=True),
    Kind("pack/manifest.json", request_pack, read_pack, has_digest=True),
    Kind("pack/requests.parquet", request_pack, read_pack, has_digest=True),
    Kind("pack/documents.parquet", request_pack, read_pack, has_digest=True),
    Kind("tiny/step1.parquet", scores, read_scores, has_digest=True),
    Kind(
        "suite.yaml",
        copied(AMBER.parent.parent / "suites/core.yaml", "suite.yaml"),
        lambda f: read_suite(f / "suite.yaml"),
        share=0.5,
    ),
    Kind("table.csv", tidy, tables("table.csv"), share=0.3),
    Kind("results_1.json", results, tables("."), share=0.3),
]


def damages(content: bytes, name: str, count: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged content), `count` times, the same for the same name."""
    rng = random.Random(name)
    for number in range(count):
        kind = ("cut", "flip", "swap", "fields")[number % 4]
        if kind == "cut":
            at = rng.randrange(len(content))
            yield f"cut at {at}", content[:at]
        elif kind == "fields" and name.endswith(".json"):
            yield "two values", json.dumps(_swapped(json.loads(content), rng)).encode()
        elif kind == "swap":
            size = rng.choice((1, 4, 16, 64))
            a, b = sorted(rng.randrange(max(1, len(content) - size)) for _ in range(2))
            parts = content[:a], content[b : b + size], content[a + size : b], content[a : a + size]
            yield (
                f"{size} bytes at {a} and {b}",
                b"".join(parts) + content[max(b, a + size) + (size if b >= a + size else 0) :],
            )
        else:
            at, bit = rng.randrange(len(content)), rng.randrange(8)
            yield f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def _swapped(value: Any, rng: random.Random) -> Any:
    """`value` with two of its values, at any depth, in each other's place."""
    places: list[tuple[Any, Any]] = []

    def visit(part: Any) -> None:
        for key in part.keys() if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                visit(part[key])

    visit(value)
    (a, i), (b, j) = rng.choice(places), rng.choice(places)
    one, other = json.loads(json.dumps([a[i], b[j]]))  # copies: one may hold the other
    a[i], b[j] = other, one
    return value


def outcome(kind: Kind, folder: Path, expected: str, what: str) -> str:
    """same, refused, or another result; what is neither fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"{kind.name}, {what}: reading takes more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        return "same" if fingerprint(kind.read(folder)) == expected else "another result"
    except UserError as error:
        line = str(error)
        assert "\n" not in line and line.isprintable(), f"{kind.name}, {what}: {line!r}"
        stem = Path(kind.name).name.partition("*")[0]
        named = stem in line or str(folder) in line or kind.name.split("/")[0] in line
        assert named, f"{kind.name}, {what}: the file is not named: {line}"
        return "refused"
    except TimeoutError:
        raise
    except Exception as error:
        raise AssertionError(f"{kind.name}, {what}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fingerprint(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def tried(kind: Kind, folder: Path, count: int) -> collections.Counter[str]:
    folder.mkdir()
    kind.make(folder)
    [file] = folder.glob(kind.name)
    content, expected = file.read_bytes(), fingerprint(kind.read(folder))
    counts: collections.Counter[str] = collections.Counter()
    for what, damaged in damages(content, kind.name, max(4, round(count * kind.share))):
        file.write_bytes(damaged)
        counts["same" if damaged == content else outcome(kind, folder, expected, what)] += 1
    return counts


WITHOUT_TORCH = [kind for kind in KINDS if kind.make is not torch_bin]  # whose import takes longer than all of these


@pytest.mark.parametrize("kind", WITHOUT_TORCH, ids=lambda kind: kind.name)
def test_a_damaged_file_is_one_line_or_read_as_before(kind: Kind, tmp_path) -> None:
    counts = tried(kind, tmp_path / "x", 16)
    assert not (kind.has_digest and counts["another result"]), counts


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path) -> None:
    counts = {kind.name: tried(kind, tmp_path / str(number), 160) for number, kind in enumerate(KINDS)}
    for name, count in counts.items():
        print(f"{name:32} {dict(count)}")
    assert sum(count.total() for count in counts.values()) >= 2000
    assert not {kind.name for kind in KINDS if kind.has_digest and counts[kind.name]["another result"]}
