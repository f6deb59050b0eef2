"""Where a string may be cut so that its pieces, encoded one by one, give the tokens of the whole.

Few-shot prompts repeat the same lines hundreds of times. Where a cut is proven harmless for the tokenizer at hand,
each distinct piece is encoded once; for every other tokenizer, string or position there is no cut, and the string is
encoded as a whole. All cuts are in front of a space or a line break that follows a character which is no white space.

Two kinds of tokenizer are known:

* BPE over the whole text with a space mark (SentencePiece: Llama, OpenLLaMA, Amber, TinyStories). A merge joins two
  neighbours into a piece of the vocabulary, so none crosses a position whose two characters stand side by side in no
  piece; merges on one side then do not see the other.
* Byte-level BPE over the words of a regular expression (GPT-2, GPT-NeoX, Pythia, OLMo, Llama 3, Qwen2). No alternative
  of these expressions matches a non-space followed by a space inside a word, none looks behind, and they look ahead
  only from white space to what follows it. Of the expressions of Llama 3 and Qwen2 one takes line breaks after
  punctuation into its word; there a line break is cut off only after letters and digits.
"""

import dataclasses
import json
import re
import unicodedata
from typing import Any

from tokenizers import Tokenizer

_MARK = "\u2581"
_SOLID = r"!-~\w"
"""Characters that neither Python nor Rust takes for white space."""
_WORD = r"A-Za-z0-9\u4e00-\u9fff"
"""Letters and digits in every version of Unicode."""
_TIKTOKEN = {
    # Llama 3; Qwen2; cl100k as OLMo 2 has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
}


@dataclasses.dataclass(frozen=True)
class SafeCuts:
    """Of one tokenizer."""

    lines: re.Pattern[str]
    """Matches, with no width, where a line break may be cut off."""
    seams: re.Pattern[str]
    """Matches two characters between which a cut may be made."""
    added: re.Pattern[str] | None
    """Texts that become a token before anything else: a string with one is not cut."""
    mark: bool
    """Whether a literal space mark would be taken for a space: such a string is not cut."""
    normalises: bool
    """Whether strings are brought to NFC first: one that is not in it is not cut."""
    rest: Tokenizer
    """Encodes what stands behind a cut: adds neither special tokens nor a leading space mark."""

    def may_cut(self, text: str) -> bool:
        if (self.mark and _MARK in text) or (self.added and self.added.search(text)):
            return False
        return not self.normalises or unicodedata.is_normalized("NFC", text)

    def pieces(self, text: str) -> list[str]:
        """The first is for the tokenizer itself, those behind it for `rest`. [text] where nothing may be cut."""
        return self.lines.split(text) if "\n" in text and self.may_cut(text) else [text]

    def separates(self, left: str, right: str) -> bool:
        """Whether left + right may be cut between the two."""
        seam = left[-1:] + right[:1]
        return self.seams.fullmatch(seam) is not None and self.may_cut(left) and self.may_cut(right)


def find_safe_cuts(tokenizer: Any) -> SafeCuts | None:
    """The safe cuts of a transformers tokenizer; None where no cut is proven harmless."""
    if getattr(tokenizer, "backend_tokenizer", None) is None or not _special_tokens_lead(tokenizer):
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    cuts = _of_space_mark(state) or _of_words(state)
    if cuts is None:
        return None
    (before_space, before_line), rest, mark = cuts
    added = [token for token in state["added_tokens"] if mark or token["content"].strip()]
    blank = [token for token in state["added_tokens"] if token not in added]
    if any(re.search(rf"\S[\s{_MARK}]", token["content"]) for token in added) or any(
        token["lstrip"] or token["rstrip"] or token["single_word"] for token in blank
    ):
        return None
    rest["post_processor"] = None
    # Behind one of these a text begins anew, or the white space is its own.
    behind = "".join(f"(?<!{re.escape(token['content'])})" for token in added)
    seams = [f"{left}{behind}{right}" for left, right in ((before_space, " "), (before_line, "\n")) if left]
    return SafeCuts(
        lines=re.compile(f"(?<={before_line})(?=\n)" if before_line else "(?!)"),
        seams=re.compile("|".join(seams or ["(?!)"])),
        added=re.compile("|".join(re.escape(token["content"]) for token in added)) if added else None,
        mark=mark,
        normalises=not mark and state["normalizer"] is not None,
        rest=Tokenizer.from_str(json.dumps(rest)),
    )


_Cuts = tuple[tuple[str, str], dict[str, Any], bool]
"""(what may stand before a space, before a line break: "" for nothing), state of `rest`, whether it has a space mark"""


def _special_tokens_lead(tokenizer: Any) -> bool:
    """Whether special tokens are put first only."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    return tokenizer("a b")["input_ids"][-len(plain) :] == plain


def _of_space_mark(state: dict[str, Any]) -> _Cuts | None:
    model, rest = state["model"], json.loads(json.dumps(state))
    if state["pre_tokenizer"] is None:
        steps = _steps(state["normalizer"], "normalizers")
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
        if spaces not in steps or any(step not in (spaces, {"type": "Prepend", "prepend": _MARK}) for step in steps):
            return None
        rest["normalizer"] = spaces
    elif state["pre_tokenizer"]["type"] == "Metaspace" and state["normalizer"] is None:
        if state["pre_tokenizer"]["replacement"] != _MARK:
            return None
        rest["pre_tokenizer"]["prepend_scheme"] = "never"
    else:
        return None
    vocabulary, bytes_ = model["vocab"], {f"<0x{i:02X}>" for i in range(256)}
    parts = [part for merge in model["merges"] for part in (merge.split(" ") if isinstance(merge, str) else merge)]
    if model.get("ignore_merges") or not bytes_.isdisjoint(parts):
        return None
    before = []
    for right in (_MARK, "\n"):
        together = {piece[i - 1] for piece in vocabulary for i in range(1, len(piece)) if piece[i] == right}
        # an unknown character could be joined with an unknown one beside it
        known = right in vocabulary or (model.get("byte_fallback") and bytes_ <= vocabulary.keys())
        excluded = "".join(re.escape(character) for character in sorted(together))
        before.append((f"(?![{excluded}])" if excluded else "") + f"[{_SOLID}]" if known else "")
    return (before[0], before[1]), rest, True


def _of_words(state: dict[str, Any]) -> _Cuts | None:
    if any(step != {"type": "NFC"} for step in _steps(state["normalizer"], "normalizers")):
        return None
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and steps[0].get("use_regex", True):
        before = (f"[{_SOLID}]", f"[{_SOLID}]")
    elif (
        len(steps) == 2
        and not steps[1].get("use_regex", True)
        and steps[0]["type"] == "Split"
        and steps[0]["pattern"].get("Regex") in _TIKTOKEN
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
    ):
        before = (f"[{_SOLID}]", f"[{_WORD}]")
    else:
        return None
    return before, json.loads(json.dumps(state)), False


def _steps(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    return list(value[key]) if value["type"] == "Sequence" else [value]
