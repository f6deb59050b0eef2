"""Our numbers are those of lm-eval's Hugging Face backend in float32, and of a float64 reference."""

import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest
from scoring_examples import score_once

from fineline_jax import prepare_pack
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.open import open_series
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine import step as engine_step
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import pack, suite, tasks

SUITE = "piqa,arc_easy,lambada_openai"
CONTEXT = 1024
"""One choice of piqa has 624 tokens with this small vocabulary: lm-eval fails on it at the model's own 512."""


def ours(made: pack.Pack, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    config, params = load.load(open_series(str(folder)).checkpoints[0], mesh)
    return score_once(made, config, params, mesh)


def agreement(mine: np.ndarray, theirs: np.ndarray) -> str:
    """For `pytest -s`: how many agree to 1e-4, and the largest differences with the log-likelihoods they are at."""
    apart = np.abs(mine - theirs)
    worst = ", ".join(f"{apart[i]:.2e} at {theirs[i]:.1f}" for i in np.argsort(-apart)[:5])
    return f"{(apart <= 1e-4).sum()} of {len(apart)} log-likelihoods within 1e-4; largest differences: {worst}"


def compare(
    shared_data: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    names: str = SUITE,
    bos: Literal["auto", "never"] = "auto",
) -> None:
    pytest.importorskip("accelerate", reason="pip install -e '.[test]'")  # of lm-eval's torch backend
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, benchmarks = shared_data / "models/tinystories-260k", shared_data / "benchmarks"
    made = prepare_pack(names, model, out, benchmarks=benchmarks, max_context=CONTEXT, limit=limit, bos=bos)
    loglikelihood, is_greedy = ours(made, model)
    found = tidy.of_tasks(made, loglikelihood, is_greedy)

    add_bos = None if bos == "auto" else False
    reference = HFLM(
        pretrained=str(model), dtype="float32", device="cpu", batch_size=32, max_length=CONTEXT, add_bos_token=add_bos
    )
    loaded, _ = tasks.load_tasks(suite.open_suite(names), tasks.local_folder(benchmarks))
    definitions = {task.name: task.definition for task in loaded}
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # its bootstrap would fork beside JAX's threads
    result = lm_eval.evaluate(reference, {"tasks": definitions}, limit=limit, bootstrap_iters=2, log_samples=True)
    assert result is not None
    expected = [
        (float(response[0][0]), bool(response[0][1]))
        for name in definitions
        for sample in result["samples"][name]
        for response in sample["resps"]
    ]
    assert len(expected) == len(loglikelihood)
    print(agreement(loglikelihood, np.array([ll for ll, _ in expected])))
    # lm-eval adds hundreds of tokens in float32, whose steps are 1.2e-4 beyond 1024 nats: hence the relative part, two
    # such steps. It matters for two of all 18330 requests.
    np.testing.assert_allclose(loglikelihood, [ll for ll, _ in expected], atol=1e-4, rtol=2.4e-7)
    assert is_greedy.tolist() == [greedy for _, greedy in expected]
    for name, values in result["results"].items():
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in values:
                assert found[name][metric].value == values[f"{metric},none"]
                assert found[name][metric].stderr == values[f"{metric}_stderr,none"]
    lambada = result["results"].get("lambada_openai")
    if lambada:
        assert found["lambada_openai"]["perplexity"].value == pytest.approx(lambada["perplexity,none"], rel=1e-4)


def test_sixty_documents_of_three_tasks_equal_lm_eval(shared_data, tmp_path, monkeypatch):
    compare(shared_data, tmp_path / "p", monkeypatch, limit=60)


def test_shots_two_contexts_per_question_and_no_bos_equal_lm_eval(shared_data, tmp_path, monkeypatch):
    compare(shared_data, tmp_path / "p", monkeypatch, limit=20, names="winogrande@2,openbookqa@1", bos="never")


@pytest.mark.slow
def test_all_documents_of_three_tasks_equal_lm_eval(shared_data, tmp_path, monkeypatch):
    compare(shared_data, tmp_path / "p", monkeypatch, limit=None)


def test_the_float64_reference_of_whole_texts_is_reproduced(shared_data):
    """golden.json: log p of every token of 13 texts, from a numpy forward pass in float64."""
    folder = shared_data / "models/tinystories-260k"
    texts = json.loads((folder / "golden.json").read_text())["items"]
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    config, params = load.load(open_series(str(folder)).checkpoints[0], mesh)
    step = engine_step.score_step(config, "float32", "xla")
    longest = max(len(text["ids"]) for text in texts) - 1
    tokens = np.zeros((len(texts), longest), np.int32)
    targets = np.full((len(texts), longest), -1, np.int32)
    for row, text in enumerate(texts):
        count = len(text["ids"]) - 1
        tokens[row, :count], targets[row, :count] = text["ids"][:-1], text["ids"][1:]
    places = np.tile(np.arange(longest, dtype=np.int32), (len(texts), 1))
    with jax.set_mesh(mesh):
        logp = np.asarray(step(params, tokens, places, targets)[0])
    for row, text in enumerate(texts):
        np.testing.assert_allclose(logp[row, : len(text["ids"]) - 1], text["logprobs"], atol=1e-3)
        assert logp[row].sum() == pytest.approx(sum(text["logprobs"]), abs=1e-3)
