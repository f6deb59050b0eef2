"""Every registered series against published numbers, worked out by hand; names, choices and what is printed. No JAX."""

import itertools
import json
from pathlib import Path

import pytest

from fineline_jax import catalogue
from fineline_jax.catalogue import config_folders, config_names, find_config, load_recipe
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.describe import details, overview
from fineline_jax.checkpoints.open import series_of_entry, split_spec
from fineline_jax.checkpoints.registry import entries as registry_entries
from fineline_jax.checkpoints.registry.entries import Named, entries, find, in_order, series_files
from fineline_jax.checkpoints.registry.rules import bind, evaluate, expand
from fineline_jax.checkpoints.registry.step_names import natural, parse_name
from fineline_jax.checkpoints.remote.download import FetchError
from fineline_jax.checkpoints.select import TokenGrid, nearest, parse_amount, parse_grid, select
from fineline_jax.checkpoints.series import Checkpoint, Scoring, Series, scoring_policy
from fineline_jax.errors import UserError
from fineline_jax.recipe import to_json

B = 10**9

PUBLISHED = [
    # 762 steps of 2240 x 2048 tokens per chunk
    ("amber", "ckpt_000", 762, 3_495_690_240),
    ("amber", "ckpt_179", 137_160, 629_224_243_200),
    ("amber", "ckpt_358", 273_558, 1_254_952_796_160),
    ("amber", "main", 274_320, 1_258_448_486_400),
    # the nearest multiple of 1000 steps of 4,194,304 tokens
    ("amber-reproduce", "8.39B", 2000, 8_388_608_000),
    ("amber-reproduce", "599.79B", 143_000, 599_785_472_000),
    ("amber-reproduce", "1300.23B", 310_000, 1_300_234_240_000),
    ("openllama-reproduce", "100.66B", 24_000, 100_663_296_000),
    ("openllama-reproduce", "218.1B", 52_000, 218_103_808_000),
    ("openllama-reproduce", "1933.57B", 461_000, 1_933_574_144_000),
    ("open_llama_7b", "step_2500", 2500, 10_485_760_000),
    ("open_llama_7b", "step_100000", 100_000, 419_430_400_000),
    ("open_llama_7b", "step_250000", 250_000, 1_048_576_000_000),
    ("open_llama_13b", "step_5000", 5000, 10_485_760_000),
    ("open_llama_13b", "step_500000", 500_000, 1_048_576_000_000),
    ("open_llama_3b", "step_250000", 250_000, None),
    ("open_llama_3b_v2", "step_20000", 20_000, 41_943_040_000),
    ("open_llama_3b_v2", "step_300000", 300_000, 629_145_600_000),
    ("open_llama_7b_first_run", "200bt", None, 200 * B),
    ("open_llama_7b_first_run", "300bt", None, 300 * B),
    ("open_llama_7b_previews", "400bt_preview", None, 400 * B),
    ("open_llama_3b_previews", "600bt_preview", None, 600 * B),
    ("open_llama_13b_previews", "600bt", None, 600 * B),
    ("baichuan2-7b", "train_00220B", None, 220 * B),
    ("baichuan2-7b", "train_01320B", None, 1320 * B),
    ("baichuan2-7b", "train_02420B", None, 2420 * B),
    ("pythia-70m", "step0", 0, 0),
    ("pythia-70m", "step512", 512, 1_073_741_824),
    ("pythia-12b-deduped", "step143000", 143_000, 299_892_736_000),
    ("pythia-160m-seed9", "step1000", 1000, 2_097_152_000),
    ("tinyllama", "step-50K-105b", 50_000, 104_857_600_000),
    ("tinyllama", "intermediate-step-715k-1.5T", 715_000, 1_499_463_680_000),
    ("tinyllama", "intermediate-step-1195k-token-2.5T", 1_195_000, 2_506_096_640_000),
    ("tinyllama", "intermediate-step-1431k-3T", 1_431_000, 3_001_024_512_000),
    ("olmo-7b", "step1000-tokens4B", 1000, 4_423_680_000),
    ("olmo-7b", "step452000-tokens2000B", 452_000, 1_999_503_360_000),
    ("olmo-7b", "step556000-tokens2460B", 556_000, 2_459_566_080_000),
    ("olmo-1b", "step20000-tokens84B", 20_000, 83_886_080_000),
    ("olmo-7b-0724", "step1000-tokens4B", 1000, 4_194_304_000),
    ("olmo-1b-0724", "step1000-tokens2B", 1000, 2_097_152_000),
    ("olmo-1b-0724", "step644000-tokens1350B", 644_000, 1_350_565_888_000),
    ("olmo-2-7b", "step150-tokens1B", 150, 629_145_600),
    ("olmo-2-7b", "stage1-step928646-tokens3896B", 928_646, 3_895_023_632_384),
    ("olmo-2-13b", "stage1-step596057-tokens5001B", 596_057, 5_000_088_518_656),
    ("olmo-2-1b", "stage1-step1907359-tokens4001B", 1_907_359, 4_000_021_741_568),
    ("olmo-2-32b", "stage1-step721901-tokens6056B", 721_901, 6_055_744_503_808),
    # stage 2 goes on from the last tokens of stage 1
    ("olmo-2-7b-stage2-ingredient3", "stage2-ingredient3-step11931-tokens50B", 11_931, 3_945_065_873_408),
    ("olmo-2-13b-stage2-ingredient1", "stage2-ingredient1-step11931-tokens100B", 11_931, 5_100_173_000_704),
    ("olmo-2-13b-stage2-ingredient4", "stage2-ingredient4-step35773-tokens300B", 35_773, 5_300_174_192_640),
    ("olmo-2-1b-stage2-ingredient2", "stage2-ingredient2-step23852-tokens51B", 23_852, 4_050_043_011_072),
    ("olmoe-1b-7b", "step10000-tokens41B", 10_000, 41_943_040_000),
    ("ct-llm", "799.90B", None, 799_900_000_000),
    ("deepseek-7b", "step_1000", 1000, 9_437_184_000),
    ("deepseek-67b", "base-iter_1000", 1000, 18_874_368_000),
    ("deepseek-67b", "ckpt-1200B-x", None, 1200 * B),
    ("deepseek-67b", "1000", 1000, 18_874_368_000),
    ("yi-34b", "main", None, 3_100_000_000_000),
    # sequences of 2048 per step: 32 x round(5 x (parameters / 108M)^(2/3))
    ("datadecide-c4-4M-default", "step1000-seed-default", 1000, 65_536_000),
    ("datadecide-c4-16M-small-aux-2", "step1000-seed-small-aux-2", 1000, 65_536_000),
    ("datadecide-c4-20M-default", "step1000-seed-default", 1000, 131_072_000),
    ("datadecide-c4-60M-default", "step1000-seed-default", 1000, 196_608_000),
    ("datadecide-c4-90M-default", "step1000-seed-default", 1000, 327_680_000),
    ("datadecide-c4-150M-default", "step1000-seed-default", 1000, 393_216_000),
    ("datadecide-c4-300M-default", "step1000-seed-default", 1000, 655_360_000),
    ("datadecide-c4-530M-default", "step1000-seed-default", 1000, 917_504_000),
    ("datadecide-c4-750M-small-aux-3", "step1000-seed-small-aux-3", 1000, 1_179_648_000),
    ("datadecide-falcon-1B-large-aux-3", "step1000-seed-large-aux-3", 1000, 1_441_792_000),
    ("datamix-2b-80-20", "checkpoint_0005000", 5000, 20_971_520_000),
    ("datamix-2b-80-20", "main", 953_675, 4_000_002_867_200),
    ("deep-ignorance-unfiltered", "global_step38144", 38_144, None),
    ("olmo-7b-twin-2t", "step33600-tokens141B", 33_600, 140_928_614_400),
    ("olmo-1b-hf", "step738020-tokens3094B", 738_020, 3_095_480_238_080),
    # the tokens of OLMo-core's CSV of 1000 steps, and of all of stage 3
    ("olmo-3-7b", "stage1-step1000", 1000, 4_194_304_000),
    ("olmo-3-7b", "stage1-step1413814", 1_413_814, 5_929_965_715_456),
    ("olmo-3-7b", "stage2-step47684", 1_461_498, 6_029_966_311_424),
    ("olmo-3-7b", "stage3-step11921", 1_473_419, 6_079_966_609_408),
    ("olmo-3-32b", "stage1-step1000", 1000, 8_388_608_000),
    ("olmo-3-7b-think-sft", "step1000", 1_474_419, None),
    ("olmo-hybrid-7b", "stage1-step145000", 145_000, 608_174_080_000),
    ("olmo-hybrid-7b", "stage2-ingredient1+2-step23842", 1_461_762, 6_131_074_203_648),
    ("olmo-hybrid-7b", "stage3-step1000", 1_462_762, 6_135_268_507_648),
    ("olmo-hybrid-7b", "stage3-step23842", 1_485_604, 6_231_074_799_616),
    ("olmo-2-32b-stage2-ingredient3", "stage2-ingredient3-step35763-tokens301B", 35_763, 6_355_746_291_712),
    ("pythia-160m-weight-seed2", "step143000", 143_000, 299_892_736_000),
    ("smollm2-1.7B", "step-125000", 125_000, 250 * B),
    ("smollm3-3b", "stage1-step-40000", 40_000, 94_371_840_000),
    ("smollm3-3b", "stage3-step-4720000", 4_720_000, 11_135_877_120_000),
    ("smollm3-3b-post", "it-SFT", None, None),
    ("comma-v0.1-1t", "stage1-step460000-tokens965B", 460_000, 964_689_920_000),
    ("comma-v0.1-1t", "stage2-step018000-tokens1002B", 478_000, 1_002_438_656_000),
    # 762,144,586 sequences of 4096, of which the last step has 1024; then 128 of 32,000
    ("lucie-7b", "step0753851", 753_851, 3_121_744_224_256),
    ("lucie-7b", "step0750000", 750_000, 3_105_591_959_552),
    ("lucie-7b", "extension_step0001220", 755_071, 3_126_741_344_256),
    ("k2-65b", "ckpt_007", None, None),
    ("hubble-8b-100b-perturbed", "step48000", 48_000, 100_663_296_000),
    ("marin-8b", "jellyfish", None, 4_780 * B),
    ("marin-8b-sft", "deeper-starling-05-15", None, 12_705_300_000_000),
    ("gemstone-768x45", "step_00000477", 477, 2_000_683_008),
    ("bloom-560m", "global_step1000", 1000, None),
    ("crfm-gpt2-small-x81", "checkpoint-400000", 400_000, 209_715_200_000),
    ("ling-mini", "15T", None, 15_000 * B),
    ("open-sci-ref-0.13b-fineweb-edu-1.4t", "iter_0002000", 2000, 8_257_536_000),
    # 4.2M tokens per step to step 1,678,000, 8.4M behind it, in the names; 15T at the end
    ("apertus-8b", "step50000-tokens210B", 50_000, 209_715_200_000),
    ("apertus-8b", "step1750000-tokens7652B", 1_750_000, 7_642_021_888_000),
    ("apertus-8b", "step2627139-tokens15T", 2_627_139, 14_999_997_120_512),
    ("apertus-70b", "step1155828-tokens15T", 1_155_828, 523_519 * 8_388_608 + 632_309 * 16_777_216),
    ("map-neo-7b", "iter_0444213", 444_213, 3_726_328_725_504),
]


@pytest.fixture(scope="module")
def every() -> dict[str, registry_entries.Entry]:
    return {one.name: one for one in registry_entries.every_entry()}


@pytest.mark.parametrize(("name", "checkpoint", "step", "tokens"), PUBLISHED, ids=lambda value: str(value))
def test_steps_and_tokens_of_a_checkpoint_are_the_published_ones(
    every: dict[str, registry_entries.Entry], name: str, checkpoint: str, step: int | None, tokens: int | None
) -> None:
    found = registry_entries.named(every[name], checkpoint)
    assert (found.step, found.tokens) == (step, tokens)
    assert registry_entries.matching(every[name], [checkpoint])


def test_no_file_is_without_a_published_number(every: dict[str, registry_entries.Entry]) -> None:
    assert {every[name].file.stem for name, *_ in PUBLISHED} == set(series_files())


OPEN_LLAMA = "hf://openlm-research/open_llama_"
WHERE = {
    # file: (series, location of the first, tokenizer of the first, BOS)
    "amber": (1, "hf://IFM/Amber@{name}", "", "auto"),
    "amber_reproduce": (1, "hf://m-a-p/Amber-Reproduce-{name}", "hf://IFM/Amber@main", "auto"),
    "apertus": (2, "hf://swiss-ai/Apertus-8B-2509@{name}", "", "auto"),
    "baichuan2_7b": (1, "hf://baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints@{name}",
                     "hf://baichuan-inc/Baichuan2-7B-Base/tokenizer.model", "never"),
    "bloom": (5, "hf://bigscience/bloom-1b1-intermediate@{name}", "", "auto"),
    "comma": (1, "hf://common-pile/comma-v0.1-1t@{name}", "", "auto"),
    "crfm_gpt2": (10, "hf://stanford-crfm/alias-gpt2-small-x21@{name}", "", "auto"),
    "ct_llm": (1, "hf://m-a-p/CT-LLM-intermediate-ckpts/{name}", "", "auto"),
    "datadecide": (1050, "hf://allenai/DataDecide-dolma1_7-4M@{name}", "", "auto"),
    "datamix_2b": (3, "hf://openeurollm/datamix-2b-90-10@{name}", "", "auto"),
    "deep_ignorance": (4, "hf://EleutherAI/deep-ignorance-pretraining-stage-unfiltered@{name}", "", "auto"),
    "deepseek": (2, "s3://deepseek-ai/DeepSeek-LLM/DeepSeek-LLM-7B-Base/{name}", "hf://deepseek-ai/deepseek-llm-7b-base",
                 "auto"),
    "gemstones": (22, "hf://tomg-group-umd/Gemstone-256x23@{name}", "", "auto"),
    "hubble": (8, "hf://allegrolab/hubble-1b-100b_toks-standard-hf@{name}", "", "auto"),
    "ling_mini": (1, "hf://inclusionAI/Ling-mini-base-2.0-{name}", "", "auto"),
    "llm360_k2": (1, "hf://IFM/K2@{name}", "", "auto"),
    "lucie": (1, "hf://OpenLLM-France/Lucie-7B@{name}", "", "auto"),
    "map_neo": (1, "hf://m-a-p/neo_7b_intermediate/{name}", "", "auto"),
    "marin_8b": (1, "hf://marin-community/marin-8b-base@{name}", "", "auto"),
    "marin_8b_sft": (1, "hf://marin-community/marin-8b-instruct@{name}", "", "auto"),
    "olmo_1": (7, "hf://allenai/OLMo-7B@{name}", "", "auto"),
    "olmo_2": (5, "hf://allenai/OLMo-2-1124-7B@{name}", "", "auto"),
    "olmo_2_stage2": (13, "hf://allenai/OLMo-2-1124-7B@{name}", "", "auto"),
    "olmo_3": (1, "hf://allenai/Olmo-3-1025-7B@{name}", "", "auto"),
    "olmo_3_32b": (1, "hf://allenai/Olmo-3-1125-32B@{name}", "", "auto"),
    "olmo_3_think_sft": (1, "hf://allenai/Olmo-3-7B-Think-SFT@{name}", "", "auto"),
    "olmo_hybrid": (1, "hf://allenai/Olmo-Hybrid-7B@{name}", "", "auto"),
    "olmoe": (1, "hf://allenai/OLMoE-1B-7B-0924@{name}", "", "auto"),
    "open_llama": (2, OPEN_LLAMA + "7b_{name}", OPEN_LLAMA + "7b/tokenizer.model", "always"),
    "open_llama_3b": (1, OPEN_LLAMA + "3b_{name}", OPEN_LLAMA + "3b/tokenizer.model", "always"),
    "open_llama_3b_v2": (1, OPEN_LLAMA + "3b_v2_{name}", OPEN_LLAMA + "3b_v2/tokenizer.model", "always"),
    "open_llama_7b_first_run": (1, OPEN_LLAMA + "7b_preview_{name}", "", "always"),
    "open_llama_previews": (3, OPEN_LLAMA + "7b_{name}", OPEN_LLAMA + "7b/tokenizer.model", "always"),
    "open_sci_ref": (1, "hf://open-sci/open-sci-ref-v0.01-0.13b-fineweb-edu-1.4t-300B-4096@{name}", "", "auto"),
    "openllama_reproduce": (1, "hf://m-a-p/OpenLLaMA-Reproduce-{name}", "", "auto"),
    "polypythias": (6, "hf://EleutherAI/pythia-160m-data-seed1@{name}", "", "auto"),
    "pythia": (18, "hf://EleutherAI/pythia-14m@{name}", "", "auto"),
    "pythia_seeds": (45, "hf://EleutherAI/pythia-14m-seed1@{name}", "", "auto"),
    "smollm2": (2, "hf://HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints@{name}", "", "auto"),
    "smollm3": (1, "hf://HuggingFaceTB/SmolLM3-3B-checkpoints@{name}", "", "auto"),
    "smollm3_post": (1, "hf://HuggingFaceTB/SmolLM3-3B-checkpoints@{name}", "", "auto"),
    "tinyllama": (1, "hf://TinyLlama/TinyLlama-1.1B-{name}", "", "auto"),
    "yi_34b": (1, "hf://01-ai/Yi-34B@{name}", "", "auto"),
}  # fmt: skip


def test_where_a_series_lies_and_how_it_is_to_be_scored(every: dict[str, registry_entries.Entry]) -> None:
    files = {stem: entries(file) for stem, file in series_files().items()}
    found = {stem: (len(all), all[0].location, all[0].tokenizer, all[0].scoring.bos) for stem, all in files.items()}
    assert found == WHERE
    assert {one.options for all in files.values() for one in all} == {(), (("requester_pays", True),)}
    opened = series_of_entry(every["open_llama_13b"], Path("/d"), keep=False, ask=False)
    remote = opened.checkpoints[0].remote
    assert remote is not None and not remote.keep and remote.downloads == Path("/d")
    assert remote.tokenizer == OPEN_LLAMA + "13b/tokenizer.model" and remote.url == OPEN_LLAMA + "13b_step_5000"
    assert opened.scoring.bos == "always" and opened.location == OPEN_LLAMA + "13b_{name}"


# Names


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step-50K", 50_000, None), ("iter_7", 7, None), ("global_step100", 100, None), ("STEP12", 12, None),
        ("step1.5", None, None), ("step10k", 10_000, None), ("step", None, None), ("steps5", None, None),
        ("tokens4B", None, 4 * B), ("token_1.5T", None, 1_500 * B), ("tokens-20bt", None, 20 * B),
        ("tokens5m", None, None),
        ("step5-tokens1B-x", 5, B), ("step9-2.5t", 9, None), ("step9-2.5tt", 9, 2_500 * B),
        ("step9_token_3T", 9, 3_000 * B),
        ("train_7b2", None, None),
        ("train_0.5b", None, B // 2), ("llama-7b", None, None), ("300bt", None, 300 * B), ("step3-7bx", 3, None),
        ("step1-step2", 1, None), ("tokens1B-step3", 3, B),
        ("checkpoint-500", 500, None), ("checkpoint500", None, None), ("1500", 1500, None), ("x1500", None, None),
        ("step1000-7b", 1000, None), ("step-50K-105b", 50_000, None), ("tiny-20b", None, None),
    ],
)  # fmt: skip
def test_steps_and_tokens_in_a_name(name: str, step: int | None, tokens: int | None) -> None:
    assert parse_name(name) == (step, tokens)


def test_numbers_in_names_are_sorted_as_numbers() -> None:
    names = ["c10", "c9", "c009x", "c9.5", "c", "c100"]
    assert sorted(names, key=natural) == ["c", "c9", "c9.5", "c009x", "c10", "c100"]


def test_checkpoints_are_in_the_order_of_tokens_then_steps_then_names() -> None:
    one = lambda name, step, tokens: Named(name, step, tokens, "")
    ordered = [one("z", 9, 0), one("y", 2, 5), one("x", 3, 5), one("w", None, 5), one("v", 0, None), one("u", 7, None),
               one("t9", None, None), one("t10", None, None)]  # fmt: skip
    assert in_order(ordered[::-1]) == ordered == in_order(sorted(ordered, key=lambda one: one.name))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("s{1..3}", ["s1", "s2", "s3"]), ("{0..5..5}", ["0", "5"]), ("{0..5..4}", ["0", "4"]), ("{7..7}", ["7"]),
        ("{08..11}", ["08", "09", "10", "11"]), ("{8..11}", ["8", "9", "10", "11"]),
        ("{00..100..50}", ["00", "50", "100"]),
        ("{a, b}{1,2}", ["a1", "a2", "b1", "b2"]), ("x", ["x"]),
    ],
)  # fmt: skip
def test_braces_mean_these_names(text: str, names: list[str]) -> None:
    assert expand(text) == names


def test_at_most_a_hundred_thousand_names_are_meant() -> None:
    assert len(expand("{1..100000}")) == 100_000 == len(expand("{1..1000}{1..100}"))
    for text in ("{0..100000}", "{1..1000}{1..101}", "{3..1}", "{1..3..0}", "{}", "{a}"):
        with pytest.raises(UserError):
            expand(text)


def test_a_pattern_fits_whole_names_and_stars_take_as_little_as_they_can() -> None:
    assert (
        bind("step{s}", "step12") == {"s": 12}
        and bind("step{s}", "step12x") is None
        and bind("step{s}", "xstep1") is None
    )
    assert bind("*{b}B*", "ckpt-12.5B-x") == {"b": 12.5} and bind("a.b{n}", "axb1") is None
    assert bind("{s}", "007") == {"s": 7} and bind("{s}", "1.") is None and bind("*", "anything") == {}


def test_rules_are_computed_from_left_to_right_with_the_usual_precedence() -> None:
    numbers = {"a": 7, "b": 2, "x": 2.5}
    for rule, value in (("a - b - 1", 4), ("a + b * 3", 13), ("a // b", 3), ("a / b", 3.5), ("(a + b) * 3", 27),
                        ("max(a - 9, 0) + min(a, b)", 2), ("max(a, b) * min(a - 4, x)", 17.5), ("round(x)", 2),
                        ("round(a / b) * 10", 40), ("2 * x", 5.0)):  # fmt: skip
        assert evaluate(rule, numbers) == value
    assert evaluate("a + c", numbers) is None


def test_the_first_rule_whose_numbers_are_known_is_used_and_a_value_stands_for_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "location: s3://b/{name}\nnames: a5 b6 last step7-tokens9B a8\npattern: ['a{x}', 'b{y}', 'a{y}']\n"
        "values: {last: {x: 100, step: 3}, a8: {y: 4}}\ntokens: [x * k, y]\nstep: x + 1\nvariants: {k: 10}\n"
    )
    [one] = entries(tmp_path / "m.yaml")
    assert one.name == "m" and one.title == "" and not one.listing
    both = one.model_copy(update={"numbers": {"k": 10, "x": 3}, "names": ("a5", "b6")})
    assert [(c.step, c.tokens) for c in registry_entries.checkpoints(both)] == [(6, 50), (4, 30)], (
        "the name's before the variant's"
    )
    whole = one.model_copy(update={"tokens": ("y * 1.001 * 1e9",), "step": ("0.29 * 100 * y",), "names": ("b1",)})
    assert [(c.step, c.tokens) for c in registry_entries.checkpoints(whole)] == [(29, 1_001_000_000)]  # not 28.999…
    found = [(c.name, c.step, c.tokens) for c in registry_entries.checkpoints(one)]
    assert found == [("a5", 6, 50), ("b6", None, 6), ("last", 101, 1000), ("step7-tokens9B", 7, 9 * B), ("a8", None, 4)]


# Choosing


def test_a_range_of_tokens_holds_both_its_ends() -> None:
    made = Series("s", tuple(Checkpoint("s", f"c{i}", i, i * B, Path(), "hf") for i in range(11)))
    chosen = lambda **how: [one.step for one in select(made, **how).checkpoints]
    assert (
        chosen(tokens="2B:5B") == [2, 3, 4, 5] and chosen(tokens=":2B") == [0, 1, 2] and chosen(tokens="9B:") == [9, 10]
    )
    assert (
        chosen(tokens="2B:8B:3B") == [2, 5, 8]
        and chosen(tokens="2B:7B:3B") == [2, 5]
        and chosen(tokens="::5B") == [0, 5, 10]
    )
    assert chosen(every=4) == [0, 4, 8] and chosen(tokens="1B:", every=4) == [1, 5, 9]
    assert (
        chosen(names="c[1-3]") == [1, 2, 3] and chosen(names="c1*") == [1, 10] and chosen(names="c?") == list(range(10))
    )
    assert chosen(tokens="3.4B") == [3] and chosen(tokens="0") == [0] and chosen(tokens="3.5B") == [3]
    assert chosen(names="c[5-9]", tokens="0:10B:5B") == [5, 9] and chosen(names="c[5-9]", tokens="8B:") == [8, 9]
    assert chosen(tokens="4B:4B") == [4] == chosen(tokens="4B:4B:1B"), "a stop at the start"
    with pytest.raises(UserError):
        chosen(names="C1")


def test_a_point_of_a_grid_takes_what_lies_within_half_a_spacing() -> None:
    grid = TokenGrid(10, 30, 10)
    assert nearest([5, 15, 35], grid) == [0, 1, 2] and nearest([4, 36], grid) == []
    assert nearest([9, 11], grid) == [0], "of two equally near the earlier"
    assert parse_grid("18B") == TokenGrid(18 * B, 18 * B, 36 * B) and nearest([0, 36], TokenGrid(18, 18, 36)) == [0]
    assert nearest([37], TokenGrid(18, 18, 36)) == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1k", 1000), ("2.5M", 2_500_000), ("3b", 3 * B), ("1.5T", 1_500 * B), ("1e3", 1000), ("2e+2k", 200_000),
     ("1_000", 1000),
     ("0", 0), (" 7 B ", 7 * B), ("0.1234567891B", 123_456_789)],
)  # fmt: skip
def test_amounts_have_these_units(text: str, tokens: int) -> None:
    assert parse_amount(text, "") == tokens


# Opening


def test_what_stands_behind_the_last_at_is_a_glob_unless_it_belongs_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert split_spec(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", "*")
    assert split_spec(f"{tmp_path}/a@b@step*") == (f"{tmp_path}/a@b", "step*")
    assert (
        split_spec("amber") == ("amber", "*")
        and split_spec("amber@") == ("amber", "*")
        and split_spec("@x") == ("@x", "*")
    )


def test_series_that_want_bos_differently_are_not_scored_together() -> None:
    made = [Series("a", ()), Series("b", (), Scoring("always")), Series("c", ())]
    assert scoring_policy(made[::2]) == "auto" and scoring_policy(made[1:2]) == "always"
    with pytest.raises(UserError, match=r"\(c auto, b always\)"):
        scoring_policy(made)


def test_the_first_ten_checkpoints_are_asked_for_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Series("s", tuple(Checkpoint("s", f"c{i}", i, i, Path(str(i)), "hf") for i in range(12)))
    asked: list[int | None] = []

    def folder(checkpoint: Checkpoint, able: int) -> Path:
        asked.append(checkpoint.step)
        if checkpoint.step != able:
            raise FetchError(f"no {checkpoint.step}")
        return checkpoint.location

    for able, found in ((0, 1), (9, 10)):
        monkeypatch.setattr(load, "tokenizer_folder", lambda checkpoint, able=able: folder(checkpoint, able))
        assert load.first_tokenizer(made) == Path(str(able)) and len(asked) == found
        asked.clear()
    monkeypatch.setattr(load, "tokenizer_folder", lambda checkpoint: folder(checkpoint, 10))
    with pytest.raises(FetchError, match="no 0"):
        load.first_tokenizer(made)


# What is printed


def test_the_overview_says_how_many_checkpoints_of_which_tokens() -> None:
    rows = [line.split() for line in overview().splitlines()]
    found = {row[0]: row[1:] for row in rows if row}
    assert found["amber"][:4] == ["360", "3.5B", "to", "1.26T"]
    assert found["open_llama"][:4] == ["(2", "series)", "9+", "10.5B"] and found["deepseek"][:3] == [
        "(2",
        "series)",
        "+",
    ]
    assert found["yi-34b"][:2] == ["1", "3.1T"] and found["olmoe-1b-7b"][:2] == ["1+", "41.9B"]
    assert found["open_llama_3b"][:2] == ["9+", "OpenLLaMA"]


def test_the_details_say_rules_numbers_policy_and_every_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "name: m-{size}\ntitle: T {size}\nlocation: s3://b/{size}/{name}\nnames: step1000 last\npattern: step{step}\n"
        "tokens: [step * batch, b]\ntokenizer: hf://o/t\nscoring: {bos: never, notes: [Note one.]}\nnotes: Note two.\n"
        "sources: [A paper]\nvariants: {size: 1b, batch: 4000, other: 5}\n"
        "values: {x: {b: 5}}\n"
    )
    assert details(str(tmp_path / "m.yaml"))[0].splitlines() == [
        "T 1b", "", "scored with --bos never unless you say otherwise", "tokenizer: hf://o/t",
        "tokens: step * batch, else b (batch = 4000)", "Note one.", "Note two.", "source: A paper", "",
        "name       step     tokens  location",
        "step1000  1,000  4,000,000  s3://b/1b/step1000",
        "last                        s3://b/1b/last",
    ]  # fmt: skip
    assert [line.split()[0] for line in details(f"{tmp_path / 'm.yaml'}@step*")[0].splitlines()[-1:]] == ["step1000"]


# Names in configs/


def test_shipped_names_come_before_those_of_the_working_folder(tmp_path: Path, monkeypatch, caplog) -> None:
    installed = find_config("amber", "series/{}.yaml", "series")
    monkeypatch.chdir(tmp_path)
    [only] = config_folders()
    assert only.name == "configs" and (only / "series" / "amber.yaml").is_file() and only.parent != tmp_path
    (tmp_path / "configs" / "series").mkdir(parents=True)
    for name in ("amber", "mine"):
        (tmp_path / "configs" / "series" / f"{name}.yaml").write_text("x")
    assert config_folders() == [only, tmp_path / "configs"]
    assert find_config("amber", "series/{}.yaml", "series") == installed
    assert "configs/series/amber.yaml is not read: amber is the shipped series; give the path" in caplog.text
    assert find_config("mine", "series/{}.yaml", "series") == tmp_path / "configs/series/mine.yaml"
    assert {"amber", "mine", "pythia"} <= set(config_names("series/{}.yaml"))
    assert config_names("{}.py") == sorted(set(config_names("{}.py"))) and "__init__" not in config_names("{}.py")
    files = registry_entries.series_files()
    assert files["amber"] == installed and list(files)[-1] == "mine"
    with pytest.raises(
        UserError, match=r"no series named 'mime'; did you mean 'mine'\? known: .*amber.*, or give the path"
    ):
        find_config("mime", "series/{}.yaml", "series")


def test_a_recipe_is_that_of_a_name_a_file_a_json_file_or_a_run(tmp_path: Path, monkeypatch) -> None:
    demo = load_recipe("demo")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(to_json(demo))
    (tmp_path / "mine.py").write_text(
        "from fineline_jax.catalogue import load_recipe\nrecipe = lambda: load_recipe('demo')\n"
    )
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # as in --config=~/mine.py, which no shell expands
    for name in ("run", str(tmp_path / "run"), "run/recipe.json", "mine.py", "demo", "~/run", "~/mine.py"):
        assert load_recipe(name) == demo, "a folder that is called like a recipe is not in its way"
    for text, said in (
        ("x = 1", "has no function recipe"),
        ("recipe = 3", "has no function recipe"),
        ("recipe = int", "returned int"),
        ("1 / 0", "ZeroDivisionError: division by zero; correct the file"),
        ("def", "SyntaxError"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(UserError, match=rf"mine\.py(:1)?: .*{said}"):
            load_recipe("mine.py")
    for name, said in (("none.py", r"none\.py: not there"), ("nowhere", "no recipe named 'nowhere'")):
        with pytest.raises(UserError, match=said):
            load_recipe(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/recipe\.json: not there"):
        load_recipe("empty")


def test_an_error_of_the_user_ends_the_command_with_status_2() -> None:
    assert UserError.exit_status == 2 and issubclass(UserError, Exception)
    assert json.dumps(str(UserError("one line"))) == '"one line"' and catalogue.UserError is UserError
    assert find("no such series") is None


@pytest.mark.parametrize("file", ["pythia_seeds", "datadecide"])
def test_the_names_of_many_series_stand_in_lines_of_at_most_110_characters(file: str) -> None:
    head, *lines = details(file)[0].splitlines()
    names = [one.name for one in entries(series_files()[file])]
    assert head == f"{len(names)} series:" and " ".join(lines).split() == names
    assert all(len(line) <= 110 for line in lines)
    for line, following in itertools.pairwise(lines):
        assert len(line) + 2 + len(following.split()[0]) > 110, "as many as fit"
