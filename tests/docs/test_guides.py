"""docs/guides/add_*.md, each followed word by word in a copy of the package: at most two files, and they work."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import family_examples
import numpy as np
import pytest
from docs_pages import blocks, table, transcripts
from family_examples import SHAPE, their_logits
from guide_pages import follow, prints, run
from safetensors.numpy import load_file
from scoring_examples import write_benchmarks, write_tokenizer

from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.models.families.family import Family
from fineline_jax.scoring.modes.mode import Mode
from fineline_jax.trajectories.statistics.columns import Column


def check_fields(name: str, value: type) -> None:
    """The page's table has every field of the dataclass in order and says which are required."""
    rows = table(name, "field")
    fields = dataclasses.fields(value)
    assert [row["field"].strip("`") for row in rows] == [field.name for field in fields]
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    required = [(field.default, field.default_factory) == missing for field in fields]
    assert [row["left out"] == "required" for row in rows] == required


# A mode

MODE_PAGE = "docs/guides/add_a_mode.md"
SCORE = """
import json
import re
from pathlib import Path
import numpy as np
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import pack
made = pack.load(Path("pack"))
n = made.requests.num_rows
scored = -np.random.default_rng(1).exponential(8.0, n)
values = tidy.of_tasks(made, scored, np.zeros(n, bool))
lengths = [len(row) for row in made.continuation_tokens]
documents = [[row["gold"], row["first_request"], row["requests"]] for row in made.documents.to_pylist()]
found = {name: {metric: one.value for metric, one in of.items()} for name, of in values.items()}
print(json.dumps([made.tasks[0]["metric"], found, scored.tolist(), lengths, documents]))
"""


@pytest.mark.slow
def test_the_mode_of_the_page_is_made_in_two_files_and_compares_per_token(tmp_path):
    assert len(follow(MODE_PAGE, tmp_path)) == 2
    inputs = {
        "LLAMA": str(write_tokenizer(tmp_path / "bpe", adds_bos=True)),
        "DIR": str(write_benchmarks(tmp_path / "benchmarks", documents=9)),
    }
    typed = blocks(MODE_PAGE)[-1][0].split()
    assert typed[0] == "fineline"
    arguments = [inputs.get(word, word) for word in typed[1:-1]]
    prints(tmp_path, "-m", "fineline_jax", *arguments, "pack")
    refused = run(tmp_path, "-m", "fineline_jax", *[word.replace("piqa@2", "wikitext") for word in arguments], "other")
    assert refused.returncode == 2 and "mode gpt3 compares the choices" in refused.stderr

    first, values, scored, lengths, documents = json.loads(prints(tmp_path, "-c", SCORE))
    per_token = np.array(scored) / np.array(lengths)
    right = [int(np.argmax(per_token[start : start + count])) in gold for gold, start, count in documents]
    assert first == "acc_per_token" and values == {"piqa": {"acc_per_token": np.mean(right)}}


def test_the_page_names_every_field_of_a_mode_and_which_are_required():
    check_fields(MODE_PAGE, Mode)


# A schedule

RATES = """
import dataclasses, json
from fineline_jax.catalogue import load_recipe
from fineline_jax.recipe import Optimizer, Schedule
from fineline_jax.training.schedule import learning_rate
recipe = load_recipe("llama_60m")
schedule = Schedule(1e-3, warmup_tokens=10 * recipe.tokens_per_step, kind="inverse_sqrt")
recipe = dataclasses.replace(recipe, optimizer=Optimizer(schedule))
print(json.dumps([learning_rate(recipe, step * recipe.tokens_per_step) for step in (0, 5, 10, 40, 1000)]))
"""


def test_the_schedule_of_the_page_is_made_in_two_files_and_is_that_of_the_paper(tmp_path):
    assert len(follow("docs/guides/add_a_schedule.md", tmp_path)) == 2
    expected = [1e-3 * min(step / 10, (10 / max(step, 1)) ** 0.5) for step in (0, 5, 10, 40, 1000)]
    assert json.loads(prints(tmp_path, "-c", RATES)) == pytest.approx(expected, rel=1e-6)
    typed = blocks("docs/guides/add_a_schedule.md")[-1][0].split()[1:]
    refused = run(tmp_path, "-m", "fineline_jax", *typed, "--optimizer.schedule.warmup-tokens", "0")
    assert refused.returncode == 2
    assert "optimizer.schedule.warmup_tokens must be positive for kind='inverse_sqrt'" in refused.stderr


# A family

FAMILY_PAGE = "docs/guides/add_a_family.md"
LOGITS = """
import jax
import numpy as np
from pathlib import Path
from family_examples import our_logits
from fineline_jax.checkpoints.formats.huggingface import load_hf
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape
mesh = make_mesh(MeshShape(), jax.devices()[:1])
config, params = load_hf(Path("ORION"), mesh)
np.save("logits.npy", our_logits(config, params, np.load("tokens.npy"), mesh))
"""


def write_orion(folder: Path) -> Any:
    """A tiny Orion: transformers' Llama with torch's LayerNorm, as its modelling file has it; returns the model."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_key_value_heads=2))
    for part in (*model.model.layers, model.model):
        for name in ("input_layernorm", "post_attention_layernorm", "norm"):
            if hasattr(part, name):
                setattr(part, name, torch.nn.LayerNorm(SHAPE["hidden_size"], eps=model.config.rms_norm_eps))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["OrionForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def test_the_family_of_the_page_is_made_in_two_files_and_has_the_logits_of_torch(tmp_path):
    assert len(follow(FAMILY_PAGE, tmp_path)) == 2
    model = write_orion(tmp_path / "ORION")
    tokens = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (2, 20), dtype=np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    prints(tmp_path, "-c", LOGITS)
    assert np.abs(np.load(tmp_path / "logits.npy") - their_logits(model, tokens)).max() < 1e-4

    typed = blocks(FAMILY_PAGE)[-1][0].split()[1:]
    assert "again: ORION/main in Hugging Face layout" in prints(tmp_path, "-m", "fineline_jax", *typed)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ORION", "again"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert json.loads((tmp_path / "again/config.json").read_text())["architectures"] == ["OrionForCausalLM"]


def test_the_page_names_every_field_of_a_family_and_which_are_required():
    check_fields(FAMILY_PAGE, Family)


# A statistic

STATISTIC_PAGE = "docs/guides/add_a_statistic.md"
SCORES = """series,tokens,task,metric,value,stderr,n
a,2000,piqa,acc,0.7,0.03,100
a,1000,piqa,acc,0.6,0.03,100
a,3000,piqa,acc,0.65,0.04,100
a,1000,piqa,bits_per_byte,1.2,,100
a,2000,piqa,bits_per_byte,1.1,,100
a,1000,boolq,acc,0.5,0.05,100
"""


def test_the_statistic_of_the_page_is_made_in_one_file_and_counts_what_was_lost(tmp_path):
    assert len(follow(STATISTIC_PAGE, tmp_path)) == 1
    (tmp_path / "scores.csv").write_text(SCORES)
    code = "\n".join(blocks(STATISTIC_PAGE)[-1]).replace(".to_string(index=False)", '.to_json(orient="records")')
    rows = {(row["task"], row["metric"]): row for row in json.loads(prints(tmp_path, "-c", code))}
    row = rows["piqa", "acc"]
    assert (row["best"], row["checkpoints"], row["reason"]) == (2000, 3, "")
    assert (row["lost"], row["stderr"]) == (pytest.approx(0.05), pytest.approx(0.05))
    assert rows["piqa", "bits_per_byte"]["lost"] == pytest.approx(-0.1)
    assert (rows["boolq", "acc"]["lost"], rows["boolq", "acc"]["reason"]) == (None, "fewer than two checkpoints")


def test_the_page_names_every_field_of_a_column_and_which_are_required():
    check_fields(STATISTIC_PAGE, Column)


# A weight format

FORMAT_PAGE = "docs/guides/add_a_format.md"


def test_the_format_of_the_page_is_made_in_two_files_and_read_bit_by_bit(tmp_path):
    assert len(follow(FORMAT_PAGE, tmp_path)) == 2
    family_examples.make("llama", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "MODEL").mkdir()
    shutil.copy(tmp_path / "hf/config.json", tmp_path / "MODEL")
    for name, tensor in tensors.items():
        np.save(tmp_path / f"MODEL/{name}.npy", tensor)
    commands = [line.split()[1:] for line in blocks(FORMAT_PAGE)[-1]]
    for command in commands:
        prints(tmp_path, "-m", "fineline_jax", *command)
    again = load_file(tmp_path / "again/model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
    (tmp_path / "MODEL/model.norm.weight.npy").write_bytes(b"\x93NUMPY\x01")
    refused = run(tmp_path, "-m", "fineline_jax", *commands[0][:2], "runs/other")
    assert refused.returncode == 2 and "model.norm.weight.npy: not a whole .npy file" in refused.stderr


def test_the_page_names_every_field_of_a_format_and_which_are_required():
    check_fields(FORMAT_PAGE, WeightFormat)


# A suite, a series


def test_the_suite_and_the_series_of_the_page_are_known_in_the_working_folder(tmp_path):
    name = "docs/guides/add_a_suite_or_series.md"
    assert follow(name, tmp_path) == ["configs/suites/quick.yaml", "configs/series/my_run.yaml"]
    tokenizer, benchmarks = write_tokenizer(tmp_path / "LLAMA", adds_bos=True), write_benchmarks(tmp_path / "DIR")
    assert (tokenizer.name, benchmarks.name) == ("LLAMA", "DIR")
    [typed] = [block[0].split()[1:] for block in blocks(name) if block[0].startswith("fineline tasks prepare")]
    assert re.search(r"quick-pack: [\d,]+ requests of 2 tasks", prints(tmp_path, "-m", "fineline_jax", *typed))
    tasks = json.loads((tmp_path / "quick-pack/manifest.json").read_text())["tasks"]
    chosen = [(task["task"], task["domain"], task["shots"], task["metric"]) for task in tasks]
    assert chosen == [("piqa", "commonsense", 0, "acc_norm"), ("arc_easy", "exam", 5, "acc_norm")]
    [(command, printed)] = transcripts(name)
    assert prints(tmp_path, "-m", "fineline_jax", *command.split()[1:]).rstrip("\n").split("\n") == printed
