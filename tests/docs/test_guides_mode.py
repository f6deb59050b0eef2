"""docs/guides/add_a_mode.md, followed word by word in a copy of the package."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from docs_pages import CHECKOUT, blocks, page, tables
from scoring_examples import write_benchmarks, write_tokenizer

from fineline_jax.scoring.modes.mode import Mode

PAGE = "docs/guides/add_a_mode.md"
SCORE = """
import json, sys
from pathlib import Path
import numpy as np
from fineline_jax.scoring import metrics, pack
made = pack.load(Path("pack"))
n = made.requests.num_rows
scored = -np.random.default_rng(1).exponential(8.0, n)
values = metrics.of_tasks(made, scored, np.zeros(n, bool))
lengths = [len(row) for row in made.continuation_tokens]
documents = [[row["gold"], row["first_request"], row["requests"]] for row in made.documents.to_pylist()]
found = {name: {metric: one.value for metric, one in of.items()} for name, of in values.items()}
print(json.dumps([made.tasks[0]["metric"], found, scored.tolist(), lengths, documents]))
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_mode_of_the_page_is_made_in_two_files_and_compares_per_token(tmp_path):
    shutil.copytree(CHECKOUT / "fineline_jax", tmp_path / "fineline_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "configs", tmp_path / "fineline_jax/configs", dirs_exist_ok=True)
    value, name, command = blocks(PAGE)
    file, names = re.findall(r"^`(fineline_jax/\S+\.py)`", page(PAGE), flags=re.M)
    (tmp_path / file).write_text("\n".join(value) + "\n")
    text, key = (tmp_path / names).read_text(), name[0].partition(" = ")[0]
    changed, count = re.subn(rf"^{key} = .*$", name[0], text, flags=re.M)
    assert count == 1
    (tmp_path / names).write_text(changed)

    typed = command[0].split()
    inputs = {
        "LLAMA": str(write_tokenizer(tmp_path / "bpe", adds_bos=True)),
        "DIR": str(write_benchmarks(tmp_path / "benchmarks", documents=9)),
    }
    assert typed[0] == "fineline"
    arguments = [inputs.get(word, word) for word in typed[1:-1]]
    done = run(tmp_path, "-m", "fineline_jax", *arguments, "pack")
    assert done.returncode == 0, done.stderr
    refused = run(tmp_path, "-m", "fineline_jax", *[word.replace("piqa@2", "wikitext") for word in arguments], "other")
    assert refused.returncode == 2 and "mode gpt3 compares the choices" in refused.stderr

    done = run(tmp_path, "-c", SCORE)
    assert done.returncode == 0, done.stderr
    first, values, scored, lengths, documents = json.loads(done.stdout)
    per_token = np.array(scored) / np.array(lengths)
    right = [int(np.argmax(per_token[start : start + count])) in gold for gold, start, count in documents]
    assert first == "acc_per_token" and values == {"piqa": {"acc_per_token": np.mean(right)}}


def test_the_page_names_every_field_of_a_mode_and_which_are_required():
    [rows] = tables(PAGE)
    fields = dataclasses.fields(Mode)
    assert [row["field"].strip("`") for row in rows] == [field.name for field in fields]
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    required = [(field.default, field.default_factory) == missing for field in fields]
    assert [row["left out"] == "required" for row in rows] == required
