"""The example notebook, executed cell by cell as Jupyter would."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "trajectories_example.ipynb"


@pytest.mark.slow
def test_the_example_notebook_runs_and_says_what_was_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and len({cell["id"] for cell in book["cells"]}) == len(
        book["cells"]
    )
    space: dict = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            ast.parse(source)
            exec(compile(source, cell["id"], "exec"), space)
    assert space["table"].shape == (5 * 4 * 16, 11) and space["report"].is_file()
    times = space["dynamics"].set_index(["series", "task"])
    # Half of the way to perfect is .75 or .625; the largest model reaches them first where its curve is the steepest.
    assert times.onset["m-3000m", "sciq"] < times.onset["m-3000m", "hellaswag"]
    compared = space["compare"](space["table"], "m-3000m", "m-1000m").set_index(["equal", "window"])
    assert compared.verdict["tokens", "last"] == "better"
    kept = space["forecasts"]
    assert (kept["error"] < kept["error_of_best_small"]).all()
