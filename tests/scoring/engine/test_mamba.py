"""A series of state-space models, scored by the command: equal to transformers, one request at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scoring_examples import write_benchmarks, write_tokenizer

from fineline_jax.cli import main
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack

TOKENS = {"step100-tokens1B": 10**9, "step200-tokens2B": 2 * 10**9, "step400-tokens4B": 4 * 10**9}
CONTEXT = 48


@pytest.fixture(scope="module")
def mambas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three checkpoints of one model with their tokenizer, and transformers' models."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    from transformers import MambaConfig, MambaForCausalLM

    folder, models = tmp_path_factory.mktemp("mamba"), {}
    config = MambaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=4, time_step_rank=2,
        initializer_range=0.3, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    for seed, name in enumerate(TOKENS):
        torch.manual_seed(seed)
        models[name] = MambaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in models[name].named_parameters():
                if parameter.ndim == 1 or "A_log" in parameter_name:
                    parameter.add_(0.3 * torch.randn_like(parameter))  # constants would hide a mistake
        models[name].save_pretrained(folder / "tiny-mamba" / name)
    write_tokenizer(folder / "tiny-mamba" / "tokenizer", adds_bos=True)
    write_benchmarks(folder / "benchmarks", documents=6)
    return folder, models


def one_at_a_time(made: pack.Pack, model: Any) -> list[tuple[float, bool]]:
    """Log-likelihood and greediness of each request, from a batch of that request alone."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    contexts = made.contexts.column("tokens").to_pylist()
    found = []
    for request in made.requests.to_pylist():
        targets = request["tokens"]
        ids = (contexts[request["context"]] + targets)[-(CONTEXT + 1) :]
        with torch.no_grad():
            logp = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-len(targets) :]
        chosen = logp[torch.arange(len(targets)), torch.tensor(targets)]
        found.append((float(chosen.sum()), logp.argmax(-1).tolist() == targets))
    return found


def test_a_series_of_state_space_models_has_the_log_likelihoods_of_transformers(mambas, tmp_path):
    folder, models = mambas
    out = tmp_path / "scores"
    suite = ["--suite", "piqa@1,lambada_openai", "--benchmarks", str(folder / "benchmarks"), "--out", str(out)]
    assert main(["score", str(folder / "tiny-mamba"), *suite]) == 0
    made = pack.load(out / "pack")
    longest = max(len(context) for context in made.contexts.column("tokens").to_pylist())
    assert longest > CONTEXT, "else nothing would be cut"
    means = []
    for name, tokens in TOKENS.items():
        ours = score_files.read(out / "tiny-mamba" / f"{name}.parquet")
        expected = one_at_a_time(made, models[name])
        assert (ours.header.tokens, ours.header.engine) == (tokens, "rows")
        np.testing.assert_allclose(ours.loglikelihood, [value for value, _ in expected], atol=1e-4)
        assert ours.is_greedy.tolist() == [greedy for _, greedy in expected]
        means.append(ours.loglikelihood.mean())
    assert len({round(mean, 3) for mean in means}) == len(TOKENS), "each checkpoint has weights of its own"
