"""The commands of the pages, run here on tiny inputs of the same names: they print what stands under them.

What was measured there (rates, seconds, shares, amounts of the page's larger inputs) may differ, every other word not.
"""

import dataclasses
import json
import os
import pickle
import re
import shlex
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets
from data_examples import letters_tokenizer
from docs_pages import blocks, page, printed_by, python_blocks, table, transcripts
from safetensors.numpy import save_file
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import one_device

from fineline_jax import prepare_pack
from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.cli import main
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.decoder import abstract_params
from fineline_jax.scoring.engine.prefix_tree import plan
from fineline_jax.scoring.requests.pack import Ragged, RequestTokens
from fineline_jax.scoring.series import score_series
from fineline_jax.scoring.series.order import axis, coarse_to_fine

MEASURED = (
    (r"\d[\d.]*[kMB]? of \d[\d.]*[kMB]? (requests|tokens)", r"N of N \1"),
    (r", \d[\d.]*[kMB]?/s", ", N/s"),
    (r", \d+s left", ""),
    (r"scored in (?:\d+m)?\d+s, \d+\.\d% of it", "scored in T, N% of it"),
    (r"\d+ requests cut to \d+ tokens", "N requests cut to N tokens"),
    (r"[\d,]+ requests of \d+ tasks?", "N requests of N tasks"),
    (r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{6}", "TIME"),
)


OF_TABLE = re.compile(r"^\S+ +metric +n |^\w+ +\w+ +[\d,]+ +-?\d+\.\d{4} ±|^…$")
"""Of the scores at the end: those of another model on other documents (tests/scoring/metrics/test_latest.py)."""


def unmeasured(line: str) -> str:
    for pattern, stands in MEASURED:
        line = re.sub(pattern, stands, line)
    return line


@pytest.fixture
def prints(tmp_path, monkeypatch, capsys, caplog):
    """Runs a command in an empty folder; what it prints, the log first."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="fineline_jax")

    def run(command: str, status: int = 0) -> list[str]:
        caplog.clear()
        name, *arguments = shlex.split(command)
        assert name == "fineline" and main(arguments) == status, capsys.readouterr().err
        said = capsys.readouterr()
        text = "\n".join([said.err.strip("\n"), *caplog.messages, said.out.strip("\n")])
        return [line.replace(str(tmp_path), "/data") for line in text.split("\n") if line]

    return run


def command_of(name: str, start: str, place: int = 0) -> tuple[str, list[str]]:
    found = [(command, lines) for command, lines in transcripts(name) if command.startswith(start)]
    return found[place]


def assert_prints(printed: list[str], lines: list[str]) -> None:
    """The page's lines are the last that are printed, and of several bars one, the last, need be."""
    shapes = [unmeasured(line) for line in lines if line and not OF_TABLE.search(line)]
    while len(shapes) > 1 and shapes[1].startswith(shapes[0].split(":")[0] + ": N of N"):
        shapes.pop(0)
    found = [unmeasured(line) for line in printed if line and not OF_TABLE.search(line)]
    assert found[-len(shapes) :] == shapes


def test_the_list_of_series_is_that_of_the_page(prints) -> None:
    command, lines = command_of("docs/series.md", "fineline series", 0)
    assert command == "fineline series" and prints(command) == [line for line in lines if line]


@pytest.mark.parametrize("name", ["README.md", "docs/series.md"])
def test_ambers_first_checkpoints_are_those_of_the_page(name: str, prints) -> None:
    command, lines = command_of(name, "fineline series amber")
    given = [".*" if line == "…" else re.escape(line) for line in lines if line]
    assert re.fullmatch("\n".join(given), "\n".join(prints(command)), flags=re.S)


def test_a_mistake_in_a_series_of_ones_own_is_told_as_on_the_page(prints) -> None:
    Path("mine.yaml").write_text(
        "name: mine\ntitle: Mine\nlocation: hf://o/r@{name}\nnames: [step1]\npattern: step{step}\nstep: step\n"
        "tokens: stepp * 4096\nsources: [me]\n"
    )
    command, lines = command_of("docs/series.md", "fineline series mine.yaml")
    assert prints(command, 2) == lines


def test_the_seven_billion_without_data_says_what_to_do(prints) -> None:
    command, lines = command_of("README.md", "fineline pretrain amber_7b")
    assert prints(command, 2) == lines


def test_text_is_prepared_as_in_the_readme(prints, monkeypatch) -> None:
    command, [line] = command_of("README.md", "fineline data prepare text")
    Path("corpus").mkdir()
    Path("llama").mkdir()
    letters_tokenizer(Path("llama"))
    paragraphs = ["".join(chr(97 + (3 * i + j) % 26) for j in range(70)) for i in range(120)]
    Path("corpus/a.txt").write_text("\n\n".join(paragraphs))
    # Every fiftieth paragraph is validation; each ends with EOS; windows have one token more than they train on.
    train, validation = (71 * count // 129 for count in (118, 2))
    counts = re.compile(r"train: [\d,]+ windows, validation: [\d,]+ windows")
    assert prints(command)[-1] == counts.sub(f"train: {train} windows, validation: {validation} windows", line)
    described = re.search(r"DIR/metadata\.json (.*?) DIR/tokenizer/", " ".join(page("docs/data.md").split()))
    metadata = json.loads(Path("data/corpus/metadata.json").read_text())
    keys, inner = re.sub(r" \([^)]*\)", "", described[1]), re.findall(r"(\w+) \(([^)]*)\)", described[1])
    assert {*keys.replace("; for text also ", ", ").split(", ")} == metadata.keys()
    assert [name for name, _ in inner] == ["kind", "sources", "splits"] and inner[0][1].startswith(metadata["kind"])
    assert set(inner[1][1].split(", ")) == set(metadata["sources"][0])
    assert all(set(inner[2][1].split(", ")) == set(split) for split in metadata["splits"].values())
    [line] = re.findall(r"tfds\.builder.*", page("docs/data.md"))
    assert len(eval(line.replace("DIR", "data/corpus"), {"tfds": tensorflow_datasets})) == 129
    stems = ("dataset_info.json", "features.json", "metadata.json", "tokenizer", "windows-")
    assert all(path.name.startswith(stems) for path in Path("data/corpus").iterdir())


def test_a_recipe_of_ones_own_ends_and_is_refused_with_another_seed_as_in_the_readme(prints, monkeypatch) -> None:
    from fineline_jax.checkpoints.runs import store
    from fineline_jax.checkpoints.runs.digest_record import write_record
    from fineline_jax.data.storage import open_data_set
    from fineline_jax.training import loop
    from fineline_jax.training.run_folder import beginning, claim_folder

    test_text_is_prepared_as_in_the_readme(prints, monkeypatch)
    Path("mini.py").write_text(python_blocks("README.md")[0])
    with monkeypatch.context() as patch:
        patch.setattr(store, "steps", lambda _: load_recipe("mini.py").kept_steps())
        patch.setattr(loop, "pretrain", lambda recipe, run, **_: loop.Outcome(run, recipe.steps, recipe.tokens, None))
        done = next(lines for command, lines in transcripts("README.md") if command == "fineline pretrain mini.py")
        assert prints("fineline pretrain mini.py") == done
    recipe = load_recipe("mini.py")
    history = beginning(None, recipe, (open_data_set(Path("data/corpus"), "--data").data_hash,))
    claim_folder(Path("runs/mini"), recipe, history)
    Path("runs/mini/checkpoints/60").mkdir(parents=True)
    record = {"step": 60, "tokens": recipe.tokens, "kept": True, "recipe": "mini", "history": history.plain()}
    write_record(Path("runs/mini/checkpoints/60"), record)
    command, lines = command_of("README.md", "fineline pretrain mini.py --seed 3")
    assert prints(command, 2) == lines


def test_the_demo_says_the_four_commands_of_the_readme(prints, monkeypatch, capsys) -> None:
    from fineline_jax import analysis, demo
    from fineline_jax.checkpoints import open
    from fineline_jax.scoring.requests import build
    from fineline_jax.scoring.series import auto_mesh, score_series
    from fineline_jax.training import loop

    silent = ((build, "build"), (auto_mesh, "scoring_mesh"), (open, "open_series"))
    for module, name in silent:
        monkeypatch.setattr(module, name, lambda *_, **__: [])
    monkeypatch.setattr(score_series, "SeriesScorer", lambda *_: lambda series: [])
    monkeypatch.setattr(demo, "prepare_world", lambda out: None)
    monkeypatch.setattr(loop, "pretrain", lambda recipe, run, **_: loop.Outcome(run, recipe.steps, recipe.tokens, None))
    monkeypatch.setattr(analysis, "analyze_scores", lambda scores, report, **_: report / "report.html")
    block = next(block for block in blocks("README.md") if block[0].startswith("1/4"))
    page_lines = [re.sub("(?<=the report: )/home/you", "/data", line) for line in block if line[:5] != "demo:"]
    printed = [line for line in prints("fineline demo --out demo-out") if not re.fullmatch(r"done in \d+ s", line)]
    assert printed == page_lines
    bar = next(line for line in block if line.startswith("demo: "))
    assert re.fullmatch(r"demo: [\d.]+M of 2\.05M tokens, [\d.]+k/s, \d+s left, loss \d\.\d{3}", bar)


@pytest.fixture
def constant(monkeypatch) -> None:
    """The model says the same of every request: what is tested is what is printed."""

    def make_scorer(requests, *arguments, **options):
        def score(params, advance):
            advance(len(requests))
            return -np.arange(1.0, len(requests) + 1), np.zeros(len(requests), bool)

        return score

    monkeypatch.setattr(score_series, "make_scorer", make_scorer)


def a_model(
    folder: Path, config: ModelConfig, tokenizer: Path | None = None, value: float = 0.5, **layout: str
) -> None:
    """All of its weights are `value`."""
    weights = jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), abstract_params(config, one_device()))
    export_hf(config, jax.device_put(weights), folder, tokenizer, **layout)


TINY = ModelConfig(vocab_size=512, width=8, layers=1, heads=2, mlp_width=8, context=96)


def test_a_series_is_scored_in_one_piece_and_in_two_as_on_the_page(prints, constant, monkeypatch) -> None:
    name, steps = "docs/score_series.md", load_recipe("demo").kept_steps()
    tokenizer = write_tokenizer(Path("tokenizer"), adds_bos=True)
    prepare_pack("piqa", tokenizer, Path("packs/demo"), benchmarks=write_benchmarks(Path("benchmarks"), documents=3))
    for step in steps:
        a_model(Path(f"demo-out/run/step{step}"), TINY, tokenizer)
    a_model(Path("other/run/step0"), TINY, tokenizer, value=1)
    start = "fineline score demo-out/run --pack packs/demo --out "
    (whole, first), (again, then) = (command_of(name, start + "scores", place) for place in (0, 1))
    assert whole == again
    assert_prints(prints(whole), first)
    assert_prints(prints(again), then)
    other, lines = command_of(name, "fineline score other/run")
    assert prints(other, 2) == lines
    part, lines = command_of(name, start + "parts --part 1/2")
    assert_prints(prints(part), lines)
    variables = next(command for command, _ in transcripts(name) if command.startswith("export SLURM"))
    for variable in variables.split()[1:]:
        monkeypatch.setenv(*variable.split("="))
    part, lines = command_of(name, start + "parts --part auto")
    assert_prints(prints(part), lines)
    made = {path.name: path.read_bytes() for path in Path("scores/run").iterdir()}
    assert made == {path.name: path.read_bytes() for path in Path("parts/run").iterdir()}
    assert printed_by(name, "diff -r scores/run parts/run") == ["the same bytes"]
    export, lines = command_of("docs/lm_eval.md", "fineline export-scores")
    assert_prints(prints(export), lines)
    listed = printed_by("docs/lm_eval.md", "ls exported/run__step1000")
    names = sorted(unmeasured(path.name).replace("piqa", "TASK") for path in Path("exported/run__step1000").iterdir())
    assert names == sorted({re.sub(r"world_[a-z]+(?=_TIME)", "TASK", unmeasured(line)) for line in listed})


def test_the_progress_of_the_demos_scores_on_the_page_is_that_of_its_requests() -> None:
    recipe, worlds = load_recipe("demo"), table("docs/world.md", "choices")
    kept = [Checkpoint("run", "", s, s * recipe.tokens_per_step, Path(), "orbax") for s in recipe.kept_steps()]
    steps = [kept[index].step for index in coarse_to_fine(axis(kept))]
    choices = [1 if row["choices"] == "–" else int(row["choices"]) for row in worlds]
    requests = 240 * sum(choices) - 80 * 4  # world_counting has 160 questions
    text = page("docs/score_series.md")
    found = re.findall(r"score run: ([\d.]+)k of (\d+)k requests, .*checkpoint (\d+) of (\d+): step(\d+)", text)
    for done, total, place, count, step in found:
        assert int(total) == round(len(steps) * requests / 1000) and int(count) == len(steps)
        assert (int(place) - 1) * requests <= float(done) * 1000 <= int(place) * requests + 500
        assert steps[int(place) - 1] == int(step)
    logged = [json.loads(line) for line in re.findall(r'\{"series".*\}', text)]
    assert [(line["checkpoint"], line["requests"]) for line in logged] == [(f"step{s}", requests) for s in steps[:3]]


def test_one_folder_is_scored_and_exported_as_in_the_readme(prints, constant) -> None:
    tokenizer = write_tokenizer(Path("tokenizer"), adds_bos=True)
    write_benchmarks(Path("benchmarks"), documents=3)
    a_model(Path("tinystories-260k"), dataclasses.replace(TINY, context=16), tokenizer)
    for start in ("fineline score tinystories-260k", "fineline export-scores"):
        command, lines = command_of("README.md", start)
        assert_prints(prints(command), lines)


def test_the_results_in_the_readme_have_the_errors_of_their_counts() -> None:
    for row in table("README.md", "stderr"):
        value, n = float(row["value"]), int(row["n"])
        assert float(row["stderr"]) == round((value * (1 - value) / (n - 1)) ** 0.5, 4)
        assert abs(value * n - round(value * n)) < 0.05 * n / 1000 + 1e-9  # a whole number of documents
    text = " ".join(page("docs/lm_eval.md").split())
    for value, error in re.findall(r"\|↑ \|(0\.\d+)\|± \|(0\.\d+)\|", text):
        assert float(error) == round((float(value) * (1 - float(value)) / 239) ** 0.5, 4)


def test_what_the_readmes_tasks_hold_is_counted_right(shared_data: Path) -> None:
    import pyarrow.parquet as pq

    folder = shared_data / "benchmarks"
    piqa = pq.read_table(folder / "baber__piqa/validation.parquet")
    arc = pq.read_table(folder / "allenai__ai2_arc/ARC-Easy/test.parquet")
    lambada = pq.read_table(folder / "EleutherAI__lambada_openai/test.parquet")
    rows = {row["task"]: int(row["n"]) for row in table("README.md", "stderr")}
    assert rows == {"piqa": piqa.num_rows, "arc_easy": arc.num_rows, "lambada_openai": lambada.num_rows}
    of_arc = sum(len(choices["text"]) for choices in arc["choices"].to_pylist())
    total = 2 * piqa.num_rows + of_arc + lambada.num_rows
    assert f"{total / 1000:.1f}k of {total / 1000:.1f}k requests" in page("README.md")
    assert f"all {total:,} requests" in page("BENCHMARKS.md")
    olmes = printed_by("docs/suites.md", "fineline tasks prepare arc_easy@5")
    assert olmes == [f"arc-olmes: {of_arc:,} requests of 1 task"]
    subjects = [pq.read_metadata(path).num_rows for path in folder.glob("cais__mmlu/*/test.parquet")]
    mmlu = printed_by("docs/scoring.md", "time taskset -c 0 fineline tasks prepare mmlu")
    assert mmlu == [f"mmlu-pack: {4 * sum(subjects):,} requests of {len(subjects)} tasks"]


def test_the_published_table_has_the_rows_that_the_readme_says(shared_data: Path) -> None:
    import pandas

    rows = len(pandas.read_csv(shared_data / "trajectories/pythia/pythia_v1_tidy.csv.gz"))
    assert f"# {rows:,} rows" in page("README.md")


TINYSTORIES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


def a_tinystories(folder: Path) -> Path:
    """A model of the released one's shape, its file as safetensors itself writes it."""
    write_tokenizer(folder, adds_bos=True)
    (folder / "config.json").write_text(json.dumps(TINYSTORIES))
    tensors = {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    for layer in range(5):
        of = f"model.layers.{layer}."
        tensors |= {f"{of}self_attn.{name}_proj.weight": (64 if name in "qo" else 32, 64) for name in "qkvo"}
        tensors |= {f"{of}mlp.{name}_proj.weight": (172, 64) for name in ("gate", "up")}
        tensors |= {f"{of}mlp.down_proj.weight": (64, 172)}
        tensors |= {f"{of}{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    weights = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class _Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_weights_are_imported_refused_and_exported_as_on_the_page(prints) -> None:
    name = "docs/formats.md"
    a_tinystories(Path("tinystories-260k"))
    torn, evil = a_tinystories(Path("torn")), a_tinystories(Path("evil"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:500_000])
    (evil / "model.safetensors").unlink()
    with zipfile.ZipFile(evil / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": _Evil()}, protocol=2))
    typed = [pair for pair in transcripts(name) if pair[0].startswith("fineline ")]
    for (command, lines), status in zip(typed, (2, 0, 2, 2, 0), strict=True):
        assert prints(command, status) == lines
    assert sorted(path.name for path in Path("tiny-bf16").iterdir()) == printed_by(name, "ls tiny-bf16")[0].split()
    described = re.search(r"complete\.json +([a-z, ]+); size and digest of every file", page("docs/checkpoints.md"))
    complete = json.loads(Path("runs/tiny/checkpoints/1000/complete.json").read_text())
    assert {*described[1].split(", "), "files"} <= complete.keys() and complete["files"]
    assert [complete[key] for key in ("step", "tokens", "kept")] == [1000, 4_194_304_000, True]


def test_a_baichuan_and_a_mamba_are_exported_as_on_the_page(prints) -> None:
    mamba = ModelConfig(
        vocab_size=512, width=16, layers=1, heads=0, mlp_width=32, mixer="mamba", state_size=4, conv_width=4,
        step_rank=2, norm_eps=1e-5,
    )  # fmt: skip
    a_model(Path("baichuan"), TINY, family="baichuan")
    a_model(Path("mamba"), mamba)
    for place, status in enumerate((0, 0, 2)):
        command, lines = command_of("docs/families.md", "fineline export", place)
        assert prints(command, status) == lines


def test_the_plans_on_the_page_add_up() -> None:
    from fineline_jax.scoring.engine.plan_table import HEADER
    from fineline_jax.text_table import text_table

    printed = printed_by("docs/prefix_tree.md", "fineline tasks plan")
    rows = [tuple(re.split(r" {2,}", re.sub(r" (\d)", r"  \1", line).strip())) for line in printed[1:]]
    assert text_table([HEADER, *rows], right=range(1, len(HEADER))) == "\n".join(printed)
    for _, requests, count, length, unique, overhead, _ in rows:
        assert float(overhead) == round(int(count) * int(length.replace(",", "")) / int(unique.replace(",", "")), 3)
        assert int(requests) % 4 == 0
    for row in table("docs/prefix_tree.md", "fed / tree"):
        tree, fed = (float(row[key].split()[0]) for key in ("tree", "fed, rows up to 8192"))
        assert float(row["fed / tree"]) == pytest.approx(fed / tree, rel=0.005)


def test_the_rows_of_the_prefix_tree_are_those_drawn_on_the_page() -> None:
    block = next(block for block in blocks("docs/prefix_tree.md") if block[0].startswith("requests"))
    drawn = {line.split()[0]: line for line in block if line}
    halves = [one.split("|") for one in re.findall(r"(?<=  )[\d|]+(?: [\d|]+)+", drawn["requests"])]
    contexts, continuations = ([np.int32(half[i].split()) for half in halves] for i in (0, 1))
    ragged = lambda rows: Ragged(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))
    one = np.arange(len(halves))
    made = plan(RequestTokens(ragged(contexts), ragged(continuations), one, 0 * one), 2048, row_length=8, multiple=8)
    numbers = lambda name: [int(x) for x in re.findall(r"(?<= )\d+", drawn[name])]
    used = len(numbers("depth"))
    assert numbers("place") == [*range(8)] and made.unique_tokens == used and made.used.tolist() == [used]
    assert made.tokens[0, :used].tolist() == numbers("tokens") and drawn["tokens"].count(".") == 8 - used
    assert made.depth[0, :used].tolist() == numbers("depth") and made.end[0].tolist() == numbers("end")
    pairs = [tuple(map(int, pair)) for pair in re.findall(r"\((?:place )?(\d+), (?:target )?(\d+)\)", drawn["pairs"])]
    assert pairs == [*zip(made.target_parent.tolist(), made.target_token.tolist())]
