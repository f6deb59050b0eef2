"""The tasks that a suite's groups come down to."""

from typing import Any

from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml


def leaves(entry: Any, index: dict[str, Entry]) -> list[Any]:
    """The tasks of a group, through groups within it."""
    if entry.kind in (Kind.TASK, Kind.PY_TASK):
        return [entry]
    if entry.kind == Kind.TAG:
        return [leaf for name in sorted(entry.tags) for leaf in leaves(index[name], index)]
    assert entry.yaml_path is not None
    found, queue = [], list(load_yaml(entry.yaml_path, resolve_func=False)["task"])
    while queue:
        item = queue.pop(0)
        if isinstance(item, dict):
            queue = list(item["task"]) + queue
        else:
            found += leaves(index[item], index)
    return found
