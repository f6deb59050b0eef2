"""Names of pods and GPUs, and the slices that they stand for (cloud.google.com/tpu/docs: v4, v5p count cores)."""

import importlib.util

import pytest

from fineline_jax.errors import UserError
from fineline_jax.plan import topologies
from fineline_jax.training.metrics import PEAK_TFLOPS


@pytest.mark.parametrize(
    ("name", "sides", "count"),
    [
        ("v4-8", (2, 2, 1), 4),
        ("v4-16", (2, 2, 2), 8),
        ("v4-64", (2, 4, 4), 32),
        ("v4-512", (4, 8, 8), 256),
        ("v4-1024", (8, 8, 8), 512),
        ("v5p-128", (4, 4, 4), 64),
        ("v5e-8", (2, 4), 8),
        ("v5e-128", (8, 16), 128),
        ("v5e-256", (16, 16), 256),
        ("v6e-256", (16, 16), 256),
        ("2xv5e-256", (16, 16), 512),
    ],
)
def test_a_slice_has_the_sides_that_its_name_stands_for(name: str, sides: tuple[int, ...], count: int) -> None:
    described = topologies.topology(name)
    assert (described.sides(), described.count) == (sides, count)


def test_gpus_come_in_hosts_of_eight() -> None:
    assert [topologies.topology(name).count for name in ("h100x1", "h100x8", "h200x64")] == [1, 8, 64]
    assert topologies.topology("h100x8").is_gpu and not topologies.topology("v4-8").is_gpu


@pytest.mark.parametrize(
    "name", ["v4-4", "v4-24", "v5e-0", "v5e-2", "v7-8", "h100", "h100x0", "h100x12", "0xv5e-8", ""]
)
def test_any_other_name_is_refused_with_examples(name: str) -> None:
    with pytest.raises(UserError, match=r"--topology .*: no such devices; name a slice .*v4-512.*h100x8"):
        topologies.topology(name)


def test_every_chip_has_a_peak_and_a_published_utilisation() -> None:
    for chip in topologies.CHIPS.values():
        assert chip.kind in PEAK_TFLOPS and 0.2 < chip.mfu[0] < chip.mfu[1] < 0.7 and chip.source


@pytest.mark.parametrize(("name", "extra"), [("v4-8", "plan"), ("h100x8", "cuda12")])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--topology {name} needs .*pip install 'fineline_jax\[{extra}\]'"):
        topologies.environment(topologies.topology(name))
