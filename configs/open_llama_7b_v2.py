"""OpenLLaMA 7B v2: the v1 recipe on RefinedWeb + StarCoder + RedPajama's wikipedia, arxiv, books, stackexchange.

The shares of the sources were not published ("combined all the parts together and shuffled the examples",
open_llama issue 77): prepare them into one data set and shuffle.
"""

import dataclasses

from fineline_jax.configs.open_llama_7b import recipe as version_1  # pyright: ignore[reportMissingImports]
from fineline_jax.recipe import Data, Recipe, Source


def recipe() -> Recipe:
    data = Data(sources=(Source("data/open_llama_v2"),), sequence_length=2_048)
    return dataclasses.replace(version_1(), name="open_llama_7b_v2", data=data)
