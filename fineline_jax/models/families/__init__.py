"""The families of released models: from a config.json to the decoder's config and the lines that name its weights.

    family, config = families.of_hf(HfConfig(path, raw))     reading
    family = families.of_config(config)                      writing, in a layout that transformers opens

`family.weights` are lines of a name map (`name_map`), which reads and writes by them.
"""

import re
from collections.abc import Mapping

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import deepseek, gpt, llama, mamba, mixtures, olmo, scaled
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig

FAMILIES = (
    llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, gpt.GPT_NEOX, olmo.OLMO, olmo.OLMO2, olmo.OLMO3,
    olmo.OLMO_HYBRID,
    mixtures.OLMOE, mixtures.FLEX_OLMO, mixtures.MIXTRAL, mixtures.QWEN2_MOE, mixtures.QWEN3_MOE, mixtures.GRANITE_MOE,
    deepseek.DEEPSEEK_V2, deepseek.DEEPSEEK_V3, deepseek.GLM4_MOE, deepseek.SOLAR_OPEN, deepseek.DOTS1,
    deepseek.EXAONE_MOE, deepseek.MINIMAX_M2, mamba.MAMBA, mamba.MAMBA2, mamba.FALCON_MAMBA, gpt.GPT2,
    gpt.OPT, gpt.BLOOM, gpt.MPT, gpt.FALCON, gpt.FALCON_NEW, gpt.FALCON_RW, gpt.GPT_J, gpt.CODEGEN, gpt.GPT_NEO,
    gpt.GPT_BIGCODE, gpt.BIOGPT, gpt.PHI, llama.PHI3, gpt.STARCODER2, llama.STABLELM, llama.MINISTRAL, llama.SMOLLM3,
    llama.SEED_OSS, llama.CWM, llama.ARCEE, llama.NEMOTRON, llama.JAIS2, llama.APERTUS, *scaled.SCALED,
    deepseek.BAILING_MOE_V2, llama.BAICHUAN2, llama.BAICHUAN, llama.YI, olmo.OLMO_FIRST,
)  # fmt: skip
"""In the order in which `of_config` tries them: those that transformers opens without foreign code first."""


def of_hf(raw: HfConfig) -> tuple[Family, ModelConfig]:
    """The family and the model of a config.json.

    Raises UserError naming the file and the key for an unknown architecture or anything the decoder does not compute.
    """
    if not isinstance(raw.raw, Mapping):
        raise UserError(f"{raw.where}: holds no mapping; fetch the file again")
    named = raw.raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{raw.where}: architectures={named!r} is not a list of names; fetch the file again")
    # As AutoModel saves it, too: without the head.
    names = {name for full in named for name in (full, re.sub("Model$", "ForCausalLM", full))}
    families = [family for family in FAMILIES if names.intersection(family.architectures)]
    for family in [*(family for family in families if family.means(raw)), *families]:
        try:
            return family, family.from_hf(raw)
        except UserError as error:  # of ModelConfig, which knows no file
            raise (error if str(error).startswith(raw.where) else UserError(f"{raw.where}: {error}")) from None
    unknown = ", ".join(named) or "none"
    raise UserError(f"{raw.where}: architectures: {unknown} is not known; docs/families.md lists those that are")


def of_config(config: ModelConfig, name: str | None = None) -> Family:
    """The family whose files describe `config`: the first that can, or the one called `name`.

    Raises UserError if there is none.
    """
    names = [family.name for family in FAMILIES]
    if name not in (None, *names):
        raise UserError(f"family {name!r} is not known; known: {', '.join(names)}")
    able = [family for family in FAMILIES if family.holds(config)]
    for family in able:
        if name in (None, family.name):
            return family
    if name is None:
        raise UserError("none of the released layouts can describe this model; keep the Orbax checkpoint")
    others = ", ".join(family.name for family in able) or "none"
    raise UserError(f"the layout of family {name!r} cannot describe this model; of those known {others} can")
