"""The tables, lists and counts of the pages against the code that they describe."""

import dataclasses
import importlib.metadata
import json
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from docs_pages import CHECKOUT, PAGES, blocks, numbers, page, table, ticked

from fineline_jax.catalogue import config_names, load_recipe
from fineline_jax.checkpoints.registry import entries
from fineline_jax.checkpoints.registry.series_file import KEYS
from fineline_jax.errors import UserError
from fineline_jax.facts.tasks import task_of
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import FAMILIES
from fineline_jax.recipe import Checkpoints, Compute, Every, Logging, Loss, Optimizer, to_json
from fineline_jax.scoring import score_files
from fineline_jax.scoring.modes import mode as modes
from fineline_jax.scoring.modes.names import MODES, find_mode
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.requests.suite import open_suite
from fineline_jax.world import catalogue


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_readme_counts_layouts_and_series() -> None:
    assert numbers("README.md", "{} layouts on one decoder") == [len(FAMILIES)]
    assert numbers("README.md", "{} series are known") == [len(entries.every_entry())]


def test_every_family_has_its_row() -> None:
    rows = table("docs/families.md", "`--layout`")
    named = {ticked(row["`--layout`"])[0]: ticked(row["`architectures` in config.json"])[0] for row in rows}
    assert named == {family.name: family.architectures[0] for family in FAMILIES}
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    hints = get_type_hints(ModelConfig)
    for row in rows:
        for code in ticked(row["fields of `ModelConfig`"]):
            name, _, value = code.partition("=")
            assert name in fields and (not value or json.loads(value) in get_args(hints[name])), code
    assert "No token is ever dropped".lower() in flat(page("docs/families.md")).lower()


def test_the_weights_of_olmoes_two_losses_are_those_the_recipe_names() -> None:
    balance, router = re.findall(r"--loss\.[a-z-]+ ([\d.]+)", page("docs/families.md"))
    text = (CHECKOUT / "fineline_jax/recipe.py").read_text()
    assert re.findall(r"2101\.03961; OLMoE: ([\d.]+)\)", text) == [balance] == ["0.01"]
    assert re.findall(r"2202\.08906; OLMoE: ([\d.]+)\)", text) == [router] == ["0.001"]
    assert Loss().load_balance == Loss().router_z_loss == 0  # both are off unless asked for


def test_the_world_is_as_its_table_says(tmp_path: Path) -> None:
    from fineline_jax.world import commonsense, facts, generate, reasoning, subject, tokenizer

    rows = table("docs/world.md", "domain")
    domain, domains, choices = "", {}, {}
    for row in rows:
        domain = row["domain"] or domain
        [task] = ticked(row["task"])
        domains[task], choices[task] = domain, row["choices"]
    assert list(domains.items()) == [(name, one.domain) for name, one in catalogue.TASKS.items()]
    found = {task: questions for one in generate.make_subjects(0).values() for task, questions in one.questions.items()}
    most, fewer = numbers("docs/world.md", "are multiple choice with {} questions (`world_counting` {})")
    for task, questions in found.items():
        assert len(questions) == (fewer if task == "world_counting" else most), task
        if choices[task] == "–":
            assert task == "world_cloze"
            continue
        assert {len(question.choices) for question in questions} == {int(choices[task])}, task
        assert catalogue.TASKS[task].chance == 1 / int(choices[task])
    assert most == subject.QUESTIONS
    for n, error in zip((most, fewer), numbers("docs/world.md", "accuracy is at most {} ({})")):
        assert round(math.sqrt(0.25 / (n - 1)), 3) == error
    assert numbers("docs/world.md", "{} people with a town, a job, a pet") == [facts.PEOPLE]
    assert numbers("docs/world.md", "facts about the {} best-known people") == [facts.COMMON]
    assert numbers("docs/world.md", "facts about the {} least-known people") == [facts.PEOPLE - facts.RARE]
    assert numbers("docs/world.md", "what happens to things of {} materials") == [len(commonsense.THINGS)]
    assert numbers("docs/world.md", "the land of {} % of the people is never written") == [100 * reasoning.INFERRED]
    assert numbers("docs/world.md", "The tokenizer has {} ids") == [tokenizer.VOCAB_SIZE]
    assert load_recipe("demo").model.vocab_size == tokenizer.VOCAB_SIZE


def test_the_text_of_the_world_has_the_tokens_that_the_page_says(tmp_path: Path) -> None:
    import tokenizers

    from fineline_jax.world.generate import DOCUMENTS, generate

    world = generate(tmp_path, documents=3000)
    encoder = tokenizers.Tokenizer.from_file(str(world.tokenizer / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in world.text.read_text().splitlines()]
    per_document = sum(len(one.ids) + 1 for one in encoder.encode_batch(texts)) / 3000  # <s> is counted, </s> follows
    assert [round(per_document * DOCUMENTS / 1e6, 1)] == numbers("docs/world.md", "per line, {} million tokens")
    assert round(load_recipe("demo").tokens / 1e6) == 2 and "after two million tokens" in flat(page("docs/world.md"))


def test_every_suite_has_its_row_and_its_number_of_tasks() -> None:
    rows = {ticked(row["suite"])[0]: row for row in table("docs/suites.md", "suite")}
    assert set(rows) == set(config_names("suites/{}.yaml"))
    holds = {name: flat(row["holds"]) for name, row in rows.items()}
    assert holds["core"].startswith("nine quick") and len(open_suite("core").tasks) == 9
    assert {spec.shots for spec in open_suite("core").tasks} == {0} and holds["core"].endswith("zero-shot")
    fineline = open_suite("fineline").tasks
    assert re.search(r"(\d+) tasks and groups", holds["fineline"])[1] == str(len(fineline))
    assert set(re.split(r", |: ", holds["fineline"])[:-1]) == {spec.domain for spec in fineline}
    assert "57 subjects, five-shot" in holds["mmlu"] and [spec.shots for spec in open_suite("mmlu").tasks] == [5]
    olmes = open_suite("olmes")
    assert holds["olmes"] == "the ten tasks of OLMES, five-shot, mode olmes"
    assert (len(olmes.tasks), {spec.shots for spec in olmes.tasks}, olmes.mode) == (10, {5}, "olmes")
    assert {spec.shots for spec in open_suite("pythia").tasks} == {0} and "zero-shot" in holds["pythia"]
    shipped = re.search(r"`configs/suites`; (.*?) are shipped", flat(page("docs/scoring.md")))
    assert shipped is not None and set(ticked(shipped[1])) == set(rows)


def test_the_keys_of_a_suite_are_those_of_the_table_with_their_defaults(tmp_path: Path) -> None:
    rows = {ticked(row["key"])[0]: row["left out"] for row in table("docs/suites.md", "left out")}
    file = tmp_path / "mine.yaml"
    file.write_text("tasks: [{task: piqa}]")
    made = open_suite(str(file))
    [spec] = made.tasks
    assert set(rows) == {"mode", "include_path"} | {field.name for field in dataclasses.fields(spec)}
    assert rows["mode"] == f"`{made.mode}`" and rows["task"] == "required" and rows["include_path"] == "none"
    assert spec.shots is None
    known = "the table of tasks, else "
    for key in ("domain", "metric", "chance"):
        assert rows[key].startswith(known) and getattr(spec, key) == getattr(task_of("piqa"), key)
    file.write_text("tasks: [{task: my_own_task}]")
    [other] = open_suite(str(file)).tasks
    assert rows["domain"] == f"{known}`{other.domain}`" and (other.metric, other.chance) == (None, None)
    example = yaml.safe_load("\n".join(blocks("docs/suites.md")[0]))
    file.write_text(yaml.safe_dump(example))
    read = open_suite(str(file))
    assert [dataclasses.asdict(one) for one in read.tasks] == [
        dict.fromkeys(("task", "domain", "shots", "metric", "chance")) | task for task in example["tasks"]
    ]


def test_modes_and_their_metrics_are_those_of_the_table() -> None:
    rows = {row["0"]: row for row in table("docs/suites.md", "`olmes`")}
    assert [heading.strip("`") for heading in list(rows["scored"])[1:]] == list(MODES)
    for mode in MODES:
        first = rows["metrics of choices"][f"`{mode}`"].removesuffix(", ...").split(", ")
        assert tuple(first) == find_mode(mode).choice_metrics[: len(first)]
    assert f"at most {modes.largest_context(find_mode('olmes'), None)}" == rows["tokens fed"]["`olmes`"]
    assert all(find_mode(mode).context_limit is None for mode in ("lm-eval", "opencompass-ppl"))
    counterparts = table("docs/suites.md", "named in the suite")
    choices = {name for mode in MODES for name in find_mode(mode).counterparts}
    assert {row["named in the suite"] for row in counterparts} == choices
    for row in counterparts:
        for mode in MODES:
            found = modes.first_metric(find_mode(mode), "multiple_choice", row["named in the suite"])
            if row[f"in `{mode}`"] == "refused":
                with pytest.raises(UserError):
                    modes.check_metric(find_mode(mode), "piqa", "multiple_choice", found, (), False)
            else:
                assert found == row[f"in `{mode}`"]


def test_every_metric_of_choices_texts_and_solutions_is_explained() -> None:
    explained = flat(" ".join(row["metric"] for row in table("docs/scoring.md", "over documents")))
    explained = re.sub(r"(choice_prob), (_per_token), (_per_char)", r"\1, \1\2, \1\3", explained)
    explained = re.sub(r"(bits_per_byte), (_best)", r"\1, \1\2", explained)
    words = set(re.findall(r"\w+", explained))
    assert {*find_mode("lm-eval").choice_metrics, *modes.SOLUTION_METRICS, "acc_mutual_info", "f1", "mcc"} <= words
    assert {name for names in modes.TEXT_METRICS.values() for name in names} <= words
    solutions = [row["metric"] for row in table("docs/suites.md", "per document")]
    assert tuple(solutions) == modes.SOLUTION_METRICS


def test_a_packs_columns_are_those_of_the_pages() -> None:
    rows = {ticked(row["file"])[0]: row["columns"] for row in table("docs/scoring.md", "columns")}
    text = flat(page("ARCHITECTURE.md"))
    for name, schema in pack.SCHEMAS.items():
        listed = re.sub(r" \([^)]*\)", "", rows[f"{name}.parquet"]).split(", ")
        assert listed == schema.names
        there = re.search(rf"PACK/{name}\.parquet one row per .*?: (.*?)(?= PACK/| Scores:|$)", text)
        words = there[1].replace(
            "choice lengths in characters, bytes and tokens", "choice_chars, choice_bytes, choice_tokens"
        )
        assert all(re.search(rf"\b{column}\b", words) for column in schema.names)
    assert numbers("ARCHITECTURE.md", "(`fineline tasks prepare`, format {})") == [pack.FORMAT]
    assert "mode (lm-eval, olmes, opencompass-ppl)" in text and MODES == ("lm-eval", "olmes", "opencompass-ppl")


def test_a_score_files_columns_and_metadata_are_those_of_architecture() -> None:
    text = flat(page("ARCHITECTURE.md"))
    line = re.search(r"<checkpoint>\.parquet (.*?); file metadata: (.*?) SCORES/log", text)
    assert line is not None
    columns = [name for name in re.findall(r"\w+", re.sub(r"\(.*?\)", "", line[1]))]
    assert columns == score_files._SCHEMA.names and str(score_files._SCHEMA.field("loglikelihood").type) in (
        "double",
        "float64",
    )
    for field in dataclasses.fields(score_files.Header):
        assert field.name.removeprefix("engine_").replace("reason", "why") in line[2], field.name
    key = re.search(r"key \{(.*?)\}", line[2])
    assert key is not None and key[1] == "weights_hash, pack_hash, dtype, bos, engine_version"
    assert [field.name for field in dataclasses.fields(score_files.Key)] == key[1].split(", ")
    five = "A score belongs to five things: weights, pack, dtype, BOS policy, version of the engine."
    assert five in flat(page("docs/score_series.md"))


def test_the_tidy_tables_columns_are_those_of_the_pages() -> None:
    from fineline_jax.facts.score_table import COLUMNS

    columns = re.search(r"`(series, checkpoint, [\w, ]+)`", page("ARCHITECTURE.md"))
    assert columns is not None and tuple(columns[1].split(", ")) == tuple(COLUMNS)
    row = next(row["how"] for row in table("docs/analyze.md", "how") if "columns" in row["how"])
    assert set(ticked(row)) == set(COLUMNS)


def test_the_recipes_and_fields_of_the_pretrain_page_exist() -> None:
    listed = re.search(r"a file in `configs/` \((.*?)\)", flat(page("docs/pretrain.md")))
    assert listed is not None and set(ticked(listed[1])) == set(config_names("{}.py"))
    rows = {ticked(row["field"])[0]: row["values"] for row in table("docs/pretrain.md", "field")}
    kinds = get_type_hints(Compute)
    assert set(ticked(rows["compute.remat"])) == set(get_args(kinds["remat"]))
    assert set(ticked(rows["compute.attention"])) == set(get_args(kinds["attention"]))
    recipe = json.loads(to_json(load_recipe("llama_60m")))
    for name in re.findall(rf"`((?:{'|'.join(recipe)})\.[\w.]+)`", page("docs/pretrain.md")):
        value: Any = recipe
        for part in name.split("."):
            assert part in value, name
            value = value[part]
    example = next(block for block in blocks("docs/pretrain.md") if block[0] == "checkpoints=Checkpoints(")
    made = eval("dict(" + "\n".join(example) + "\n)", {"Checkpoints": Checkpoints, "Every": Every})["checkpoints"]
    for line in example[1:]:  # each comment says its line's numbers
        for amount in re.findall(r"(\d+) B", line):
            assert f"{int(amount):_}_000_000_000" in line
    assert made == Checkpoints(True, (), (Every(10**10, 10**11), Every(10**11)), 5 * 10**8)


def test_a_line_of_metrics_has_the_fields_of_the_page() -> None:
    from fineline_jax.training import metrics

    text = re.search(r"RUN/metrics\.jsonl (.*?) RUN/tensorboard", flat(page("docs/pretrain.md")))
    assert text is not None
    fields = {
        "step",
        "tokens",
        "loss",
        "gradient_norm",
        "update_norm",
        "learning_rate",
        "trained_tokens",
    }
    assert all(re.search(rf"\b{name}\b", text[1]) for name in {*fields, *metrics.TIMINGS})
    code = "".join((CHECKOUT / f"fineline_jax/training/{name}.py").read_text() for name in ("step", "observers"))
    assert 'f"validation_loss/{name}"' in code and "validation_loss/NAME" in text[1]
    assert all(f'"{name}"' in code for name in {*fields, *metrics.TIMINGS} - {"mfu", *metrics.SPENT})
    loop = (CHECKOUT / "fineline_jax/training/loop.py").read_text()
    assert all(f'"{name.removesuffix("_seconds")}"' in loop for name in metrics.SPENT)
    assert (Logging().every_steps, Optimizer.skip_nonfinite, Optimizer.skip_spike_sigmas) == (1, False, 0.0)


def test_the_verdicts_and_columns_of_the_analyze_page_are_those_of_the_code() -> None:
    from fineline_jax.trajectories.statistics import dynamics

    named = {row["verdict"] for row in table("docs/analyze.md", "verdict")}
    constants = {dynamics.AT_CHANCE, dynamics.BELOW_CHANCE, dynamics.NO_RISE, dynamics.TOO_FEW, dynamics.DEGENERATE}
    assert named == constants | {dynamics.DECLINED, "settled", "still rising", "above chance"}
    rows = {row["column"]: row["definition"] for row in table("docs/analyze.md", "definition")}
    from scipy import stats

    assert "one-sided test at 1 %" in rows["onset"]
    assert pytest.approx(stats.norm.isf(0.01), abs=5e-4) == dynamics.Z
    assert "1995, 5 %" in rows["onset"] and dynamics.FALSE_DISCOVERIES == 0.05
    assert rows["t10, t50, t90"].count("10, 50, 90 %") == 1 and [*dynamics.FRACTIONS.values()] == [0.1, 0.5, 0.9]
    verdicts = {row["verdict"]: row["meaning"] for row in table("docs/analyze.md", "verdict")}
    assert re.search(r"under (\d+) times the noise", verdicts["no clear change"])[1] == f"{dynamics.CLEAR_RISE_SNR:g}"
    assert "at least twice those tokens" in verdicts["settled"] and dynamics.SETTLED_FACTOR == 2
    assert "fewer than five checkpoints" in verdicts["too few checkpoints"]


def test_the_jobs_of_part_auto_are_told_apart_by_the_variables_of_the_table() -> None:
    from fineline_jax.scoring.job_shard import JobShard, job_shard

    for row in table("docs/score_series.md", "index"):
        for index in ticked(row["index"]):
            [count, *others] = ticked(row["number"])
            of = "a,b,c,d,e" if count.endswith("HOSTNAMES") else "5"
            assert job_shard("auto", {index: "2", count: of}) == JobShard(2, 5), index
            for other in others:
                assert job_shard(other.removeprefix("--part ").replace("N", "5"), {index: "2"}) == JobShard(2, 5)
    with pytest.raises(UserError):
        job_shard("auto", {})


def test_the_keys_of_a_series_file_are_those_of_the_table() -> None:
    keys = {key.partition(":")[0] for row in table("docs/series.md", "meaning") for key in ticked(row["key"])}
    assert keys == KEYS
    amber = (CHECKOUT / "configs/series/amber.yaml").read_text()
    assert any("\n".join(block) + "\n" == amber for block in blocks("docs/series.md"))


def test_downloads_are_tried_again_as_the_page_says() -> None:
    from fineline_jax.checkpoints.remote import download

    text = flat(page("docs/series.md"))
    assert numbers("docs/series.md", "given up after {} attempts in a row") == [download.ATTEMPTS]
    assert "after 1, 2, 4, … seconds" in text and download.BACKOFF == 1.0
    assert {408, 429} | {500, 502, 503, 504} <= set(download._PASSING) and "Status 5xx, 408, 429" in text
    variables = {
        name.partition("=")[0] for row in table("docs/series.md", "variable") for name in ticked(row["variable"])
    }
    code = (CHECKOUT / "fineline_jax/checkpoints/remote/download.py").read_text()
    assert all(name in code for name in variables if not name.endswith("…"))


def test_what_a_torch_file_may_hold_is_counted_right() -> None:
    from fineline_jax.checkpoints.formats import torch_pickle

    opcodes, names = numbers("docs/formats.md", "knows the {} opcodes that `torch.save` writes and {} names")
    assert opcodes == len(torch_pickle._OPERATIONS) + 1  # and STOP
    assert names == len(torch_pickle.STORAGES) + len(torch_pickle.DTYPES) + len(torch_pickle._CALLS)
    assert numbers("docs/formats.md", "the pickle, of which {} MiB") == [torch_pickle.LARGEST / 2**20]


def test_sizes_of_files_and_pieces() -> None:
    from fineline_jax.checkpoints.formats import host_copy, huggingface
    from fineline_jax.data import storage
    from fineline_jax.models import moe

    assert numbers("docs/formats.md", "(several files and an index above {} GB)") == [huggingface.SHARD_BYTES / 1e9]
    assert [int(host_copy.PIECE / 1e6)] == numbers("docs/formats.md", "one piece, of {} million elements at most")
    assert numbers("docs/data.md", "Record files hold {} windows") == [storage.WINDOWS_PER_FILE]
    assert numbers("docs/families.md", "on CPU in blocks of {} rows") == [moe.BLOCK]
    limit = numbers("docs/data.md", "(uint16 up to {} tokens, int32 above)")
    assert limit == [2**16] == numbers("ARCHITECTURE.md", "uint16 (int32 for vocabularies above {})")
    per, total = numbers("docs/checkpoints.md", "{} bytes per parameter, uncompressed (7B: about {} GB per kept step)")
    assert per == 3 * 4 and total == round(per * load_recipe("open_llama_7b").model.parameters / 1e9)


def test_ambers_clock_is_printed_right() -> None:
    amber = load_recipe("amber_7b")
    parameters, steps, chunks = numbers("README.md", "are checked ({} parameters, {} steps, {} chunks)")
    assert (parameters, steps, chunks) == (amber.model.parameters, amber.steps, len(amber.kept_steps()) - 1)
    windows, batch, per_chunk, in_all = numbers("docs/data.md", "{} // {} = {} steps per chunk, {} in all")
    assert windows // batch == per_chunk and in_all == amber.steps == per_chunk * chunks
    assert batch == amber.batch.sequences
    assert numbers("docs/data.md", '{"token_ids": [{} ints]') == [amber.data.sequence_length + 1]


def test_the_demo_in_the_readme_is_the_recipes() -> None:
    from fineline_jax.progress import short

    demo = load_recipe("demo")
    assert f"of {short(demo.tokens)} tokens" in page("README.md")
    assert numbers("README.md", "scores {} checkpoints, writes a report") == [len(demo.kept_steps())]
    assert numbers("README.md", "trains a {} M Llama") == [round(demo.model.parameters / 1e6)]
    line = re.search(r"([\d.]+) M tokens, (\d+) checkpoints, all scored on (\d+) tasks", page("BENCHMARKS.md"))
    assert line is not None
    assert line.groups() == (f"{demo.tokens / 1e6:.2f}", str(len(demo.kept_steps())), str(len(catalogue.TASKS)))


def test_the_arguments_of_the_lm_eval_model_are_those_of_the_table() -> None:
    import inspect

    from fineline_jax.scoring.lm_eval.backend import FinelineLM
    from fineline_jax.scoring.metrics import bootstrap

    named = {name for row in table("docs/lm_eval.md", "argument") for name in ticked(row["argument"])}
    taken = inspect.signature(FinelineLM).parameters
    assert named == set(taken) - {"batch_size", "max_batch_size", "device", "unknown"}
    assert taken["dtype"].default == "float32" and (taken["replica"].default, taken["fsdp"].default) == (1, -1)
    for name, sentence in (
        ("docs/lm_eval.md", "those of lm-eval's {} resamples"),
        ("docs/scoring.md", "bootstrap of {} res"),
    ):
        assert numbers(name, sentence) == [bootstrap.ITERATIONS] == [100_000]


def test_the_installed_lm_eval_is_the_one_the_pages_speak_of() -> None:
    spoken = {
        version for name in (*PAGES, "BENCHMARKS.md") for version in re.findall(r"lm-eval (0\.4\.\d+)", page(name))
    }
    lock = (CHECKOUT / "requirements.lock").read_text()
    assert spoken == set(re.findall(r"(?m)^lm-eval==(\S+)", lock)) == {importlib.metadata.version("lm-eval")}


def test_extras_that_pages_name_exist() -> None:
    extras = {name.lower() for name in importlib.metadata.metadata("fineline_jax").get_all("Provides-Extra") or ()}
    for name in PAGES:
        for extra in re.findall(r"'\.\[(\w+)\]'", page(name)):
            assert extra in extras, f"{name}: {extra}"


def test_tfds_data_sets_are_those_of_the_page() -> None:
    from fineline_jax.scoring.requests.tfds_source import _MAPPED

    listed = re.search(r"prepared by TFDS as ArrayRecord \(([\w, ]+)\)", flat(page("docs/scoring.md")))
    assert listed is not None and set(listed[1].split(", ")) == {one.builder.split("/")[0] for one in _MAPPED.values()}
