"""A bare SentencePiece BPE model (Llama's tokenizer.model) as one of `tokenizers` that gives SentencePiece's own ids.

transformers 5 converts such a file without the leading space mark and with other merges of spaces, which gives other
ids than models were trained on.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from fineline_jax.errors import UserError

_BPE = 2
_SPACE = "\u2581"


def convert(file: Path, path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer that gives the ids of the model in `file`, and its special tokens by role (bos_token, …).

    Runs of spaces become one where the model was trained so (OpenLLaMA v1). `<s>` written in a text is BOS, as for
    every Hugging Face tokenizer; SentencePiece itself would spell it out. Raises UserError, which calls the file
    `path`, if it is not a BPE model or changes characters of its text."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # protobuf's and SentencePiece's own
        raise UserError(f"{path}: not a SentencePiece model ({error}); give another tokenizer") from None
    if proto.trainer_spec.model_type != _BPE or proto.normalizer_spec.precompiled_charsmap:
        raise UserError(f"{path}: only BPE models that leave characters as they are are read; give its tokenizer.json")
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    ranks = {
        piece: (-model.get_score(i), i)
        for i, piece in enumerate(pieces)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    # SentencePiece joins the neighbours whose union scores best, whatever two parts it is made of.
    merges = [
        (rank, cut, (piece[:cut], piece[cut:]))
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[pair for _, _, pair in sorted(merges)],
        unk_token=pieces[model.unk_id()],
        fuse_unk=True,
        byte_fallback=any(model.is_byte(i) for i in range(len(pieces))),
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex(_SPACE), " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    named = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    special = {role: pieces[i] for role, i in named.items() if i >= 0}
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special.values()])
    return tokenizer, special


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    """As SentencePiece's `normalizer.cc`, without a map of characters. \\A and \\z: ^ and $ would fit at every line."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
    if spec.remove_extra_whitespaces:
        leading, runs = normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")
        steps = [leading, runs, *steps, normalizers.Replace(Regex(rf"{_SPACE}+\z"), "")]
    return steps
