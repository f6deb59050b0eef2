"""Hidden files and folders, such as a killed export leaves, hold no results."""

import json
from pathlib import Path

import pytest

from fineline_jax.errors import UserError
from fineline_jax.trajectories.table import read_table


def test_hidden_folders_hold_no_results(tmp_path: Path) -> None:
    def results(place: str, value: float) -> None:
        path = tmp_path / "out" / place / "results_2026-01-01T00-00-00.json"
        path.parent.mkdir(parents=True)
        arguments = {"pretrained": "m", "revision": place[-5:], "tokens": int(value * 1000)}
        content = {"results": {"piqa": {"acc,none": value}}, "n-shot": {"piqa": 0}, "config": {"model_args": arguments}}
        path.write_text(json.dumps(content))

    results("m__step1", 0.5)
    results("m__step2", 0.6)
    before = read_table(tmp_path / "out")
    for left in (".m__step1.0123.partial", ".m__step1.0123.partial/m__step9"):
        results(left, 0.9)
    assert read_table(tmp_path / "out").equals(before) and len(before) == 2
    (tmp_path / "left" / ".x.partial").mkdir(parents=True)
    (tmp_path / "left" / ".x.partial" / "a.csv").write_text("series,tokens,task,metric,value\na,1,piqa,acc,0.5\n")
    with pytest.raises(UserError, match="no result file"):
        read_table(tmp_path / "left")
    (tmp_path / ".hidden").mkdir()  # the folder that is asked for may be hidden itself
    (tmp_path / "out").rename(tmp_path / ".hidden" / "out")
    assert len(read_table(tmp_path / ".hidden" / "out")) == 2
