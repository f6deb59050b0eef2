"""A folder of texts by domain as a group of tasks: each domain's bits per byte, as Paloma and the Pile are reported.

    FOLDER/<domain>.jsonl, .txt, or FOLDER/<domain>/*.jsonl, *.txt      .jsonl: {"text": …} per line; .txt: one text

The group is called as the folder, a task <folder>_<domain>; the group's value is the plain mean over domains. Texts are
scored as lm-eval's loglikelihood_rolling tasks: every token once, with as much left context as fits.
"""

from pathlib import Path

from fineline_jax.errors import UserError
from fineline_jax.scoring.lm_eval_compat import Entry, Kind

SUFFIXES = (".jsonl", ".txt")
METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")


def text_entries(folder: Path) -> dict[str, Entry]:
    """Name -> definition of the group and of the task of each domain. Raises UserError if there are no texts."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of texts; a task with a slash in it is one")
    group, entries = folder.resolve().name, dict[str, Entry]()
    for path in sorted(folder.iterdir()):
        files = [path] if path.is_file() else sorted(path.glob("*"))
        files = [str(file.absolute()) for file in files if file.suffix in SUFFIXES and file.name[0] != "."]
        if not files or path.name[0] == ".":
            continue
        if len(kinds := {Path(file).suffix for file in files}) > 1:
            raise UserError(f"{path}: holds both .jsonl and .txt; keep one kind per domain")
        name = f"{group}_{path.stem if path.is_file() else path.name}"
        if name in entries:
            raise UserError(f"{folder}: domain {path.stem!r} is there twice; rename one")
        reader = {"data_files": {"test": files}}
        reader |= {"sample_by": "document"} if kinds == {".txt"} else {}
        config = {
            "task": name, "dataset_path": "text" if kinds == {".txt"} else "json", "dataset_kwargs": reader,
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": metric} for metric in METRICS],
            "metadata": {"version": 1.0},
        }  # fmt: skip
        entries[name] = Entry(name, Kind.TASK, None, config)
    if not entries:
        raise UserError(f"{folder}: no texts; put <domain>.jsonl, <domain>.txt or folders of them there")
    whole = {
        "group": group, "task": list(entries), "metadata": {"version": 1.0},
        "aggregate_metric_list": [{"metric": metric, "weight_by_size": False} for metric in METRICS],
    }  # fmt: skip
    return entries | {group: Entry(group, Kind.GROUP, None, whole)}
