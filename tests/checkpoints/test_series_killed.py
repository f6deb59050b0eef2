"""Forty revisions on a hub, scored coarse to fine by a process that is killed again and again."""

import collections
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from remote_examples import files_of, hub
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import make_series

from fineline_jax.checkpoints.open import open_series
from fineline_jax.scoring.series.order import axis, coarse_to_fine

STEPS = tuple(range(50, 2050, 50))
KILLS = 6
ENTRY = """
name: forty
location: hf://org/forty@{name}
listing: true
pattern: ["stage1-step{step}", "stage2-step{second}"]
step: 1500 + second
tokens: [(1500 + second) * 4096, step * 4096]
stages: {stage 2: 1500 * 4096}
count: 40
"""


@pytest.mark.slow
def test_forty_revisions_of_two_stages_are_scored_coarse_to_fine_whenever_the_process_is_killed(tmp_path: Path):
    write_tokenizer(tmp_path / "tokenizer", adds_bos=False)
    make_series(tmp_path / "made", tmp_path / "tokenizer", STEPS)
    write_benchmarks(tmp_path / "benchmarks", documents=8)
    (tmp_path / "forty.yaml").write_text(ENTRY)
    named = [f"stage1-step{step}" if step <= 1500 else f"stage2-step{step - 1500}" for step in STEPS]
    with hub() as served:
        made = {name: files_of(tmp_path / "made" / f"step{step}") for name, step in zip(named, STEPS)}
        served.repositories["org/forty"] = dict(sorted(made.items())) | {"main": {}}
        environment = os.environ | {"HF_ENDPOINT": served.url, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "0"}

        def command(out: str) -> list[str]:
            options = f"--suite piqa --benchmarks {tmp_path}/benchmarks --keep-downloads no --out {tmp_path / out}"
            where = ["--downloads", str(tmp_path / f"{out}-downloads")]
            return [
                sys.executable,
                "-m",
                "fineline_jax",
                "score",
                str(tmp_path / "forty.yaml"),
                *options.split(),
                *where,
            ]

        subprocess.run(command("whole"), env=environment, check=True, capture_output=True)
        os.environ["HF_ENDPOINT"], before = served.url, os.environ.get("HF_ENDPOINT")
        try:
            checkpoints = open_series(str(tmp_path / "forty.yaml")).checkpoints
        finally:
            os.environ.pop("HF_ENDPOINT") if before is None else os.environ.update(HF_ENDPOINT=before)
        assert [one.name for one in checkpoints] == named
        order = [named[i] for i in coarse_to_fine(axis(checkpoints))]
        whole = {path.stem: path.read_bytes() for path in (tmp_path / "whole/forty").glob("*.parquet")}
        assert whole.keys() == set(named)
        written = [json.loads(line)["checkpoint"] for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
        assert written == order

        served.asked.clear()
        out, moments, early = tmp_path / "killed/forty", random.Random(3), 0
        for kill in range(KILLS):
            had = len(list(out.glob("[!.]*.parquet")))
            process = subprocess.Popen(command("killed"), env=environment, stderr=subprocess.DEVNULL)
            while process.poll() is None and len(list(out.glob("[!.]*.parquet"))) <= had + kill:
                time.sleep(0.005)
            time.sleep(moments.random() * 0.2)
            early += process.poll() is None
            process.kill()
            process.wait()
            done = {path.stem: path.read_bytes() for path in out.glob("[!.]*.parquet")}
            assert set(done) == set(order[: len(done)]), "what is there covers the axis evenly, at every moment"
            assert all(whole[name] == content for name, content in done.items())
        assert early == KILLS, "a kill came too late"
        subprocess.run(command("killed"), env=environment, check=True, capture_output=True)
        assert {path.stem: path.read_bytes() for path in out.glob("*.parquet")} == whole
        fetched = collections.Counter(path for path, part in served.downloads() if path.endswith("safetensors"))
        # At each kill one checkpoint is scored and the next one fetched: both may be asked for again.
        assert sum(fetched.values()) <= len(named) + 2 * KILLS and len(fetched) == len(named)
        assert not list((tmp_path / "killed-downloads").glob("*/model.safetensors")), "nothing is left on the disk"
