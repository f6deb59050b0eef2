"""The pages that people read, taken apart: commands with what they print, tables, code, numbers in a sentence."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
_BELOW_DOCS = sorted(path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "docs").rglob("*.md"))
PAGES = ("README.md", "ARCHITECTURE.md", *_BELOW_DOCS)
_SMALL = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
WORDS = {word: number for number, word in enumerate(re.findall(r"\w+", _SMALL), start=2)}


def page(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def numbers(name: str, sentence: str) -> list[float]:
    """The numbers in the places of {} of a sentence that stands there once, wherever its lines end: 1,024, fifteen."""
    pattern = sentence.replace("{}", "(##)")
    pattern = re.escape(" ".join(pattern.split())).replace(re.escape("(##)"), r"([\d,]*\.?\d+|[A-Za-z]+)")
    found = list(re.finditer(pattern, " ".join(page(name).split())))
    assert len(found) == 1, f"{name}: {sentence!r} stands there {len(found)} times"
    return [WORDS.get(word.lower()) or float(word.replace(",", "")) for word in found[0].groups()]


def blocks(name: str) -> list[list[str]]:
    """The page's indented blocks, without their indentation of four."""
    found = re.findall(r"(?:^ {4}.*\n(?:\n+(?= {4}))*)+", page(name), flags=re.M)
    return [[line[4:] for line in block.splitlines()] for block in found]


def transcripts(name: str) -> list[tuple[str, list[str]]]:
    """(command behind a $ sign, the lines it prints: up to the next command or the block's end)."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(name):
        printed: list[str] | None = None
        for line in "\n".join(block).replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                printed = []
                found.append((" ".join(line[2:].split()), printed))
            elif line.startswith("fineline "):
                printed = None
            elif printed is not None:
                printed.append(line)
    return [(command, "\n".join(printed).rstrip("\n").split("\n")) for command, printed in found]


def printed_by(name: str, command: str) -> list[str]:
    """The lines under the page's only transcript of a command that begins so."""
    found = [lines for typed, lines in transcripts(name) if typed.startswith(command)]
    assert len(found) == 1, f"{name}: {len(found)} transcripts of {command}"
    return found[0]


def tables(name: str) -> list[list[dict[str, str]]]:
    """The page's tables, rows as {heading: cell}; an empty heading is called by its place."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", page(name), flags=re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        head = [cell or str(place) for place, cell in enumerate(head)]
        assert all(len(row) == len(head) for row in rows), f"{name}: a row of another width under {head}"
        found.append([dict(zip(head, row)) for row in rows])
    return found


def table(name: str, heading: str) -> list[dict[str, str]]:
    """The page's first table with that heading."""
    return next(rows for rows in tables(name) if heading in rows[0])


def ticked(text: str) -> list[str]:
    """What stands in `ticks`."""
    return re.findall(r"`([^`]+)`", text)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page(name), flags=re.M | re.S)
