"""A request pack holds lm-eval's requests, encoded as lm-eval encodes them, in the same bytes every time."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from metric_examples import docs, packed
from metric_examples import task as task_row
from scoring_examples import sentence, write_benchmarks, write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.modes.encode import Encoder
from fineline_jax.scoring.requests import pack, suite, tasks
from fineline_jax.tokenizers.identity import identity
from fineline_jax.tokenizers.open import open_tokenizer

SUITE = "piqa@2,arc_easy,winogrande@1,wikitext"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"), documents=8)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"bos": write_tokenizer(folder / "bos", True), "plain": write_tokenizer(folder / "plain", False)}


def test_the_same_arguments_give_the_same_bytes(benchmarks, tokenizers, tmp_path):
    for name in ("a", "b"):
        prepare_pack(SUITE, tokenizers["bos"], tmp_path / name, benchmarks=benchmarks)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["contexts.parquet", "documents.parquet", "manifest.json", "requests.parquet"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_requests_are_those_lm_eval_builds(benchmarks, tokenizers, tmp_path):
    made = prepare_pack(SUITE, tokenizers["plain"], tmp_path / "p", benchmarks=benchmarks)
    source = tasks.local_folder(benchmarks)
    expected = []
    for task in tasks.load_tasks(suite.open_suite(SUITE), source)[0]:
        task.definition.build_all_requests(limit=None, rank=0, world_size=1)
        expected += [(task.name, *instance.args) for instance in task.definition.instances]
    contexts = made.contexts["text"].to_pylist()
    found = [
        (row["task"], *([contexts[row["context"]]] if row["context"] >= 0 else []), row["text"])
        for row in made.requests.select(["task", "context", "text"]).to_pylist()
    ]
    assert found == expected


def test_a_pack_survives_the_disk_and_damage_is_noticed(benchmarks, tokenizers, tmp_path):
    made = prepare_pack("piqa", tokenizers["bos"], tmp_path / "p", benchmarks=benchmarks)
    loaded = pack.load(tmp_path / "p")
    assert loaded.manifest == made.manifest
    assert all(getattr(loaded, name).equals(getattr(made, name)) for name in pack.SCHEMAS)
    table = pq.read_table(tmp_path / "p" / "requests.parquet")
    pq.write_table(table.slice(1), tmp_path / "p" / "requests.parquet")
    with pytest.raises(UserError, match="do not match the hash"):
        pack.load(tmp_path / "p")
    with pytest.raises(UserError, match="not a request pack"):
        pack.load(tmp_path)


def test_a_pack_of_an_older_format_is_refused(benchmarks, tokenizers, tmp_path):
    prepare_pack("piqa", tokenizers["bos"], tmp_path / "p", benchmarks=benchmarks)
    manifest = json.loads((tmp_path / "p/manifest.json").read_text())
    (tmp_path / "p/manifest.json").write_text(json.dumps({**manifest, "format": pack.FORMAT - 1}))
    with pytest.raises(UserError, match="pack format 3 is not 4; prepare it again"):
        pack.load(tmp_path / "p")


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"format": 4}', "not JSON", "null"])
def test_a_damaged_manifest_is_told_in_one_line(manifest, benchmarks, tokenizers, tmp_path):
    prepare_pack("piqa", tokenizers["bos"], tmp_path / "p", benchmarks=benchmarks)
    (tmp_path / "p/manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"p: damaged request pack .*; prepare it again"):
        pack.load(tmp_path / "p")


def test_a_score_file_of_another_kind_is_told_in_one_line(tmp_path):
    header = json.dumps({"format": score_files.FORMAT, "key": {}, "series": "s"})
    schema = score_files._SCHEMA.with_metadata({b"fineline": header.encode()})
    pq.write_table(schema.empty_table(), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: damaged scores \(of its header: it has no record_sha256\)"):
        score_files.read_header(tmp_path / "x.parquet")


def test_the_hash_depends_on_what_is_asked_and_not_on_how_it_is_filed(benchmarks, tokenizers, tmp_path):
    def made(suite_text: str, **options) -> str:
        return prepare_pack(suite_text, tokenizers["bos"], tmp_path / "p", benchmarks=benchmarks, **options).hash

    file = tmp_path / "s.yaml"
    file.write_text("name: s\ntasks: [{task: piqa, domain: elsewhere, shots: 0, chance: 0.4}]\n")
    assert made("piqa") == made(str(file)) == made("piqa@0")
    assert len({made("piqa"), made("piqa@1"), made("piqa", bos="never"), made("piqa", limit=3)}) == 4


def test_the_tokenizer_of_a_pack_has_as_many_ids_as_its_added_tokens_need(benchmarks, tokenizers, tmp_path):
    size = open_tokenizer(tokenizers["bos"]).vocab_size
    larger = open_tokenizer(tokenizers["bos"])
    larger.add_tokens(["<mask>", "<pad>"])
    larger.save_pretrained(tmp_path / "larger")
    made = prepare_pack("piqa", tmp_path / "larger", tmp_path / "p", benchmarks=benchmarks, limit=1)
    assert made.manifest["tokenizer"]["size"] == size + 2


def test_nothing_but_a_pack_is_replaced(benchmarks, tokenizers, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a request pack"):
        prepare_pack("piqa", tokenizers["bos"], tmp_path, benchmarks=benchmarks)
    with pytest.raises(UserError, match="not a request pack"):
        pack.save(packed([(task_row("t"), docs(1))]), tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def strings(rng: random.Random) -> list[tuple[str, str]]:
    """Contexts and continuations with spaces, line breaks, empty contexts, BOS text and other scripts at the seam."""
    pairs = []
    for _ in range(150):
        context = sentence(rng) + rng.choice(["", " ", "  ", "\n", "\n\n", ":", " \t"])
        if rng.random() < 0.15:
            context = rng.choice(["", "<s>", "<s> " + context])
        continuation = rng.choice(["", " ", "\n", "  "]) + sentence(rng, 1, 4)
        pairs.append((context, continuation))
    return [*pairs, ("", "<s> cat"), ("x" * 40, "y" * 40), ("Fäden", " ne pas"), ("a", "b" * 3)]


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("kind", ["bos", "plain", "llama", "gpt-neox-20b", "tinystories"])
def test_pairs_are_encoded_as_by_lm_evals_hugging_face_backend(kind, bos, tokenizers, request):
    pytest.importorskip("accelerate", reason="pip install -e '.[test]'")  # of lm-eval's torch backend
    from lm_eval.models.huggingface import HFLM

    if kind in tokenizers:
        folder = tokenizers[kind]
    else:
        shared = request.getfixturevalue("shared_data")
        folder = shared / "models/tinystories-260k" if kind == "tinystories" else shared / "tokenizers" / kind
    encoder = Encoder(open_tokenizer(folder, bos), bos)
    reference = HFLM.__new__(HFLM)  # its encoding without a model
    reference.tokenizer = encoder.tokenizer
    reference.add_bos_token = {"auto": None, "always": True, "never": False}[bos]
    reference.custom_prefix_token_id = None
    reference.backend, reference.enable_thinking = "causal", False
    reference._loglikelihood_tokens = lambda requests, **_: requests
    pairs = strings(random.Random(5))
    instances = [type("Request", (), {"args": pair}) for pair in pairs]
    expected = reference.loglikelihood(instances, disable_tqdm=True)
    found = encoder.pairs(pairs)
    for pair, (_, context, continuation), ours in zip(pairs, expected, found, strict=True):
        assert (context, continuation) == (ours[0].tolist(), ours[1].tolist()), pair
    assert encoder.prefix == reference.prefix_token_id


def test_a_tokenizer_is_recognised_again_and_told_apart(tokenizers, tmp_path):
    opened = open_tokenizer(tokenizers["bos"])
    opened.save_pretrained(tmp_path / "copy")
    assert identity(open_tokenizer(tmp_path / "copy")) == identity(opened)
    plain = identity(open_tokenizer(tokenizers["plain"]))
    assert plain.tokenizer_hash == identity(opened).tokenizer_hash and not plain.adds_bos and identity(opened).adds_bos
    state = json.loads((tmp_path / "copy/tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (tmp_path / "copy/tokenizer.json").write_text(json.dumps(state))
    assert identity(open_tokenizer(tmp_path / "copy")) != identity(opened)


def test_errors_name_the_task_and_the_remedy(benchmarks, tokenizers, tmp_path):
    def prepare(suite_text: str, **options) -> None:
        options = {"benchmarks": benchmarks, **options}
        prepare_pack(suite_text, tokenizers["bos"], tmp_path / "p", **options)

    with pytest.raises(UserError, match=r"'piqqa'.*did you mean piqa"):
        prepare("piqqa")
    with pytest.raises(UserError, match=r"'gsm8k'.*openai__gsm8k/main: no <split>.parquet"):
        prepare("gsm8k")
    with pytest.raises(UserError, match=r"'sciq'.*allenai__sciq: no <split>.parquet"):
        prepare("sciq")
    with pytest.raises(UserError, match="fixed to 0 shots"):
        prepare("truthfulqa_mc1@5")
    with pytest.raises(UserError, match=r"no such folder; .* the hub"):
        prepare("piqa", benchmarks=tmp_path / "absent")
    (benchmarks / "baber__piqa/train.parquet").rename(benchmarks / "baber__piqa/kept")
    try:
        with pytest.raises(UserError, match=r"baber__piqa/train.parquet: this split is needed"):
            prepare("piqa")
    finally:
        (benchmarks / "baber__piqa/kept").rename(benchmarks / "baber__piqa/train.parquet")


def test_groups_expand_to_their_leaves(shared_data, tmp_path):
    folder = shared_data / "models/tinystories-260k"
    made = prepare_pack("mmlu", folder, tmp_path / "p", benchmarks=shared_data / "benchmarks", limit=1)
    assert len(made.tasks) == 57 and {task["shots"] for task in made.tasks} == {5}
    groups = {group["group"]: group for group in made.manifest["groups"]}
    assert set(groups) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}
    assert len(groups["mmlu"]["tasks"]) == 57 and groups["mmlu"]["weight_by_size"] == {"acc": True}
    # four letters per question share one context
    assert made.contexts.num_rows == 57 and made.requests.num_rows == 228
    assert np.all(made.continuation_tokens.lengths >= 1)


def changed(value):
    """A value of the same type that differs in its last part."""
    return [*value[:-1], value[-1] + 1] if isinstance(value, list) else value + ("x" if isinstance(value, str) else 1)


def test_the_hash_sees_every_value_of_every_column():
    made = packed([(task_row("a"), docs(3)), (task_row("b"), docs(2))])
    found = {made.hash}
    for name, schema in pack.SCHEMAS.items():
        for field in schema:
            values = getattr(made, name)[field.name].to_pylist()
            for row in (0, -1):
                other = list(values)
                other[row] = changed(values[row])
                column = pa.array(other, pa.string()).dictionary_encode() if field.name == "task" else other
                rows = {f.name: getattr(made, name)[f.name] for f in schema} | {field.name: column}
                tables = {n: getattr(made, n) for n in pack.SCHEMAS} | {name: pa.table(rows, schema=schema)}
                digest = pack.content_hash(pack.Pack(made.manifest, **tables))
                if not (name == "contexts" and row == -1):  # there is one context
                    assert digest not in found, (name, field.name, row)
                found.add(digest)


@pytest.mark.parametrize(
    ("table", "column", "one", "other"),
    [
        ("contexts", "text", ["ab", "c"], ["a", "bc"]),
        ("contexts", "tokens", [[1, 2], [3]], [[1], [2, 3]]),
        ("contexts", "tokens", [[1], []], [[], [1]]),
        ("requests", "task", ["ab", "c"], ["a", "bc"]),
        ("documents", "gold", [[1], [0, 1]], [[1, 0], [1]]),
    ],
)
def test_the_hash_sees_where_one_row_ends_and_the_next_begins(table, column, one, other):
    made = packed([(task_row("a"), docs(2))])
    digests = set()
    for values in (one, other):
        rows = pa.Table.from_pylist([{column: value} for value in values], schema=pack.SCHEMAS[table])
        tables = {name: getattr(made, name).slice(0, 0) for name in pack.SCHEMAS} | {table: rows}
        for n, field in enumerate(pack.SCHEMAS[table]):
            if field.name != column:  # columns without a value
                blank = [[] if "list" in str(field.type) else "" if "string" in str(field.type) else 0] * len(values)
                tables[table] = tables[table].set_column(n, field, pa.array(blank, field.type))
        digests.add(pack.content_hash(pack.Pack(made.manifest, **tables)))
    assert len(digests) == 2


def test_the_hash_sees_what_of_the_manifest_decides_a_number_and_nothing_else():
    made = packed([(task_row("a"), docs(3))])

    def digest(changes: dict, of_task: dict | None = None) -> str:
        manifest = made.manifest | changes
        manifest["tasks"] = [made.tasks[0] | (of_task or {})]
        return pack.content_hash(pack.Pack(manifest, made.contexts, made.requests, made.documents))

    assert digest({}) == made.hash
    decisive = [
        digest({"mode": "olmes"}), digest({"max_context": 100}), digest({"prefix_token": 1}), digest({"format": 5}),
        digest({"tokenizer": {"tokenizer_hash": "1"}}), digest({}, {"task": "b"}), digest({}, {"shots": 1}),
        digest({}, {"output_type": "loglikelihood"}),
    ]  # fmt: skip
    assert len({made.hash, *decisive}) == 1 + len(decisive)
    filed = {"domain": "x", "metric": "acc_norm", "chance": 0.1, "version": "9", "config_sha256": "1"}
    assert digest({"suite": "x", "bos": "never", "lm_eval": "1", "limit": 3, "groups": [{}]}, filed) == made.hash


def test_the_hash_and_the_rows_do_not_depend_on_how_a_table_is_stored():
    made = packed([(task_row("a"), docs(5)), (task_row("b"), docs(4))])
    chunked = {}
    for name in pack.SCHEMAS:
        table = getattr(made, name)
        twice = pa.concat_tables([table, table]).slice(table.num_rows - 1)  # an offset that is not 0
        chunked[name] = pa.concat_tables([table.slice(0, table.num_rows - 1), twice.slice(0, 1)])
        assert chunked[name].equals(table)
    again = pack.Pack(made.manifest, **chunked)
    assert pack.content_hash(again) == made.hash
    texts = [row["tokens"] for row in made.requests.to_pylist()]
    assert len(again.continuation_tokens) == len(texts)
    assert [again.continuation_tokens[i].tolist() for i in range(len(texts))] == texts


def test_ragged_rows_are_those_of_the_column_also_of_a_part_of_it():
    rows = [[5, 6], [], [7], [8, 9, 10]]
    column = pa.chunked_array(
        [pa.array(rows[:2], pa.large_list(pa.int32())), pa.array(rows[2:], pa.large_list(pa.int32()))]
    )
    for start, stop in ((0, 4), (1, 4), (1, 2), (2, 3), (3, 4), (0, 0)):
        found = pack.ragged(column.slice(start, stop - start))
        assert [found[i].tolist() for i in range(len(found))] == rows[start:stop]
        assert found.lengths.tolist() == [len(row) for row in rows[start:stop]] and found.offsets[0] == 0


def test_the_largest_token_of_contexts_and_continuations():
    made = packed([(task_row("a"), docs(2))])
    assert made.request_tokens.largest_token == 1
    contexts = pa.table({"context": [0], "text": [""], "tokens": [[3, 900, 2]]}, schema=pack.SCHEMAS["contexts"])
    assert pack.Pack(made.manifest, contexts, made.requests, made.documents).request_tokens.largest_token == 900
    empty = pack.Pack(made.manifest, made.contexts.slice(0, 0), made.requests.slice(0, 0), made.documents)
    assert empty.request_tokens.largest_token == 0


def test_a_pack_takes_the_place_of_another_whole(tmp_path):
    one, other = packed([(task_row("a"), docs(2))]), packed([(task_row("b"), docs(3))])
    pack.save(one, tmp_path / "p")
    (tmp_path / "p" / "left.txt").write_text("of before")
    pack.save(other, tmp_path / "p")
    assert pack.load(tmp_path / "p").hash == other.hash
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "contexts.parquet", "documents.parquet", "manifest.json", "p", "requests.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "maybe"}, "--bos 'maybe' must be auto, always or never"),
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"max_context": 0}, "--max-context 0 must be at least 1"),
        ({"tfds": Path("x")}, "--benchmarks and --tfds exclude each other"),
    ],
)
def test_wrong_options_of_a_pack_are_refused(options, message, benchmarks, tokenizers, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare_pack("piqa", tokenizers["bos"], tmp_path / "p", benchmarks=benchmarks, **options)
    assert not (tmp_path / "p").exists()


def test_options_of_a_pack_are_written_into_it_and_the_smallest_are_taken(benchmarks, tokenizers, tmp_path):
    options = {"bos": "always", "limit": 1, "max_context": 1}
    made = prepare_pack("piqa@1,wikitext", tokenizers["plain"], tmp_path / "p", benchmarks=benchmarks, **options)
    assert {name: made.manifest[name] for name in options} == options
    assert made.manifest["suite"] == "custom" and made.documents.num_rows == 2
    bos = open_tokenizer(tokenizers["plain"]).bos_token_id
    assert made.context_tokens[0][0] == bos and made.continuation_tokens[2][0] == bos
    assert not made.manifest["tokenizer"]["adds_bos"]  # by default, whatever the policy
    never = prepare_pack("piqa", tokenizers["bos"], tmp_path / "q", benchmarks=benchmarks, limit=1, bos="never")
    assert never.manifest["tokenizer"]["adds_bos"] and never.context_tokens[0][0] != bos
    assert never.manifest["tokenizer"]["tokenizer_hash"] == made.manifest["tokenizer"]["tokenizer_hash"]


def test_a_chance_of_nothing_is_kept(benchmarks, tokenizers, tmp_path):
    file = tmp_path / "s.yaml"
    for given, expected in (("0", 0.0), ("0.4", 0.4), ("1", 1.0)):
        file.write_text(f"tasks: [{{task: piqa, chance: {given}}}]")
        made = prepare_pack(file, tokenizers["bos"], tmp_path / "p", benchmarks=benchmarks, limit=1)
        assert made.tasks[0]["chance"] == expected
