"""The families of released models: from a config.json to the decoder's config and the lines that name its weights.

    family, config = families.of_hf(HfConfig(path, raw))     reading
    family = families.of_config(config)                      writing, in a layout that transformers opens

`family.weights` are lines of a name map (`name_map`): every parameter of ours is a stack over layers (and experts) of
transposed, split or sliced tensors. For reading, `name_map.read_part` takes from a tensor exactly the range that a
shard needs; for writing, `name_map.all_tensors` says which lines fill which tensor and `name_map.write_part` does it.
"""

from collections.abc import Mapping

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.gpt import (
    BIOGPT,
    BLOOM,
    CODEGEN,
    FALCON,
    FALCON_NEW,
    GPT2,
    GPT_BIGCODE,
    GPT_J,
    GPT_NEO,
    GPT_NEOX,
    MPT,
    OPT,
    PHI,
    STARCODER2,
)
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.llama import (
    APERTUS,
    ARCEE,
    BAICHUAN,
    BAICHUAN2,
    CWM,
    JAIS2,
    LLAMA,
    MINISTRAL,
    MISTRAL,
    NEMOTRON,
    PHI3,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
    STABLELM,
    YI,
)
from fineline_jax.models.families.mamba import MAMBA
from fineline_jax.models.families.mixtures import FLEX_OLMO, GRANITE_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from fineline_jax.models.families.olmo import OLMO, OLMO2, OLMO3, OLMO_FIRST
from fineline_jax.models.families.scaled import SCALED

FAMILIES = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, OLMO, OLMO2, OLMO3, OLMOE, FLEX_OLMO, MIXTRAL, QWEN2_MOE, QWEN3_MOE,
    GRANITE_MOE, MAMBA, GPT2, OPT, BLOOM, MPT, FALCON, FALCON_NEW, GPT_J, CODEGEN, GPT_NEO, GPT_BIGCODE, BIOGPT, PHI,
    PHI3, STARCODER2, STABLELM, MINISTRAL, SMOLLM3, SEED_OSS, CWM, ARCEE, NEMOTRON, JAIS2, APERTUS, *SCALED,
    BAICHUAN2, BAICHUAN, YI, OLMO_FIRST,
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
    for family in FAMILIES:
        without_head = [name.replace("ForCausalLM", "Model") for name in family.architectures]  # as AutoModel saves it
        if any(name in (*family.architectures, *without_head) for name in named):
            chosen = [other for other in FAMILIES if other.architectures == family.architectures and other.means(raw)]
            return (chosen or [family])[0], _model((chosen or [family])[0], raw)
    known = ", ".join(family.architectures[0] for family in FAMILIES)
    raise UserError(f"{raw.where}: architectures: {', '.join(named) or 'none'} is not known; known: {known}")


def _model(family: Family, raw: HfConfig) -> ModelConfig:
    try:
        return family.from_hf(raw)
    except UserError as error:  # of ModelConfig, which knows no file
        raise (error if str(error).startswith(raw.where) else UserError(f"{raw.where}: {error}")) from None


def of_config(config: ModelConfig, name: str | None = None) -> Family:
    """The family whose files describe `config`: the first that can, or the one called `name`.

    Raises UserError if there is none.
    """
    chosen = [family for family in FAMILIES if name in (None, family.name)]
    if not chosen:
        raise UserError(f"family {name!r} is not known; known: {', '.join(family.name for family in FAMILIES)}")
    family = next((candidate for candidate in chosen if candidate.holds(config)), None)
    if family is None:
        if name:
            able = ", ".join(candidate.name for candidate in FAMILIES if candidate.holds(config)) or "none"
            raise UserError(f"the layout of family {name!r} cannot describe this model; of those known {able} can")
        raise UserError("none of the released layouts can describe this model; keep the Orbax checkpoint")
    return family
