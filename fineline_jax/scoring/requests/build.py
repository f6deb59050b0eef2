"""Building a request pack: lm-eval's requests, tokenised, as tables."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pandas as pd
import pyarrow as pa

from fineline_jax.errors import UserError
from fineline_jax.scoring.lm_eval_compat import handle_non_serializable, has_several_targets, hash_string
from fineline_jax.scoring.modes.encode import Encoder, Tokens
from fineline_jax.scoring.modes.mode import Mode, check_metric, check_task, first_metric, largest_context, not_computed
from fineline_jax.scoring.modes.names import find_mode
from fineline_jax.scoring.options import PackOptions
from fineline_jax.scoring.requests.definitions import check_right_choices
from fineline_jax.scoring.requests.pack import FORMAT, SCHEMAS, Pack, content_hash, refuse_to_replace, save
from fineline_jax.scoring.requests.suite import Suite, open_suite
from fineline_jax.scoring.requests.tasks import (
    FEWSHOT_SEED,
    Chat,
    Document,
    Group,
    LoadDataset,
    Task,
    config_hash,
    documents,
    load_tasks,
    local_folder,
    remember_file,
    shots,
    without_bars,
)
from fineline_jax.tokenizers.identity import identity, vocabulary_size
from fineline_jax.tokenizers.open import open_tokenizer

_LOG = logging.getLogger(__name__)


def prepare(suite: str | Path, tokenizer: Path, out: Path, options: PackOptions = PackOptions()) -> Pack:
    """`build` a pack and write it to `out`. Raises UserError also if `out` is something else than a pack."""
    refuse_to_replace(out)
    pack = build(suite, tokenizer, options)
    save(pack, out)
    return pack


def build(suite: str | Path | Suite, tokenizer: Path, options: PackOptions = PackOptions()) -> Pack:
    """Every request of `suite`, made by lm-eval's task code and tokenized, in memory.

    suite: YAML file, name of a suite, or task names (see `suite.open_suite`). tokenizer: a folder. The same arguments
    give the same bytes. Raises UserError for bad input.
    """
    options.check()
    bos = options.bos or "auto"
    opened = open_suite(suite)
    if options.include_path is not None:
        opened = dataclasses.replace(opened, include_path=(*opened.include_path, options.include_path))
    mode = find_mode(opened.mode if options.mode is None else options.mode, "--mode")
    encoder = Encoder(open_tokenizer(tokenizer, bos), bos)
    source, picked, chat = _source(options), _picked(options.pick), _chat(options, encoder, tokenizer)
    seed = FEWSHOT_SEED if options.fewshot_seed is None else options.fewshot_seed
    columns = {name: {field: [] for field in schema.names} for name, schema in SCHEMAS.items()}
    contexts: dict[tuple[str, int], int] = {}
    local = source or opened.include_path or opened.texts
    with without_bars() if local else contextlib.nullcontext():  # downloads show their own
        tasks, groups = load_tasks(opened, source, options.shots, seed)
        for task in tasks:
            kind, brings = task.definition.OUTPUT_TYPE, _own_metrics(task.definition)
            check_task(mode, task.name, kind, brings)
            if task.own_file and (others := not_computed(mode, kind, task.definition.aggregation(), brings)):
                _LOG.warning(
                    "%s: task %s: not computed of such a task: %s", task.own_file, task.name, ", ".join(others)
                )
            if task.spec.metric is not None and task.spec.task == task.name:  # the tasks of a group may differ
                check_metric(mode, task.name, kind, task.spec.metric, task.definition.aggregation(), brings)
        if unknown := picked.keys() - {task.name for task in tasks}:
            raise UserError(
                f"--pick {options.pick}: task {min(unknown)!r} is not in suite {opened.name!r}; leave it out"
            )
        rows = []
        for task in tasks:
            docs = list(documents(task, options.limit, picked.get(task.name), chat))
            if not docs:
                raise UserError(f"task {task.name!r}: no documents are left; correct --pick, or give more documents")
            if task.definition.OUTPUT_TYPE == "multiple_choice" and not _own_metrics(task.definition):
                gold, counts = [doc.gold for doc in docs], [len(doc.choices) for doc in docs]
                check_right_choices(task.name, task.own_file, gold, counts)
            rows.append(_add_task(task, mode, encoder, columns, contexts, docs))
            remember_file(task)
    tables = {name: _table(name, columns[name]) for name in SCHEMAS}
    default = identity(open_tokenizer(tokenizer))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "suite": opened.name,
        "mode": mode.name,
        "hash": "",
        "tasks": rows,
        "groups": [_group_row(group, rows, mode) for group in groups],
        "tokenizer": {
            "tokenizer_hash": default.tokenizer_hash,
            "adds_bos": default.adds_bos,
            "size": vocabulary_size(encoder.tokenizer),
        },
        "bos": bos,
        "prefix_token": encoder.prefix,
        "max_context": largest_context(mode, options.max_context),
        "limit": options.limit,
        "fewshot_seed": seed,
        "lm_eval": lm_eval.__version__,
        "counts": {name: table.num_rows for name, table in tables.items()},
    }
    pack = Pack(manifest, **tables)
    manifest["hash"] = content_hash(pack)
    return pack


def _source(options: PackOptions) -> LoadDataset | None:
    if options.benchmarks is not None:
        if not options.benchmarks.is_dir():
            raise UserError(
                f"--benchmarks {options.benchmarks}: no such folder; correct it, or leave it out to read from the hub"
            )
        return local_folder(options.benchmarks)
    if options.tfds is not None:
        from fineline_jax.scoring.requests.tfds_source import from_tfds  # seconds to import

        return from_tfds(options.tfds)
    return None


def _picked(file: Path | None) -> dict[str, set[int]]:
    """Task -> numbers of its documents that are asked. Raises UserError if `file` is no such table."""
    if file is None:
        return {}
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
        if "place" in table:  # of `informative_documents`: empty where a document is not picked
            table = table[table["place"].notna()]
        table = table.assign(document=table["document"].astype(int))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"--pick {file}: no table of the columns task and document ({reason})") from None
    return {str(task): set(part["document"]) for task, part in table.groupby("task")}


def _chat(options: PackOptions, encoder: Encoder, folder: Path) -> Chat:
    """Raises UserError if the tokenizer has no chat template and one is asked for."""
    if options.chat_template is None:
        return Chat(system_instruction=options.system_instruction)
    if not encoder.tokenizer.chat_template:
        raise UserError(f"--chat-template: the tokenizer {folder} has none; leave it out, or give another --tokenizer")

    return Chat(encoder.chat, options.chat_template == "multi-turn", options.system_instruction)


def _add_task(
    task: Task,
    mode: Mode,
    encoder: Encoder,
    columns: dict[str, dict[str, list]],
    contexts: dict[tuple[str, int], int],
    docs: list[Document],
) -> dict[str, Any]:
    """Append the task's rows; returns its entry in the manifest."""
    rolling = task.definition.OUTPUT_TYPE == "loglikelihood_rolling"
    requests = [request for doc in docs for request in doc.requests]
    try:
        encoded = _rolling(encoder, requests) if rolling else mode.encode(encoder, requests)
    except UserError as error:
        raise UserError(f"task {task.name!r}: {error}") from None
    first = len(columns["requests"]["request"])
    position = 0
    for doc in docs:
        count = len(doc.requests)
        continuations = [encoded[position + i][1] for i in range(count)]
        _append(columns["documents"], _document_row(task.name, mode, first + position, doc, continuations))
        for choice, (context, text) in enumerate(doc.requests):
            tokens = encoded[position + choice]
            row = -1 if rolling else _context_row(columns["contexts"], contexts, context, tokens[0])
            request = (first + position + choice, task.name, doc.number, choice, row, text, tokens[1])
            _append(columns["requests"], dict(zip(SCHEMAS["requests"].names, request, strict=True)))
        position += count
    return _task_row(task, mode, docs)


def _context_row(columns: dict[str, list], contexts: dict[tuple[str, int], int], text: str, tokens: Tokens) -> int:
    # An empty context is the prefix token, or what the continuation gave up for it: the same token. In mode
    # opencompass-ppl it is the first token of prompt and choice, which after an empty prompt is the choice's.
    row = contexts.setdefault((text, int(tokens[0])), len(contexts))
    if row == len(columns["context"]):
        _append(columns, {"context": row, "text": text, "tokens": tokens})
    return row


def _rolling(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    empty = np.zeros(0, np.int32)
    return [(empty, tokens) for tokens in encoder.texts([text for _, text in pairs])]


def _document_row(task: str, mode: Mode, first: int, doc: Document, continuations: list[Tokens]) -> dict[str, Any]:
    requests = doc.requests[: len(doc.choices)]
    choices = tuple(text for _, text in requests) if mode.delimiter_counts else doc.choices
    content = json.dumps(doc.doc, default=handle_non_serializable, ensure_ascii=False)
    return {
        "task": task,
        "doc": doc.number,
        "first_request": first,
        "requests": len(doc.requests),
        "gold": list(doc.gold),
        "choice_chars": [len(choice) for choice in choices],
        "choice_bytes": [len(choice.encode()) for choice in choices],
        "choice_tokens": [len(tokens) for tokens in continuations[: len(choices)]],
        "words": doc.words,
        "bytes": doc.bytes,
        "target": doc.target,
        "content": content,
        # the three hashes are those of lm-eval's sample files
        "doc_hash": hash_string(json.dumps(doc.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)),
        "prompt_hash": hash_string(doc.requests[0][0] if doc.requests[0][0] else doc.requests[0][1]),
        "target_hash": hash_string(doc.target),
    }


def _task_row(task: Task, mode: Mode, docs: list[Document]) -> dict[str, Any]:
    definition, spec = task.definition, task.spec
    output_type = definition.OUTPUT_TYPE
    chance = spec.chance if output_type != "generate_until" else None
    if chance is None and output_type == "multiple_choice":
        chance = float(np.mean([1 / len(doc.choices) for doc in docs]))
    return {
        "task": task.name,
        "domain": spec.domain,
        "shots": shots(task),
        "metric": first_metric(mode, output_type, spec.metric),
        "chance": chance,
        "output_type": output_type,
        "multiple_gold": has_several_targets(definition),
        "unconditional": "acc_mutual_info" in definition.aggregation(),
        "own_metrics": _own_metrics(definition),
        "lm_eval_metrics": sorted(definition.aggregation()),
        "version": str(definition.VERSION),
        "config_sha256": config_hash(task),
        "documents": len(docs),
        "requests": sum(len(doc.requests) for doc in docs),
    }


def _own_metrics(definition: Any) -> bool:
    """Whether the task computes its metrics itself. Rolling tasks only choose their weights, which are stored; tasks
    that generate would look at what was generated."""
    return callable(definition.config.process_results) and definition.OUTPUT_TYPE in (
        "multiple_choice",
        "loglikelihood",
    )


def _group_row(group: Group, rows: list[dict[str, Any]], mode: Mode) -> dict[str, Any]:
    leaves = [row for row in rows if row["task"] in group.leaves]
    metric = next((row["metric"] for row in leaves), "acc")
    chance = group.chance
    if chance is None and all(row["chance"] is not None for row in leaves):
        total = sum(row["documents"] for row in leaves)
        chance = sum(row["chance"] * row["documents"] for row in leaves) / total
    return {
        "group": group.name,
        "domain": group.domain,
        "metric": metric,
        "chance": chance,
        "tasks": list(group.leaves),
        "weight_by_size": dict(group.metrics) if mode.groups_weighted_by_size else {},
        "weight_others_by_size": mode.groups_weighted_by_size,
    }


def _append(columns: dict[str, list], row: dict[str, Any]) -> None:
    for name, value in row.items():
        columns[name].append(value)


def _table(name: str, columns: dict[str, list]) -> pa.Table:
    schema = SCHEMAS[name]
    arrays = []
    for field in schema:
        values = columns[field.name]
        if pa.types.is_large_list(field.type):
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in values], dtype=np.int64)])
            flat = np.concatenate([*values, np.zeros(0, np.int32)])
            arrays.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, pa.int32())))
        elif pa.types.is_dictionary(field.type):
            arrays.append(pa.array(values, pa.string()).dictionary_encode())
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)
