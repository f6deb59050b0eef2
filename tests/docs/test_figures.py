"""Numbers in sentences: what follows from the code is computed, what was measured agrees with BENCHMARKS.md."""

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from docs_pages import CHECKOUT, blocks, numbers, page, printed_by, python_blocks, table, tables, ticked

from fineline_jax.catalogue import load_recipe
from fineline_jax.models.config import ModelConfig
from fineline_jax.trajectories.registry import STATISTICS
from fineline_jax.trajectories.report.style import _STYLES

BENCHMARKS = " ".join(page("BENCHMARKS.md").split())


def benchmark(case: str) -> dict[str, str]:
    """The line of BENCHMARKS.md's comparison with lm-eval that begins so."""
    return next(row for row in table("BENCHMARKS.md", "ratio, each") if row["case"].startswith(case))


def amount(text: str) -> float:
    return float(re.findall(r"[\d,]+\.?\d*", text)[-1].replace(",", ""))


# Measured


def test_the_readmes_speed_is_the_measured_one() -> None:
    ratio = amount(benchmark("MMLU 5-shot, 3 subjects")["ratio, each"])
    assert "three five-shot MMLU subjects take a nineteenth" in " ".join(page("README.md").split()) and int(ratio) == 19
    minutes, seconds = re.findall(r"report \| ≤ 5 min \| (\d+) min (\d+) s", BENCHMARKS)[0]
    assert numbers("README.md", "writes a report: about {} minutes") == [round(int(minutes) + int(seconds) / 60)]
    from fineline_jax.commands import pretrain

    assert (
        "about four minutes on two CPU cores" in (pretrain.demo.__doc__ or "")
        and round(int(minutes) + int(seconds) / 60) == 4
    )


@pytest.mark.parametrize("case", ["MMLU 5", "MMLU con", "ARC-C", "PIQA", "core", "ten"])
def test_a_measured_ratio_is_the_quotient_of_what_was_measured(case: str) -> None:
    row = benchmark(case)
    times = 10 if row["lm-eval"].startswith("10 ×") else 1
    theirs, ours, ratio = (amount(row[key]) for key in ("lm-eval", "ours, each", "ratio, each"))
    step = lambda text: 0.5 * 10.0 ** -len(re.findall(r"\d\.?(\d*)(?= s|×)", text)[-1])
    low = times * (theirs - step(row["lm-eval"])) / (ours + step(row["ours, each"]))
    high = times * (theirs + step(row["lm-eval"])) / (ours - step(row["ours, each"]))
    assert low - step(row["ratio, each"]) <= ratio <= high + step(row["ratio, each"])
    bar = amount(row["bar"])
    assert (ratio >= bar) == ("missed" not in row["ratio, each"])


def test_the_table_of_loading_is_that_of_the_benchmarks_and_its_quotients() -> None:
    pages = ("docs/formats.md", "BENCHMARKS.md")
    here, there = (next(rows for rows in tables(name) if "whole process" in rows[0]) for name in pages)
    for ours, theirs in zip(here, there, strict=True):
        assert ours["into"] == theirs["into"] and theirs["1"].startswith(ours["1"])
        for key in ("load", "whole process", "peak memory", "of it for the load"):
            assert abs(amount(ours[key]) - amount(theirs[key])) <= 0.05 + 1e-9, (ours["into"], key)
    of = {(row["into"], row["1"].split()[0]): row for row in there}
    quotient = lambda into, key: amount(of[into, "ours"][key]) / amount(of[into, "transformers"][key])
    share = lambda row: amount(row["parameters"]) / amount(row["peak memory"])
    text = "takes {} of transformers' into float32, where the parameters alone are {}, and {} into bfloat16, where"
    text += " they are {}."
    found = numbers("docs/formats.md", text)
    wanted = [quotient("float32", "peak memory"), share(here[1]), quotient("bfloat16", "peak memory"), share(here[3])]
    assert found == [pytest.approx(value, abs=0.006) for value in wanted]
    text = "{} times as long into float32, {} times into bfloat16"
    assert numbers("docs/formats.md", text) == [
        pytest.approx(quotient("float32", "load"), abs=0.05), pytest.approx(quotient("bfloat16", "load"), abs=0.5)
    ]  # fmt: skip
    found = numbers("docs/formats.md", "ours takes {} and {} of the time")
    assert found == [pytest.approx(quotient(into, "whole process"), abs=0.006) for into in ("float32", "bfloat16")]


def test_preparing_and_resampling_took_what_the_benchmarks_say() -> None:
    [row] = [row for row in table("docs/scoring.md", "pack, MB") if row["tokenizer, mode"] == "Llama, lm-eval"]
    assert f"| {row['processor time, s']} s of CPU time" in BENCHMARKS and f"| {row['pack, MB']} MB |" in BENCHMARKS
    [plain] = numbers("docs/scoring.md", "encoding whole prompts took {} s of processor time")
    assert f"{plain:.0f} s without the cuts" in BENCHMARKS
    one, hundred = re.findall(r"LAMBADA ([\d.]+) s for one checkpoint, ([\d.]+) s for a hundred", BENCHMARKS)[0]
    found = numbers("docs/scoring.md", "LAMBADA: {} s for one checkpoint, {} s for a hundred")
    assert found == [round(float(one)), round(float(hundred))]


def test_the_overheads_of_the_rows_are_those_of_the_benchmarks() -> None:
    rows = table("docs/prefix_tree.md", "fed / tree")
    assert ", ".join(row["fed / tree"] for row in rows) in BENCHMARKS
    first, cont, wide, wide_cont = numbers(
        "docs/prefix_tree.md", "are {} ({}) with rows up to 8192 and {} ({}) up to 16384"
    )
    assert f"{first:.3f}, {cont:.3f}, 1.031" in BENCHMARKS and f"{wide:.3f}, {wide_cont:.3f}, 1.023" in BENCHMARKS
    [mmlu] = printed_by("docs/scoring.md", "time taskset -c 0 fineline tasks prepare mmlu")
    assert re.findall(r"[\d,]+ requests", mmlu) == re.findall(r"whole MMLU 5-shot, ([\d,]+ requests)", BENCHMARKS)
    assert {row["requests"] for row in rows if row["task"].startswith("MMLU")} == {
        re.findall(r"([\d,]+) r", mmlu)[0].replace(",", "")
    }


def test_the_models_of_the_benchmarks_have_the_parameters_that_are_printed() -> None:
    tree = ast.parse((CHECKOUT / "benchmarks/train_throughput.py").read_text())
    [made] = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODELS"
    ]
    models = eval(ast.unparse(made), {"ModelConfig": ModelConfig})
    assert all(f"{model.parameters / 1e6:.2f} M parameters" in BENCHMARKS for model in models.values())
    assert "vocabulary 4,096, 16 × 256" in BENCHMARKS and models["4k"].vocab_size == 4_096
    source = (CHECKOUT / "benchmarks/score_against_lm_eval.py").read_text()
    size = lambda key: int(re.findall(rf"{key}=([\d_]+)", source)[0])
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    made = ModelConfig(*map(size, keys))
    assert f"Llama of {made.parameters / 1e6:.1f} M parameters (width {made.width}, {made.layers} layers" in BENCHMARKS
    sixty = load_recipe("llama_60m").model.parameters
    assert f"the {sixty / 1e6:.0f} M model ({12 * sixty / 1e9:.2f} GB with moments)" in BENCHMARKS


# Computed


def test_defaults_that_pages_state_are_those_of_the_commands(monkeypatch) -> None:
    from fineline_jax.checkpoints.remote.cache import default_downloads
    from fineline_jax.commands import data, score, tasks
    from fineline_jax.scoring.engine import prefix_tree
    from fineline_jax.scoring.requests.tasks import FEWSHOT_SEED
    from fineline_jax.scoring.series import watch

    default = lambda function, name: inspect.signature(function).parameters[name].default
    flags = {row["recipe"]: ticked(row["flags"])[0] for row in table("docs/data.md", "flags")}
    assert flags["Amber"] == "--no-bos --eos" and "(the default)" in str(table("docs/data.md", "flags")[0])
    assert (default(data.prepare_text, "bos"), default(data.prepare_text, "eos")) == (False, True)
    assert default(data.prepare_text, "text_key") == "text" and default(data.prepare_text, "text_unit") == "file"
    assert default(data.prepare_amber, "vocab_size") == 32_000 == load_recipe("amber_7b").model.vocab_size
    assert {default(f, "sequence_length") for f in (data.prepare_text, data.prepare_amber)} == {2_048}
    assert "`--downloads` (default `~/.cache/fineline_jax`)" in " ".join(page("docs/series.md").split())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_downloads() == Path.home() / ".cache/fineline_jax"
    assert default(score.score, "selection").keep_downloads == "yes" and default(score.score, "how").dtype == "float32"
    assert (default(tasks.plan_tasks, "context"), default(tasks.plan_tasks, "row_length")) == (2_048, 8_192)
    assert prefix_tree.ROW_LENGTH == 8_192 and "rows up to 8192" in page("docs/prefix_tree.md")
    assert numbers("docs/scoring.md", "few-shot draws (seed {}, one process)") == [FEWSHOT_SEED]
    assert numbers("docs/score_series.md", "and looks again every {} seconds") == [watch.POLL_SECONDS]


def test_lines_are_encoded_alone_by_as_many_tokenizers_as_the_page_says() -> None:
    from tokenizer_examples import CUT, WHOLE

    assert numbers("docs/scoring.md", "holds the two together for {} tokenizers") == [len({*CUT, *WHOLE})]


def test_kinds_of_text_files_are_those_of_the_table() -> None:
    from fineline_jax.data.documents import SUFFIXES

    rows = table("docs/data.md", "a document is")
    assert {name for row in rows for name in ticked(row["input"])} == set(SUFFIXES)
    units = set(ticked(rows[2]["a document is"])) - {"--text-unit paragraph"} | {"paragraph", "file"}
    from fineline_jax.commands.data import prepare_text

    assert units == set(get_args(get_type_hints(prepare_text)["text_unit"]))


def test_models_that_are_not_computed_are_refused_in_the_pages_words() -> None:
    from fineline_jax.errors import UserError
    from fineline_jax.models.families import of_hf
    from fineline_jax.models.families.hf_config import HfConfig

    llama = {"architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40}
    llama |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    lines = next(block for block in blocks("docs/families.md") if block[0].startswith("config.json: rope_scaling"))
    changes = ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, {"sliding_window": 32})
    for line, change in zip(lines, changes, strict=True):
        with pytest.raises(UserError) as refused:
            of_hf(HfConfig("config.json", llama | change))
        assert str(refused.value) == line
    # Switched off, or no shorter than the context: no reason to refuse.
    for change in ({"sliding_window": 32, "use_sliding_window": False}, {"sliding_window": 64}):
        assert of_hf(HfConfig("config.json", llama | change))[1].context == 64


def test_blocks_and_bands_have_the_printed_sizes() -> None:
    from fineline_jax.models.tree_attention import tpu

    sentence = "Its blocks are {} tokens where that divides the length of the rows, so plan with `multiple={}`"
    size, multiple = numbers("docs/prefix_tree.md", sentence)
    assert size == multiple == tpu.BLOCK
    [width] = numbers("docs/analyze.md", "Bands are ±{} standard")
    folder = CHECKOUT / "fineline_jax/trajectories/report"
    drawn = [(folder / name).read_text() for name in ("page/panels.js", "figures.py")]
    factor = re.compile(r"(\d\.\d+) \* (?:error|\(error|curve\[.stderr)")
    assert [set(factor.findall(text)) for text in drawn] == [{str(width)}, {str(width)}]


def test_files_that_pages_name_are_written_by_the_code() -> None:
    code = "".join(path.read_text() for path in (CHECKOUT / "fineline_jax").rglob("*.py"))
    for name in ("ARCHITECTURE.md", "docs/pretrain.md", "docs/data.md"):
        for file in re.findall(r"(?:RUN|DIR|PACK|SCORES)/([a-z_]+\.(?:jsonl?|parquet))", page(name)):
            stem, _, suffix = file.partition(".")
            assert file in code or (f'"{stem}"' in code and suffix == "parquet"), f"{name}: {file}"


def test_flops_are_counted_by_the_printed_formula() -> None:
    text = " ".join(page("docs/pretrain.md").split())
    assert "tokens/s × (6·N′ + 6·layers·heads·head_dim·length) / (devices × peak)" in text
    for name in ("llama_1b", "demo"):
        recipe = load_recipe(name)
        m, length = recipe.model, recipe.data.sequence_length
        weights = m.parameters - m.vocab_size * m.width
        assert m.train_flops_per_token(length) == 6 * weights + 6 * m.layers * m.heads * m.head_dim * length


def test_names_that_say_tokens_are_read_as_the_page_says() -> None:
    from fineline_jax.checkpoints.registry.step_names import parse_name

    found = re.search(
        r"Names that say how many tokens: (.*?)\. Any other amount", " ".join(page("docs/checkpoints.md").split())
    )
    assert found is not None
    read = {name: parse_name(name.replace("…", "x")) for name in ticked(found[1])}
    assert read == {
        "step1000-tokens4B": (1000, 4_000_000_000), "…-200bt": (None, 200_000_000_000),
        "train_00220B": (None, 220_000_000_000), "Amber-Reproduce-8.39B": (None, 8_390_000_000),
    }  # fmt: skip
    assert parse_name("step1000-7b") == (1000, None)


def test_grids_of_tokens_choose_as_the_page_says() -> None:
    from fineline_jax.checkpoints.select import parse_grid

    text = page("docs/series.md")
    grids = set(re.findall(r"--tokens ([\w:]+)", text)) - {"T"}
    assert grids >= {"0:100B:10B", "100B:1T", "::50B", "300B"}
    read = {grid: parse_grid(grid) for grid in grids}
    billion = 10**9
    assert (read["0:100B:10B"].start, read["0:100B:10B"].stop, read["0:100B:10B"].spacing) == (
        0,
        100 * billion,
        10 * billion,
    )
    assert (read["100B:1T"].start, read["100B:1T"].stop, read["100B:1T"].spacing) == (
        100 * billion,
        1000 * billion,
        None,
    )
    assert (read["::50B"].stop, read["::50B"].spacing) == (None, 50 * billion)


def test_tasks_that_generate_are_those_whose_gold_solutions_the_suite_scores() -> None:
    from fineline_jax.scoring.requests import gold_solutions
    from fineline_jax.scoring.requests.suite import open_suite

    text = " ".join(page("docs/suites.md").split())
    named = re.search(r"The official metric of (.*?) needs generated text", text)
    assert named is not None
    scored = {
        spec.task.removesuffix("_fewshot") for spec in open_suite("fineline").tasks if spec.metric == "bits_per_byte"
    }
    assert set(re.split(r", | and ", named[1])) == scored
    after = {name: row["after"] for row in table("docs/suites.md", "after") for name in row["task"].split(", ")}
    solution, delimiter = gold_solutions._SOLUTIONS["humaneval*"]
    assert after["humaneval"] == "nothing" and delimiter == "" and solution({"canonical_solution": "x"}) == "x"
    solution, delimiter = gold_solutions._SOLUTIONS["drop"]
    assert (
        after["drop"] == "space" and delimiter == " " and solution({"answers": [("a", "b"), ("c",)]}) == ["a, b", "c"]
    )
    assert gold_solutions._SOLUTIONS["mbpp"][0]({"code": "x"}) == "x\n[DONE]" and "`[DONE]`" in str(
        table("docs/suites.md", "after")
    )


def test_the_python_of_the_analyze_page_prints_a_verdict_and_writes_a_report(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    rows = [f"a,{10**9 * 2**i},sciq,acc,{0.25 + 0.1 * i},0.01,500,0.25" for i in range(6)]
    (tmp_path / "scores.csv").write_text("\n".join(["series,tokens,task,metric,value,stderr,n,chance", *rows]))
    monkeypatch.chdir(tmp_path)
    exec(python_blocks("docs/analyze.md")[0], {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["task", "onset", "t50", "t90", "verdict"] and printed[1].endswith("still rising")
    assert "My run" in (tmp_path / "report/report.html").read_text()
    paragraph = re.search(r"## What it writes\n\n(.*?)\n\n", page("docs/analyze.md"), flags=re.S)
    assert paragraph
    written = {path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.*")}
    named = {name for name in ticked(paragraph[1]) if re.search(r"\.[a-z]+$", name)}
    assert named == {"report.html", "tidy.csv", "tidy.parquet", "resampled.parquet", "findings.json"}
    assert written >= {*(f"{one.name}.{kind}" for one in STATISTICS for kind in ("csv", "parquet")), "findings.json"}
    assert written >= {f"figures/overview.{kind}" for kind in ("pdf", "svg", "png")}
    widths = {name: style[0] for name, style in _STYLES.items()}
    assert [float(w) for w in re.findall(r"\(([\d.]+)(?: inches)?\)", paragraph[1])] == list(widths.values())


def test_the_python_of_the_world_page_writes_what_its_comments_say(tmp_path: Path, monkeypatch) -> None:
    from fineline_jax.world import generate as module

    [code] = [code for code in python_blocks("docs/world.md")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "generate", functools.partial(module.generate, documents=10))
    names: dict = {}
    exec(code, names)
    for attribute, path in re.findall(r"^world\.(\w+)  # (world/[\w./]+)", code, flags=re.M):
        pattern = path.replace("TASK", names["world"].tasks[0])
        made = getattr(names["world"], attribute)
        assert Path(pattern) == made or made in Path(pattern).parents, attribute
        assert Path(pattern).exists()


def test_a_task_of_the_world_is_known_to_lm_eval_by_the_file_of_the_page(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from fineline_jax.world.generate import generate

    world = generate(tmp_path / "world", documents=10)
    [text] = re.findall(r"```yaml\n(.*?)```", page("docs/world.md"), flags=re.S)
    text = text.replace("/home/you/fineline_jax/", f"{CHECKOUT}/").replace("/home/you/world", str(world.text.parent))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/own.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path / "own"), include_defaults=False)
    assert manager.all_tasks == ["world_physical"]
    [task] = manager.load(["world_physical"])["tasks"].values()
    documents = list(task.test_docs())
    assert len(documents) == 240 and yaml.safe_load(text)["dataset_path"] == "parquet"


def test_the_readmes_laptop_corpus_has_the_windows_that_are_printed(shared_data: Path, tmp_path: Path) -> None:
    """Counted with SentencePiece itself: each paragraph and EOS; every fiftieth is validation; windows of 129."""
    import sentencepiece

    encoder = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "tokenizers/llama/tokenizer.model"))
    tokens = {"train": 0, "validation": 0}
    place = 0
    sizes = sum(path.stat().st_size for path in (shared_data / "text").glob("*.txt"))
    assert numbers("README.md", "three text files of {} MB in all") == [round(sizes / 1e6, 1)]
    bare, marked = numbers("docs/data.md", '("Hello" becomes {} and not {} with the Llama tokenizer)')
    assert encoder.encode("Hello") == [marked] and encoder.piece_to_id("Hello") == bare
    for path in sorted((shared_data / "text").glob("*.txt")):
        parts = re.split(r"\n(?:[^\S\n]*\n)+", "\n\n" + path.read_text(encoding="utf-8"))
        for ids in encoder.encode([part.rstrip("\n") for part in parts if part.strip()]):
            place += 1
            tokens["validation" if place % 50 == 0 else "train"] += len(ids) + 1
    [line] = printed_by("README.md", "fineline data prepare text")
    counts = ", ".join(f"{split}: {count // 129:,} windows" for split, count in tokens.items())
    assert line == f"data/corpus: prepared ({counts})"
