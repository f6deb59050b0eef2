"""Downloading, loading and scoring of a series as a picture, from the log of its scores.

    python benchmarks/score_timeline.py SCORES/log.jsonl OUT.png

A row each for downloading and hashing, loading, and scoring; a colour per checkpoint. What lies above a bar of
scoring was done meanwhile. Prints the share of the time in which nothing was scored.
"""

import json
import sys

import matplotlib
from matplotlib import pyplot as plt

ROWS = ("scored", "loaded", "downloaded\nand hashed")


def main() -> None:
    log, out = sys.argv[1:]
    with open(log, encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if len(line.get("opened", ())) == 3]
    if not lines:
        sys.exit(f"{log}: no line says when a checkpoint was opened; score a series again")
    lines.sort(key=lambda line: line["scored"][0])
    zero = min(line["opened"][0] for line in lines)
    matplotlib.use("agg")
    figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
    for number, line in enumerate(lines):
        begun, here, loaded = line["opened"]
        for row, (start, end) in enumerate((line["scored"], (here, loaded), (begun, here))):
            axes.barh(row, end - start, left=start - zero, color=f"C{number % 10}", edgecolor="white", linewidth=0.4)
    axes.set_yticks(range(len(ROWS)), ROWS)
    axes.set_xlabel("seconds")
    axes.set_title(f"{lines[0]['series']}: {len(lines)} checkpoints", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    first, last = lines[0]["scored"][0], lines[-1]["scored"][1]
    scoring = sum(end - start for start, end in (line["scored"] for line in lines))
    print(
        f"{out}: {1 - scoring / (last - first):.1%} of {last - first:.1f} s between the first and the last not scoring"
    )


if __name__ == "__main__":
    main()
