"""What a Beam worker does with one item, and what is made of all items' reports; Beam itself need not be installed."""

import dataclasses
import importlib
import json
import pickle
import random
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from data_examples import amber, jsonl, letters_tokenizer

from fineline_jax import progress
from fineline_jax.data.corpora import prepare_amber, prepare_text
from fineline_jax.data.shards import Shard, Written
from fineline_jax.errors import UserError


class Stage:
    """Stands for beam.Create, Reshuffle and Map: `|` and `>>` as Beam has them."""

    def __init__(self, change: Callable[[list], list]):
        self.change = change

    def __rrshift__(self, label: str) -> "Stage":
        return self


class Pipeline:
    def __init__(self, options):
        self.stages: list[Stage] = []

    def __or__(self, stage: Stage) -> "Pipeline":
        self.stages.append(stage)
        return self

    def run(self) -> types.SimpleNamespace:
        items: list = []
        for stage in self.stages:
            items = stage.change(items)
        return types.SimpleNamespace(wait_until_finish=lambda: None)


class Options:
    def __init__(self, flags: list[str]):
        self.flags = flags

    def get_all_options(self, retain_unknown_options: bool = False) -> dict:
        known = {"runner": next((flag[9:] for flag in self.flags if flag.startswith("--runner=")), None)}
        return known | ({"runer": "x"} if retain_unknown_options and "--runer=x" in self.flags else {})


@pytest.fixture
def beam(monkeypatch):
    """Our module beside a runner in this process: each item is sent as bytes, in another order, and started twice."""

    def shuffled(items: list) -> list:
        return random.Random(1).sample([pickle.loads(pickle.dumps(item)) for item in items * 2], 2 * len(items))

    fake = types.ModuleType("apache_beam")
    vars(fake).update(
        Create=lambda items: Stage(lambda _: list(items)),
        Reshuffle=lambda: Stage(shuffled),
        Map=lambda function: Stage(lambda items: [function(item) for item in items]),
        Pipeline=Pipeline,
    )
    options = types.ModuleType("apache_beam.options.pipeline_options")
    vars(options)["PipelineOptions"] = Options
    for name, module in (
        ("apache_beam", fake),
        ("apache_beam.options", types.ModuleType("apache_beam.options")),
        ("apache_beam.options.pipeline_options", options),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fineline_jax.data.beam", raising=False)
    yield importlib.import_module("fineline_jax.data.beam")
    sys.modules.pop("fineline_jax.data.beam", None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_chunks_are_byte_for_byte_those_of_the_plain_path_from_any_folder(beam, tmp_path, monkeypatch) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, i, 7] for i in range(5 + c)]) for c in range(4)]
    prepare_amber(files, tmp_path / "plain", sequence_length=2)
    monkeypatch.chdir(tmp_path)
    written = beam.write_shard

    def elsewhere(shard: Shard) -> Written:
        """A worker has a folder of its own."""
        monkeypatch.chdir("/")
        try:
            return written(shard)
        finally:
            monkeypatch.chdir(tmp_path)

    monkeypatch.setattr(beam, "write_shard", elsewhere)
    named = [Path(file.name) for file in files]
    made = prepare_amber(named, Path("beam"), sequence_length=2, beam_options="")
    assert made.windows == {f"chunk_{c:03d}": 5 + c for c in range(4)}
    assert contents(tmp_path / "plain") == contents(tmp_path / "beam")
    assert not list(tmp_path.glob(".*"))


def test_every_path_of_an_item_holds_on_another_machine(beam) -> None:
    here = Path.cwd()
    sent = beam._absolute(Shard(Path("out"), (("train", Path("a")), ("validation", Path("/b"))), {"x": 1}, Path("t")))
    assert sent == Shard(here / "out", (("train", here / "a"), ("validation", Path("/b"))), {"x": 1}, here / "t")
    assert beam._absolute(Shard(Path("out"), (), {})).tokenizer is None


def test_each_text_file_is_a_stream_of_its_own(beam, tmp_path) -> None:
    tokenizer = letters_tokenizer(tmp_path)
    # 8, 3 and 5 tokens with their ends; windows of 3.
    files = [jsonl(tmp_path / f"{n}.jsonl", texts) for n, texts in enumerate((["abc", "def"], ["gh"], ["i", "jk"]))]
    prepare_text(files, tmp_path / "beam", tokenizer=tokenizer, sequence_length=2, beam_options="--runner=x")
    metadata = json.loads((tmp_path / "beam" / "metadata.json").read_text())
    assert metadata["packing"] == "file"
    assert metadata["splits"]["train"] == {"documents": 5, "tokens": 16, "windows": 4, "dropped_tokens": 4}
    with pytest.raises(UserError, match="of another packing"):
        prepare_text(files, tmp_path / "beam", tokenizer=tokenizer, sequence_length=2)
    (tmp_path / "a.txt").write_text("abcde\nfghij\n")
    usual = {"tokenizer": tokenizer, "sequence_length": 2, "validation_fraction": 0.5, "beam_options": ""}
    with pytest.raises(UserError, match="each of these is one document; give validation_inputs"):
        prepare_text([tmp_path / "a.txt"], tmp_path / "no", **usual)
    made = prepare_text([tmp_path / "a.txt"], tmp_path / "held", **usual, text_unit="line")
    assert made.windows == {"train": 2, "validation": 2}


def test_the_first_bad_file_is_named_with_the_number_of_others_and_the_good_ones_are_kept(beam, tmp_path) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, c, c]]) for c in range(4)]
    for bad in (2, 1):
        files[bad].write_text("oops\n")
    with pytest.raises(UserError, match=r"train_1\.jsonl:1: not JSON.* \(1 more files have errors\)$"):
        prepare_amber(files, tmp_path / "out", sequence_length=2, beam_options="")
    left = sorted(path.name for path in (tmp_path / ".out.incomplete" / "shards").iterdir())
    assert left == ["chunk_000", "chunk_003"]
    amber(files[1], [[1, 1, 1]])
    with pytest.raises(UserError, match=r"train_2\.jsonl:1: not JSON .* remove the line$"):
        prepare_amber(files, tmp_path / "out", sequence_length=2, beam_options="")


def test_a_worker_that_sees_other_folders_says_so(beam, tmp_path) -> None:
    shard = Shard(tmp_path / "out" / "chunk_000", (("chunk_000", tmp_path / "gone.jsonl"),), {"kind": "amber"})
    with pytest.raises(UserError, match=r"nowhere: not seen by a Beam worker; --out must be"):
        beam._write_and_report((shard, tmp_path / "nowhere" / "0.json"))
    report = tmp_path / "0.json"
    assert "Beam ended without writing it" in beam._outcome(shard, report)
    beam._write_and_report((shard, report))
    assert "gone.jsonl: not seen by a Beam worker; inputs must be" in beam._outcome(shard, report)
    written = Written([{"name": "x"}], {"train": {"windows": 3}})
    report.write_text(json.dumps(dataclasses.asdict(written)))
    assert beam._outcome(shard, report) == written


def test_every_run_has_its_own_folder_of_reports(beam, tmp_path, monkeypatch) -> None:
    """An item of a run that was killed may still write its report, which is none of the next run's."""
    folders, counting = [], beam._counting
    monkeypatch.setattr(beam, "_counting", lambda folder, done: folders.append(folder.name) or counting(folder, done))
    for name in "ab":
        source = amber(tmp_path / f"{name}.jsonl", [[1, 2, 3]])
        prepare_amber([source], tmp_path / name, sequence_length=2, beam_options="")
    assert len(set(folders)) == 2


def test_done_files_are_counted_while_others_are_written(beam, tmp_path, monkeypatch) -> None:
    counted: list[int] = []
    (tmp_path / "x.incomplete").touch()
    waits = iter([1, 0, 2])

    class Ended:
        """The clock of the counting thread: at each look, so many reports more."""

        def wait(self, seconds: float) -> bool:
            assert seconds == 2.0
            for _ in range(next(waits, 0)):
                (tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json").touch()
            return len(counted) == 3

        def set(self) -> None:
            pass

    monkeypatch.setattr(progress, "threading", types.SimpleNamespace(Event=Ended, Thread=threading.Thread))
    with beam._counting(tmp_path, counted.append):
        pass
    assert counted == [1, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [("--runer=x", "unknown: --runer"), ("runner=x", "unknown: runner=x"), ("--runner='", "No closing quotation")],
)
def test_options_that_beam_would_drop_are_refused(beam, options: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--beam-options=.*: {message}"):
        beam._pipeline(options)


def test_another_runners_own_options_are_left_to_beam(beam) -> None:
    beam._pipeline("--runner=FlinkRunner --runer=x")
    beam._pipeline("")
    with pytest.raises(UserError, match="unknown: --runer"):
        beam._pipeline("--runner=DirectRunner --runer=x")
