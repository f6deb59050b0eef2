"""Pythia's page, 37 series, as a browser has it: how many nodes, and how soon the first plot stands."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fineline_jax import interface

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WATCH = """<head><script>
new MutationObserver((_, watch) => {
  if (!document.querySelector("svg path, svg polyline")) return;
  watch.disconnect();
  document.documentElement.dataset.firstPlot = performance.now();
}).observe(document, {childList: true, subtree: true});
</script>"""


class Nodes(HTMLParser):
    count = 0

    def handle_starttag(self, tag, attrs):
        self.count += 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_pythias_page_opens_in_three_seconds_with_fewer_than_ten_thousand_nodes(
    shared_data: Path, tmp_path: Path
) -> None:
    page = interface.analyze(shared_data / "trajectories" / "pythia" / "pythia_v1_tidy.csv.gz", tmp_path / "report")
    html = page.read_text()
    assert html.count("<head>") == 1
    watched = tmp_path / "watched.html"
    watched.write_text(html.replace("<head>", WATCH))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(  # pyright: ignore[reportCallIssue]
        [*command, "--dump-dom", watched.as_uri()],  # pyright: ignore[reportArgumentType]
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    (milliseconds,) = re.findall(r'data-first-plot="([\d.]+)"', seen)
    nodes = Nodes()
    nodes.feed(seen)
    print(f"{nodes.count} nodes, first plot after {float(milliseconds):.0f} ms")
    assert 1000 < nodes.count < 10_000
    assert float(milliseconds) < 3000
