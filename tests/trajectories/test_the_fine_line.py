"""The page on the paper's findings is what its script makes of the public tables (all but the slow laws)."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "the_fine_line.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text[text.index(f"## {title}") :].partition("\n## ")[0]


@pytest.mark.slow
def test_the_page_is_what_its_script_writes(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("the_fine_line", ROOT / "configs" / "reproduce" / "the_fine_line.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "the_fine_line", script)
    spec.loader.exec_module(script)
    empty = script.Finding("Left out", "", "", [], pd.DataFrame({"a": ["b"]}), lambda axes: None, "laws: x")
    monkeypatch.setattr(script, "laws", lambda ladder, facts: empty)
    monkeypatch.setattr(sys, "argv", ["script", str(shared_data), "--out", str(tmp_path / "the_fine_line.md")])
    script.main()
    made = (tmp_path / "the_fine_line.md").read_text(encoding="utf-8")
    titles = [
        "Task dynamic prediction", "Cross-domain promotion", "Training strategy", "Scale and reasoning",
        "Dynamics across sizes", "Metrics for phases",
    ]  # fmt: skip
    for title in titles:
        assert section(made, title).strip() == section(PAGE, title).strip(), title
    for name in ("prediction", "order", "strategy", "scale", "sizes", "metrics", "laws"):
        assert (ROOT / "docs" / "figures" / "the_fine_line" / f"{name}.svg").is_file()


def test_the_page_has_the_published_values() -> None:
    prediction = section(PAGE, "Task dynamic prediction")
    assert "OLMo-2 7B: yes, p = 0.008" in prediction and "0.58, pythia-6.9b 0.78, pythia-12b 0.78" in prediction
    assert "Baichuan2 7B, the paper's own example, declined" in prediction and "first two jumps" in prediction
    assert "+1.51 ± 0.22" in section(PAGE, "Training strategy") and "+0.30 ± 0.30" in section(PAGE, "Training strategy")
    laws = section(PAGE, "Scaling law of metrics")
    errors = [float(row.split("|")[8]) for row in laws.splitlines() if row.startswith(("| 3B", "| 1B"))]
    assert len(errors) == 16 and sum(errors[:8]) / 8 <= 1.5 and sum(errors[8:]) / 8 <= 2.1
