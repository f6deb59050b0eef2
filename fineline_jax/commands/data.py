"""`fineline data prepare`: text, Amber's token lines or the demo's world to windows of tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from fineline_jax.atomic_files import address_of
from fineline_jax.data.documents import TextUnit

if TYPE_CHECKING:
    from fineline_jax.data.corpora import Prepared

Inputs = Annotated[Positional[tuple[Path, ...]], arg(metavar="INPUT …", help_behavior_hint="(at least one)")]


def prepare_text(
    inputs: Inputs,
    tokenizer: Path,
    out: Path,
    sequence_length: int = 2048,
    bos: bool = False,
    eos: bool = True,
    validation_inputs: tuple[Path, ...] = (),
    validation_fraction: float = 0.0,
    text_key: str = "text",
    text_unit: TextUnit = "file",
    skip_bad_lines: float = 0.0,
    beam_options: str | None = None,
) -> None:
    """Tokenize documents and pack them into windows of sequence_length + 1 tokens.

    Args:
        inputs: Files or folders of .jsonl (one {"text": ...} per line), .parquet or .txt, also .gz or .zst.
        tokenizer: Folder with tokenizer.json or tokenizer.model, or one of these files.
        out: Folder to write, also in a bucket, gs://… or s3://….
        sequence_length: Tokens the model is fed per window.
        bos: BOS before each document (OpenLLaMA: yes, Amber: no).
        eos: EOS after each document (both: yes).
        validation_inputs: Files or folders of the validation split.
        validation_fraction: Share of the documents that go to the validation split instead.
        text_key: Key of the text in a .jsonl line, column in a .parquet file.
        text_unit: What one document is in a .txt file.
        skip_bad_lines: Largest share of lines without a text that may be left out; they are counted, and the first ten
            named. Default: the first one is an error.
        beam_options: Pack each input file by itself, in parallel on Apache Beam with these options; written with
            the = sign: --beam-options="--runner=FlinkRunner --flink_master=HOST:8081". Needs the `beam` extra.
    """
    options = dict(locals())
    from fineline_jax.data.corpora import prepare_text as write

    _say_prepared(write(**options))


def prepare_amber(
    inputs: Inputs,
    out: Path,
    tokenizer: Path | None = None,
    vocab_size: int = 32_000,
    sequence_length: int = 2048,
    validation_inputs: tuple[Path, ...] = (),
    processes: int = 1,
    beam_options: str | None = None,
) -> None:
    """Token lines as Amber's chunks have them, {"token_ids": [2049 ints]}: one split per file, order kept.

    Args:
        inputs: The chunk files, in training order.
        out: Folder to write, also in a bucket, gs://… or s3://….
        tokenizer: Folder whose files are copied beside the data, so that scoring finds them.
        vocab_size: Ids must be smaller.
        sequence_length: Tokens the model is fed per window; a line has one more.
        validation_inputs: Files of the validation split.
        processes: Files converted at a time.
        beam_options: Convert the files on Apache Beam with these options instead; written with the = sign:
            --beam-options="--runner=FlinkRunner --flink_master=HOST:8081". Needs the `beam` extra.
    """
    options = dict(locals())
    from fineline_jax.data.corpora import prepare_amber as write

    _say_prepared(write(**options))


def prepare_world(out: Path = Path("data/world"), seed: int = 0) -> None:
    """The demo's synthetic world: corpus, tokenizer, and its benchmarks in OUT/benchmarks.

    Args:
        out: Folder to write, of this machine: scoring reads the benchmarks from it.
        seed: Chooses names, facts, questions and text.
    """
    from fineline_jax.demo import prepare_world as write

    _say_prepared(write(out, seed))


def _say_prepared(made: "Prepared") -> None:
    counts = ", ".join(f"{split}: {count:,} windows" for split, count in made.windows.items())
    print(f"{address_of(made.path) or made.path}: {'already prepared' if made.already_done else 'prepared'} ({counts})")
