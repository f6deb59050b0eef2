"""The registry of series and the choice of checkpoints. No JAX."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_examples import hub

from fineline_jax.checkpoints.open import open_series, series_of_entry
from fineline_jax.checkpoints.registry import entries as registry_entries
from fineline_jax.checkpoints.registry.entries import checkpoints, entries, find, series_files
from fineline_jax.checkpoints.registry.rules import bind, evaluate, expand
from fineline_jax.checkpoints.remote import download
from fineline_jax.checkpoints.select import TokenGrid, nearest, parse_amount, parse_grid, select
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.cli import main
from fineline_jax.errors import UserError

B = 10**9


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def entry(name: str) -> registry_entries.Entry:
    found = find(name)
    assert found is not None
    return found


# The entries


@pytest.mark.parametrize("file", series_files().values(), ids=lambda file: file.stem)
def test_every_file_reads_names_its_sources_and_has_ascending_tokens(file: Path) -> None:
    for one in entries(file):
        assert one.title and one.sources and "{" not in one.name
        known = checkpoints(one, ask=False)
        assert known or one.listing
        tokens = [checkpoint.tokens for checkpoint in known if checkpoint.tokens is not None]
        assert tokens == sorted(set(tokens))
        assert len(tokens) == len(known) or any("okens" in note for note in one.notes), "said where they are not known"
        assert one.count is None or len(known) == one.count or (one.listing and len(known) < one.count)
        starts = list(registry_entries.stage_starts(one).values())
        assert starts == sorted(starts) and len(starts) == len(one.stages)
        assert all("{" not in checkpoint.url for checkpoint in known)
        for checkpoint in known:
            assert registry_entries.matching(one, [checkpoint.name])


def test_names_of_series_are_unique() -> None:
    names = [one.name for file in series_files().values() for one in entries(file)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("series", "count", "first", "last"),
    [
        # reproduction notes: published counts, and tokens computed there
        ("amber", 360, ("ckpt_000", 762, 3_495_690_240), ("main", 274_320, 1_258_448_486_400)),
        ("amber-reproduce", 22, ("8.39B", 2_000, 8_388_608_000), ("1300.23B", 310_000, 1_300_234_240_000)),
        ("openllama-reproduce", 19, ("100.66B", 24_000, 100_663_296_000), ("1933.57B", 461_000, 1_933_574_144_000)),
        ("open_llama_7b", 9, ("step_2500", 2500, 10_485_760_000), ("step_250000", 250_000, 1_048_576_000_000)),
        ("baichuan2-7b", 11, ("train_00220B", None, 220 * B), ("train_02420B", None, 2420 * B)),
        ("pythia-6.9b-deduped", 154, ("step0", 0, 0), ("step143000", 143_000, 299_892_736_000)),
        ("yi-34b", 1, ("main", None, 3100 * B), ("main", None, 3100 * B)),
        ("tinyllama", 7, ("step-50K-105b", 50_000, 104_857_600_000), None),
    ],
)
def test_a_series_has_the_published_checkpoints(series, count, first, last) -> None:
    found = checkpoints(entry(series), ask=False)
    assert len(found) == count
    assert (found[0].name, found[0].step, found[0].tokens) == first
    if last:
        assert (found[-1].name, found[-1].step, found[-1].tokens) == last


def test_every_pythia_has_its_154_checkpoints() -> None:
    """EleutherAI/pythia README: step0, ten at powers of two, then one every 1000 steps to 143000; eight sizes with and
    without deduplication, two smaller ones, nine further seeds of five sizes."""
    steps = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    both = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
    names = [f"pythia-{size}{suffix}" for size in both for suffix in ("", "-deduped")] + ["pythia-14m", "pythia-31m"]
    found = {one.name: one for file in ("pythia", "pythia_seeds") for one in entries(series_files()[file])}
    seeds = [f"pythia-{size}-seed{i}" for size in ("14m", "31m", "70m", "160m", "410m") for i in range(1, 10)]
    assert sorted(found) == sorted([*names, *seeds])
    for name, one in found.items():
        listed = checkpoints(one)
        assert [(each.name, each.step, each.tokens) for each in listed] == [
            (f"step{step}", step, step * 2_097_152) for step in steps
        ]
        assert listed[-1].url == f"hf://EleutherAI/{name}@step143000" and len(listed) == 154


@pytest.mark.parametrize(
    ("series", "known"),
    [
        # the names that the reproduction notes found published; the rest is listed
        ("open_llama_7b", {"step_5000", "step_7500", "step_50000", "step_100000", "step_250000"}),
        ("open_llama_13b", {"step_15000", "step_300000", "step_500000"}),
        ("open_llama_3b", {"step_5000"}),
        ("open_llama_3b_v2", {"step_20000", "step_300000"}),
        ("open_llama_7b_first_run", {"200bt", "300bt"}),
        ("open_llama_7b_previews", {"400bt_preview", "700bt_preview"}),
        ("open_llama_3b_previews", {"350bt_preview", "600bt_preview"}),
        ("open_llama_13b_previews", {"600bt"}),
        ("olmo-7b", {"step1000-tokens4B", "step452000-tokens2000B", "step556000-tokens2460B"}),
        ("olmo-2-7b", {"stage1-step928646-tokens3896B", "step150-tokens1B"}),
        ("olmo-2-13b", {"stage1-step596057-tokens5001B"}),
        ("olmo-2-1b", {"stage1-step1907359-tokens4001B"}),
        ("olmo-2-13b-stage2-ingredient4", {"stage2-ingredient4-step35773-tokens300B"}),
        ("olmoe-1b-7b", {"step10000-tokens41B"}),
        ("ct-llm", {"799.90B"}),
        ("deepseek-7b", set()),
        ("deepseek-67b", set()),
        ("datadecide-dclm-baseline-1B-large-aux-2", set()),
    ],
)
def test_a_series_whose_names_are_not_all_published_is_listed(series: str, known: set[str]) -> None:
    one = entry(series)
    assert known <= set(one.names) and (one.listing or "first_run" in series or "previews" in series)
    assert one.tokens or series == "open_llama_3b", "whose batch nobody has published"


def test_datadecide_has_25_corpora_14_sizes_and_3_seeds() -> None:
    found = entries(series_files()["datadecide"])
    assert len(found) == 25 * 14 * 3 and len({one.location for one in found}) == 25 * 14


def test_the_exact_tokens_agree_with_the_rounded_ones_in_the_names() -> None:
    for series in ("amber-reproduce", "openllama-reproduce"):
        for one in checkpoints(entry(series), ask=False):
            assert one.tokens is not None and one.step is not None and one.step % 1000 == 0
            assert abs(one.tokens / B - float(one.name[:-1])) <= 0.0051
    for series in ("olmo-7b", "olmo-1b", "olmoe-1b-7b", "olmo-2-7b", "olmo-2-13b", "olmo-2-1b", "olmo-2-32b"):
        for one in checkpoints(entry(series), ask=False):  # rounded to billions, some up and some down
            said = int(one.name.rpartition("tokens")[2][:-1])
            assert one.tokens is not None and abs(one.tokens / B - said) < 1


@pytest.mark.parametrize(
    ("size", "last_step", "parameters"),
    [("4M", 5725, 3.75e6), ("60M", 29042, 57.1e6), ("90M", 29901, 97.9e6), ("150M", 38157, 150e6),
     ("750M", 63589, 750e6), ("1B", 69369, 1e9)],
)  # fmt: skip
def test_a_datadecide_model_ends_at_100_tokens_per_parameter(size, last_step, parameters) -> None:
    one = registry_entries.named(entry(f"datadecide-c4-{size}-default"), f"step{last_step}-seed-default")
    assert one.tokens == pytest.approx(100 * parameters, rel=0.01)


def test_locations_follow_the_four_layouts(tmp_path: Path) -> None:
    where = {name: checkpoints(entry(name), ask=False)[0].url for name in ("amber", "amber-reproduce", "ct-llm")}
    assert where == {
        "amber": "hf://IFM/Amber@ckpt_000",
        "amber-reproduce": "hf://m-a-p/Amber-Reproduce-8.39B",
        "ct-llm": "hf://m-a-p/CT-LLM-intermediate-ckpts/799.90B",
    }
    bucket = entry("deepseek-67b")
    found = registry_entries.named(bucket, "step_1000")
    assert found.url == "s3://deepseek-ai/DeepSeek-LLM/DeepSeek-LLM-67B-Base/step_1000"
    assert found.tokens == 1000 * 4608 * 4096 and dict(bucket.options) == {"requester_pays": True}
    assert registry_entries.named(bucket, "ckpt-120B-x").tokens == 120 * B
    assert registry_entries.named(bucket, "final").tokens is None


def test_openllamas_policy_is_recorded() -> None:
    one = series_of_entry(entry("open_llama_7b"), Path("x"), ask=False)
    assert one.scoring.bos == "always" and any("spaces" in note for note in one.scoring.notes)
    assert one.checkpoints[0].remote is not None
    assert one.checkpoints[0].remote.tokenizer == "hf://openlm-research/open_llama_7b/tokenizer.model"


# A user's own file


OWN = """
name: ours
location: s3://bucket/run/{name}
names: "step{0..4000..1000} last"
pattern: step{step}
values: {last: {step: 4500}}
tokens: step * 1_000_000
"""


def test_a_file_of_ones_own_is_a_series(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)
    found = open_series(f"{file}@step[1-9]*", downloads=tmp_path, every=2)
    assert [(one.series, one.name, one.tokens) for one in found.checkpoints] == [
        ("ours", "step1000", 1 * B),
        ("ours", "step3000", 3 * B),
    ]
    assert open_series(str(file), tokens="4.4B").checkpoints[0].name == "last"


def test_a_file_in_the_working_folder_is_known_by_its_name(tmp_path: Path, monkeypatch, capsys) -> None:
    """No code, no option: it is listed with the others, and opened by name."""
    (tmp_path / "configs" / "series").mkdir(parents=True)
    (tmp_path / "configs" / "series" / "mine.yaml").write_text(OWN + "title: My own run\n")
    monkeypatch.chdir(tmp_path)
    assert main(["series"]) == 0
    listed = capsys.readouterr().out
    assert "My own run" in listed and "amber" in listed
    assert len(open_series("mine", downloads=tmp_path).checkpoints) == 6 == len(open_series("mine").checkpoints)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tokens: step * import", "is no rule"),
        ("tokens: __import__('os')", "is no rule"),
        ("tokens: step ** 9", "is no rule"),
        ("tokens: max(step)", "is no rule; allowed are"),
        ("count: many", "count: must be a number of checkpoints, or unknown"),
        ("stages: 5", "stages: must be a mapping"),
        ("stages: {second: [1, 2]}", "stages: second: must be a rule for the tokens"),
        ("stages: {second: step * 2}", "stages: 'step * 2' uses step, which no pattern"),
        ("color: red", "unknown key 'color'"),
        ("location: s3://bucket", "has no {name}"),
        ("names: ''", "give names:, or listing: true"),
        ("names: a a", "'a' is there twice"),
        ("names: 'x{3..1}'", "is no range"),
        ("names: 'x{y}'", "neither a range nor a list"),
        ("scoring: {bos: sometimes}", "scoring: holds bos"),
        ("title: [1", "not valid YAML"),
        ("variants: 3", "variants: must be"),
        ("variants: []", "variants: is empty"),
        ("variants: {a: []}", "variants: a: must be"),
        ("variants: {a: [[1]]}", "variants: a: must be"),
        ("variants: {name: [x]}", "variants: {name} stands for"),
        ("variants: {1: [x]}", "variants: must be"),
        ("values: 5", "values: must be a mapping"),
        ("values: {last: 5}", "last: must be a mapping"),
        ("values: {last: {step: many}}", "values: last: must hold numbers"),
        ("options: [1]", "options: must be a mapping"),
        ("options: {token: [1]}", "options: token: must be a text, a number, true or false"),
        ("location: 'bucket/run/{name}'", "location: 'bucket/run/{name}' is no address; write hf://"),
        ("tokenizer: here", "tokenizer: 'here' is no address"),
        ("scoring: always", "scoring: must be a mapping"),
        ("scoring: {notes: {a: b}}", "scoring: notes: must be a text or a list"),
        ("notes: {a: b}", "notes: must be a text or a list"),
        ("location: 's3://bucket/{sise}/{name}'", "location: {sise} is no key of variants"),
        ("name: 'tiny-{size}'", "name: {size} is no key of variants"),
        ("pattern: 'step{1}'", "pattern: 'step{1}' is no pattern"),
        ("pattern: '{a}-{a}'", "pattern: '{a}-{a}' is no pattern"),
        ("tokens: stepp * 2", "tokens: 'stepp * 2' uses stepp, which no pattern, value or variant gives; known: step"),
        ("tokens: step + foo(3)", "tokens: 'step + foo(3)' is no rule"),
        ("tokens: 1 / (step - step)", "tokens: '1 / (step - step)' cannot be computed"),
        ("tokens: 1e200 * 1e200", "tokens: '1e200 * 1e200' gives inf"),
        ("names: 'x{0..99999999999}'", "more than 100,000 names"),
        ("names: 'x{0..999}{0..999}'", "x{0..999}{0..999}: means more than 100,000 names"),
        (f"variants: {{{', '.join(f'{key}: {list(range(30))}' for key in 'abcdefgh')}}}", "more than 10,000 series"),
        ("listing: maybe", "listing: true to read"),
        ("title: [1]", "title: must be a text"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, change: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    key = change.partition(":")[0]
    kept = [line for line in OWN.splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, change]))
    with pytest.raises(UserError) as error:
        open_series(str(file), downloads=tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value) and "mine.yaml" in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for content in (b"\xff\xfe\x00", b"[" * 5000, b"just words", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"mine\.yaml: (not valid YAML|holds no mapping)") as error:
            open_series(str(file), downloads=tmp_path)
        assert "\n" not in str(error.value)


def test_one_of_several_series_in_a_file_of_ones_own_is_named_behind_it(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(OWN.replace("ours", "ours-{size}").replace("run/", "run-{size}/") + "variants: {size: [1b, 7b]}")
    with pytest.raises(UserError, match=r"mine.yaml: holds 2 series; give one by name, such as .*mine.yaml/ours-1b"):
        open_series(str(file))
    found = open_series(f"{file}/ours-7b@step1*", downloads=tmp_path)
    assert [one.remote.url for one in found.checkpoints if one.remote] == ["s3://bucket/run-7b/step1000"]
    with pytest.raises(UserError, match="holds no series 'ours-3b'"):
        open_series(f"{file}/ours-3b")
    assert main(["series", str(file)]) == 0
    assert capsys.readouterr().out.split()[2:] == [f"{file}/ours-1b", f"{file}/ours-7b"]


def test_what_is_no_series_is_said_with_a_hint() -> None:
    with pytest.raises(UserError, match="no registered series; did you mean 'amber'"):
        open_series("ambre")
    with pytest.raises(UserError, match=r"did you mean 'pythia-1\.4b-deduped'"):
        open_series("Pythia-1.4B-dedup")
    with pytest.raises(UserError, match="pythia: holds 18 series; give one by name, such as pythia-14m"):
        open_series("pythia")
    with pytest.raises(UserError, match="give a registered series or the path"):
        open_series("none.yaml")
    for address in ("hf://org", "hf://*/model", "s3://", "://x", "hf://"):
        with pytest.raises(UserError, match="expected"):
            open_series(address)
    with pytest.raises(
        UserError, match=r"amber@ckpt_9.*: no checkpoint has such a name; they run from ckpt_000 to main"
    ):
        open_series("amber@ckpt_9*")


def test_the_series_are_installed_with_the_package() -> None:
    assert (importlib.resources.files("fineline_jax.configs") / "series" / "amber.yaml").is_file()
    assert '"series/*.yaml"' in (Path(__file__).parents[2] / "setup.py").read_text()


# The command


def test_the_command_lists_the_series_and_the_checkpoints_of_one(capsys) -> None:
    assert main(["series"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("amber", "pythia", "olmoe", "deepseek", "yi-34b", "datadecide"))
    assert main(["series", "amber@ckpt_35*", "--every", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed[-3:]]
    assert [row[0] for row in rows] == ["ckpt_350", "ckpt_354", "ckpt_358"]
    assert rows[0][2:] == ["1,226,987,274,240", "hf://IFM/Amber@ckpt_350"]
    assert "tokens: step * 2240 * 2048" in printed
    assert main(["series", "amber", "--tokens", "0:100B:10B"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("ckpt_")]) == 11
    assert main(["series", "pythia"]) == 0
    assert "pythia-1.4b-deduped" in capsys.readouterr().out
    assert main(["series", "none"]) == 2
    assert main(["series", "--tokens", "0:1B"]) == 2
    assert "name it first" in capsys.readouterr().err


def test_what_cannot_be_listed_is_said_and_the_known_names_are_shown(capsys) -> None:
    assert main(["series", "open_llama_7b"]) == 0
    printed = capsys.readouterr().out
    assert "The listing cannot be had" in printed and "step_250000" in printed
    assert main(["series", "open_llama_7b@step_*0000", "--tokens", "200B:", "--every", "3"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step_")] == [
        "step_50000", "step_200000"]  # fmt: skip
    assert main(["series", "datadecide-c4-4M-default"]) == 2
    assert "no connection" in capsys.readouterr().err


def test_listed_checkpoints_are_matched_and_ordered_by_tokens(monkeypatch, tmp_path) -> None:
    names = ["step_100000", "step_7500", "400bt_preview", "step_7500_old", "easylm"]
    with hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        served.repositories = {f"openlm-research/open_llama_7b_{name}": {"main": {}} for name in names}
        found = open_series("open_llama_7b", downloads=tmp_path)
        assert [(one.name, one.tokens) for one in found.checkpoints] == [
            ("step_7500", 7500 * 4_194_304),
            ("step_100000", 100_000 * 4_194_304),
        ]
        branches = ["main", "stage1-step1000-tokens5B", "step150-tokens1B", "stage2-ingredient1-step1000-tokens5B"]
        served.repositories = {"allenai/OLMo-2-1124-7B": {key: {} for key in branches}}
        found = open_series("olmo-2-7b", downloads=tmp_path)
        assert [(one.name, one.step) for one in found.checkpoints] == [
            ("step150-tokens1B", 150),
            ("stage1-step1000-tokens5B", 1000),
        ]
        annealed = open_series("olmo-2-7b-stage2-ingredient1", downloads=tmp_path).checkpoints
        assert [(one.name, one.tokens) for one in annealed] == [(branches[3], 3_895_023_632_384 + 1000 * 4_194_304)]
        seeds = ["step0-seed-default", "step1250-seed-default", "step1250-seed-small-aux-2"]
        served.repositories = {"allenai/DataDecide-c4-4M": {key: {} for key in seeds}}
        found = open_series("datadecide-c4-4M-default", downloads=tmp_path)
        assert [(one.step, one.tokens) for one in found.checkpoints] == [(0, 0), (1250, 1250 * 32 * 2048)]


def test_offline_the_known_names_stand_for_the_listing(monkeypatch, caplog, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(open_series("open_llama_7b").checkpoints) == 9
    assert "offline, so only the 9 known checkpoints" in caplog.text
    (tmp_path / "ck_1").mkdir()
    (tmp_path / "own.yaml").write_text(f"location: file://{tmp_path}/ck_{{name}}\nlisting: true\nnames: 1 2\n")
    assert [c.name for c in open_series(str(tmp_path / "own.yaml")).checkpoints] == ["1"], "the hub alone is not asked"


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fineline_jax.cli import main; main(['series']); main(['series', 'amber']);"
        "assert not {'jax', 'orbax', 'transformers', 'lm_eval', 'huggingface_hub', 'fsspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


# The pieces


@given(st.integers(0, 300), st.integers(0, 50), st.integers(1, 9), st.integers(1, 4))
def test_braces_expand_as_in_a_shell(start: int, more: int, by: int, width: int) -> None:
    stop = start + more
    plain = [f"a{number}b" for number in range(start, stop + 1, by)]
    if not str(start).startswith("0") or start == 0:
        assert expand(f"a{{{start}..{stop}..{by}}}b") == plain
    padded = f"0{start:0{width}d}"
    assert expand(f"{{{padded}..{stop}}}") == [f"{number:0{len(padded)}d}" for number in range(start, stop + 1)]
    assert expand("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]


@given(st.integers(0, 10**7), st.integers(0, 10**5), st.integers(0, 99))
def test_a_pattern_finds_the_numbers_it_was_filled_with(step: int, whole: int, cents: int) -> None:
    name = f"stage1-step{step}-tokens{whole}.{cents:02d}B"
    assert bind("stage1-step{step}-tokens{billions}B", name) == {
        "step": step,
        "billions": float(f"{whole}.{cents:02d}"),
    }
    assert bind("*step{step}*", name) == {"step": step} or step >= 10
    assert bind("step{step}-tokens{billions}B", name) is None


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_rules_compute_as_python_does(a: int, b: int, c: int) -> None:
    numbers = {"a": a, "b": b, "c": c}
    for rule in ("a + b * c", "(a + b) * c", "a // b - c", "round(a / b)", "a * 1_000"):
        assert evaluate(rule, numbers) == eval(rule, {"round": round}, dict(numbers))
    assert evaluate("a * unknown", numbers) is None


# Choosing


def series_of(tokens: list[int | None]) -> Series:
    made = [Checkpoint("s", f"c{i}", i, value, Path(), "hf") for i, value in enumerate(tokens)]
    return Series("s", tuple(made))


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("0:100B:10B", TokenGrid(0, 100 * B, 10 * B)),
        ("100B:", TokenGrid(100 * B, None, None)),
        (":2.5T", TokenGrid(0, 2500 * B, None)),
        ("::50b", TokenGrid(0, None, 50 * B)),
        ("1e9:4_000_000_000:500M", TokenGrid(B, 4 * B, B // 2)),
    ],
)
def test_a_grid_is_written_as_start_stop_spacing(text: str, grid: TokenGrid) -> None:
    assert parse_grid(text) == grid


@pytest.mark.parametrize(
    "text",
    ["", ":", "::", "x", "1:2:3:4", "10B:5B", "0:1B:0", "-1:2", "0:1.5.2B", "5Q", "___", "1e99999999", "nan", "inf"],
)
def test_what_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--tokens"):
        parse_grid(text)


@given(st.integers(0, 10**15))
def test_amounts_are_read_back(tokens: int) -> None:
    assert parse_amount(str(tokens), "") == tokens
    assert parse_amount(f"{tokens}B", "") == tokens * B
    assert parse_amount(f"{tokens:_}", "") == tokens


@settings(max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 200), min_size=1, max_size=30, unique=True).map(sorted),
    start=st.integers(0, 150),
    length=st.none() | st.integers(0, 150),
    spacing=st.none() | st.integers(1, 60),
)
def test_a_grid_chooses_for_each_of_its_points_the_nearest_checkpoint_if_one_is_near(
    tokens: list[int], start: int, length: int | None, spacing: int | None
) -> None:
    stop = None if length is None else start + length
    found = nearest(tokens, TokenGrid(start, stop, spacing))
    end = max(tokens) + 200 if stop is None else stop
    if spacing is None:
        assert found == [i for i, value in enumerate(tokens) if start <= value <= end]
        return
    expected = set()
    for point in range(start, end + 1, spacing):
        distance, i = min((abs(value - point), i) for i, value in enumerate(tokens))
        if 2 * distance <= spacing:
            expected.add(i)
    assert found == sorted(expected)


@given(
    tokens=st.lists(st.none() | st.integers(0, 10**12), min_size=1, max_size=20),
    every=st.integers(1, 25),
    glob=st.sampled_from(["*", "c1*", "c[0-5]", "c?"]),
)
def test_a_choice_keeps_the_order_and_holds_nothing_else(tokens: list[int | None], every: int, glob: str) -> None:
    series = series_of(tokens)
    try:
        found = select(series, glob, every=every).checkpoints
    except UserError:
        assert glob == "c1*" and len(tokens) < 2
        return
    chosen = [
        one
        for one in series.checkpoints
        if glob == "*" or one.name in {c.name for c in select(series, glob).checkpoints}
    ]
    assert list(found) == chosen[::every]


def test_every_nth_is_of_what_the_grid_of_tokens_has_left() -> None:
    series = series_of([step * B for step in range(7)])
    assert [one.name for one in select(series, tokens="0:6B:2B", every=2).checkpoints] == ["c0", "c4"]


@pytest.mark.parametrize("keep", [True, False])
def test_whether_downloads_are_kept_reaches_every_checkpoint_of_a_registered_series(tmp_path: Path, keep: bool) -> None:
    series = open_series("amber", downloads=tmp_path, keep=keep)
    assert len(series.checkpoints) == 360
    for one in series.checkpoints:
        assert one.remote is not None and (one.remote.keep, one.remote.downloads) == (keep, tmp_path)


def test_a_choice_of_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="they run from c0 to c1"):
        select(series_of([1, 2]), "d*")
    with pytest.raises(UserError, match="no checkpoint is near; they have 1B to 2B tokens"):
        select(series_of([B, 2 * B]), tokens="50B:100B:10B")
    with pytest.raises(UserError, match="no checkpoint says how many tokens"):
        select(series_of([None]), tokens="1B:")
    with pytest.raises(UserError, match="--every 0"):
        select(series_of([1]), every=0)


def test_one_amount_is_the_checkpoint_nearest_to_it() -> None:
    found = select(series_of([0, 10 * B, 30 * B]), tokens="18B").checkpoints
    assert [one.name for one in found] == ["c1"]


DOUBLED = """
location: hf://org/tiny@{name}
names: "step1000-tokens2B step644000-tokens1350B"
pattern: step{step}-tokens{billions}B
tokens: step * 2048 * 2048
"""


def test_a_rule_that_disagrees_with_the_tokens_in_a_name_is_refused(tmp_path, capsys) -> None:
    """644,000 x 2048 x 2048 = 2,701.1e9; the names of OLMo-1B-0724-hf, whose batch is 1024 x 2048 = 2,097,152."""
    file = tmp_path / "mine.yaml"
    file.write_text(DOUBLED)
    assert main(["series", str(file)]) == 2
    said = capsys.readouterr().err
    assert "mine.yaml: tokens: step1000-tokens2B has 4.1943B by the rule; correct the rule" in said
    file.write_text(f"{DOUBLED}names_differ: They count one stage only.\n")
    assert [one.tokens for one in open_series(str(file)).checkpoints] == [4_194_304_000, 2_701_131_776_000]
    file.write_text(DOUBLED.replace("2048 * 2048", "2097152"))  # rounded names are no disagreement
    assert [one.tokens for one in open_series(str(file)).checkpoints] == [2_097_152_000, 1_350_565_888_000]


def test_a_listed_name_that_disagrees_with_the_rule_has_no_tokens(tmp_path, monkeypatch, caplog) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(DOUBLED.replace("2048 * 2048", "2097152") + "listing: true\n")
    monkeypatch.setattr(registry_entries, "list_names", lambda *given: ["step1000-tokens2B", "step2000-tokens40B"])
    found = open_series(str(file)).checkpoints
    assert [(one.step, one.tokens) for one in found] == [(1000, 2_097_152_000), (2000, None)]
    assert "step2000-tokens40B has 4.1943B by the rule; their tokens are left unknown" in caplog.text
