"""Names that the hub lists for released series, in order of training: recorded where a list is published, else made by
the rule that their authors give, with what lies beside them in the same repository."""

from collections.abc import Callable, Iterable, Sequence


def billions(tokens: float) -> str:
    return f"{round(tokens / 1e9)}B"


def olmo(steps: Iterable[int], batch: int, before: str = "") -> list[str]:
    return [f"{before}step{step}-tokens{billions(step * batch)}" for step in steps]


OLMO_1B_TXT = """step20000-tokens84B step30000-tokens126B step40000-tokens168B step50000-tokens210B step52000-tokens218B
step53000-tokens222B step54000-tokens226B step55000-tokens231B step56000-tokens235B step57000-tokens239B
step58000-tokens243B step59000-tokens247B step60000-tokens252B step63000-tokens264B step64000-tokens268B
step65000-tokens273B step66000-tokens277B step67000-tokens281B step68000-tokens285B step69000-tokens289B
step70000-tokens294B step71000-tokens298B step80000-tokens336B step90000-tokens377B step95000-tokens398B
step96000-tokens403B step97000-tokens407B step98000-tokens411B step99000-tokens415B step100000-tokens419B
step101000-tokens424B step102000-tokens428B step103000-tokens432B step104000-tokens436B step105000-tokens440B
step106000-tokens445B step110000-tokens461B step111000-tokens466B step112000-tokens470B step113000-tokens474B
step114000-tokens478B step115000-tokens482B step116000-tokens487B step117000-tokens491B step117850-tokens494B
step330000-tokens1384B step331000-tokens1388B step332000-tokens1393B step333000-tokens1397B step334000-tokens1401B
step335000-tokens1405B step336000-tokens1409B step337000-tokens1413B step337700-tokens1416B step340000-tokens1426B
step342000-tokens1434B step343000-tokens1439B"""
"""allenai/OLMo-1B revisions.txt, its first lines."""
TWIN_TXT = """step0-tokens0B step1000-tokens4B step2000-tokens8B step3000-tokens13B step5000-tokens21B
step6000-tokens25B step7000-tokens29B step8000-tokens34B step9000-tokens38B step10000-tokens42B
step11000-tokens46B step12000-tokens50B step13000-tokens55B step14000-tokens59B step15000-tokens63B
step16000-tokens67B step17000-tokens71B step18000-tokens75B
step19000-tokens80B step20000-tokens84B step21000-tokens88B step22000-tokens92B step23000-tokens96B step24000-tokens101B
step25000-tokens105B step26000-tokens109B step27000-tokens113B step28000-tokens117B step29000-tokens122B
step30000-tokens126B step31000-tokens130B step32000-tokens134B step33000-tokens138B step33600-tokens141B
step34000-tokens143B step35000-tokens147B step36000-tokens151B step37000-tokens155B"""
"""allenai/OLMo-7B-Twin-2T revisions.txt, its first lines."""
APERTUS = [*range(50_000, 2_600_001, 50_000)]
"""Every 50,000 steps; the names count 4.2M tokens per step and 8.4M from step 1,678,000 on."""

LISTINGS: dict[str, tuple[Callable[[], Sequence[str]], str, int | None]] = {
    # series: (its names, others beside them, tokens of the last one as published, to the digits of its name)
    "amber": (lambda: [*(f"ckpt_{i:03d}" for i in range(359)), "main"], "", 1_258_448_486_400),
    "pythia-70m": (lambda: [f"step{i}" for i in (0, *(2**i for i in range(10)), *range(1000, 143_001, 1000))], "main",
                   299_892_736_000),
    "olmo-1b": (lambda: OLMO_1B_TXT.split(), "main", 1439 * 10**9),
    "olmo-7b-twin-2t": (lambda: TWIN_TXT.split(), "main", 155 * 10**9),
    "olmo-1b-0724": (lambda: olmo(range(0, 1_454_001, 1000), 2_097_152), "main", 1_454_000 * 2_097_152),
    "olmo-2-7b": (lambda: ["step150-tokens1B", *olmo(range(1000, 928_001, 1000), 4_194_304, "stage1-"),
                           "stage1-step928646-tokens3896B"],
                  "main stage2-ingredient1-step1000-tokens5B stage2-ingredient3-step11931-tokens50B", 3896 * 10**9),
    "olmo-2-32b-stage2-ingredient1": (
        lambda: [f"stage2-ingredient1-step{i}-tokens{-(-i * 8_388_608 // 10**9)}B" for i in
                 (*range(1000, 11_001, 1000), 11_500, 11_921)],
        "main stage1-step721901-tokens6056B stage2-ingredient2-step11921-tokens101B", 6_155_745_099_776),
    "olmo-3-7b": (lambda: [*(f"stage1-step{i}" for i in (*range(0, 1_413_001, 1000), 1_413_814)),
                           *(f"stage2-step{i}" for i in (*range(1000, 47_001, 1000), 47_684)),
                           *(f"stage3-step{i}" for i in (*range(1000, 11_001, 1000), 11_921))],
                  "main stage2-step47684-mix-round5-from-2T-ckpt", 6_079_966_609_408),
    "olmo-hybrid-7b": (lambda: [*(f"stage1-step{i}" for i in range(0, 1_414_001, 1000)),
                                "stage2-ingredient1+2-step23842",
                                *(f"stage3-step{i}" for i in (*range(1000, 23_001, 1000), 23_500, 23_842))],
                       "main stage2-ingredient1-step23842", 6_231_074_799_616),
    "smollm3-3b": (lambda: [*(f"stage1-step-{i}" for i in range(40_000, 3_440_001, 40_000)),
                            *(f"stage2-step-{i}" for i in range(3_480_000, 4_200_001, 40_000)),
                            *(f"stage3-step-{i}" for i in range(4_240_000, 4_720_001, 40_000))],
                   "main it-SFT it-soup-APO it-mid-training it-LC-expert lc-4k-to-32k-step-20000", 11_135_877_120_000),
    "comma-v0.1-1t": (lambda: [*(f"stage1-step{i:06d}-tokens{billions(i * 2_097_152)}" for i in
                                 range(10_000, 460_001, 10_000)),
                               *(f"stage2-step{i:06d}-tokens{billions((460_000 + i) * 2_097_152)}" for i in
                                 range(2000, 18_001, 2000))], "main", 1002 * 10**9),
    "lucie-7b": (lambda: [*(f"step{i:07d}" for i in (5000, 10_000, 15_000, 20_000, *range(25_000, 750_001, 25_000),
                                                     753_851)),
                          *(f"extension_step{i:07d}" for i in (250, 500, 750, 1000, 1220))], "main", 3_126_741_344_256),
    "apertus-8b": (lambda: [*(f"step{i}-tokens{round(i * 4.2e-3 + max(i - 1_678_000, 0) * 4.2e-3)}B" for i in APERTUS),
                            "step2627139-tokens15T"], "main longctx-step1000", 15 * 10**12),
    "crfm-gpt2-small-x21": (lambda: [f"checkpoint-{i}" for i in
                                     (*range(10, 101, 10), *range(150, 2001, 50), *range(2100, 20_001, 100),
                                      *range(21_000, 400_001, 1000))], "main", 209_715_200_000),
    "gemstone-256x23": (lambda: [f"step_{i * 477:08d}" for i in range(1, 176)], "main", 350_119_526_400),
    "open-sci-ref-0.13b-fineweb-edu-1.4t": (lambda: [f"iter_{i:07d}" for i in range(2000, 72_001, 2000)], "main",
                                            297_271_296_000),
    "datamix-2b-90-10": (lambda: [*(f"checkpoint_{i:07d}" for i in range(5000, 950_001, 5000)), "main"], "",
                         4_000_002_867_200),
    "marin-8b": (lambda: ["kestrel", "ocelot", "jellyfish", "phoenix", "starling", "deeper-starling"], "main",
                 12_700 * 10**9),
}  # fmt: skip
