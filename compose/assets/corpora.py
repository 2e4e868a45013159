"""Plain text out of corpora: a mix to calibrate on, and held-out text to measure on."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PIECE = 2400  # characters in a row of calibration-text: somewhat more than 512 tokens of English
STUB = 50  # articles below so many characters say nothing
CODE_SHARE = 6  # of so many rows of code one is among training-text
SPACED_SHARE = 5  # of so many rows of other text one is written with spaces around all signs
HELD_OUT = 10  # of so many articles in a row, all or none are held out: neighbours are alike


def calibration_rows(folder: Path) -> list[str]:
    """Rows of about PIECE characters, so mixed that every beginning has the whole's proportions."""
    articles, _ = split_held_out(_articles(folder))
    sources = [
        list(pieces(articles)),
        list(pieces(_documents(folder / "c4.utf8", "\n"))),
        list(pieces([(folder / "technical.utf8").read_text(encoding="utf-8")])),
        list(pieces(_documents(folder / "tiny.utf8", "<|endoftext|>"))),
    ]
    return interleave(sources)


def training_rows(folder: Path) -> list[str]:
    """Rows of calibration_rows, with code among them, and some written as `spaced` writes.

    Gates that are trained on one style of writing keep more branches, and lose more quality, on
    text in another style.
    """
    code = list(pieces([(folder / "code.utf8").read_text(encoding="utf-8")]))[::CODE_SHARE]
    last = SPACED_SHARE - 1
    rows = enumerate(calibration_rows(folder))
    return interleave([[spaced(row) if i % SPACED_SHARE == last else row for i, row in rows], code])


def spaced(text: str) -> str:
    """English as tokenizers of the 2010s left it in many corpora, all signs apart.

    >>> spaced("The well-known (1,024-bit) key, he said, is the city's.")
    "The well @-@ known ( 1 @,@ 024 @-@ bit ) key , he said , is the city 's ."
    """
    for sign, between in (("-", r"\w"), (",", r"\d"), (r"\.", r"\d")):
        apart = f" @{sign[-1]}@ "
        text = re.sub(rf"(?<={between}){sign}(?={between})", apart, text)
    text = re.sub(r"(?<!@)([,;:!?()\"\[\]])(?!@)", r" \1 ", text)
    text = re.sub(r"\.(?=\s|$)", " .", text)
    text = re.sub(r"(?<=\w)'(?=s\b)", " '", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def heldout_rows(folder: Path) -> list[str]:
    """The articles that calibration_rows leaves out, as one text."""
    return ["\n\n".join(split_held_out(_articles(folder))[1])]


def split_held_out(articles: Sequence[str]) -> tuple[list[str], list[str]]:
    """Articles to learn from, and a tenth to be measured on: every tenth run of ten."""
    training: list[str] = []
    held: list[str] = []
    for index, article in enumerate(articles):
        (held if index // HELD_OUT % HELD_OUT == HELD_OUT - 1 else training).append(article)
    return training, held


def _documents(path: Path, end: str) -> list[str]:
    return path.read_text(encoding="utf-8").split(end)


def _articles(folder: Path) -> list[str]:
    """Encyclopedia articles without the tag before and after each, and without stubs."""
    tagged = _documents(folder / "wiki.utf8", "</doc>")
    plain = [html.unescape(text.strip().partition("\n")[2]).strip() for text in tagged]
    return [text for text in plain if len(text) > STUB]


def pieces(documents: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Pack short documents together and cut long ones at a space, to about `size` characters."""
    waiting = ""
    for document in documents:
        waiting = f"{waiting}\n\n{document.strip()}".strip()
        while len(waiting) >= size:
            cut = waiting.rfind(" ", size // 2, size)
            cut = size if cut < 0 else cut
            yield waiting[:cut].strip()
            waiting = waiting[cut:].strip()
    if len(waiting) > STUB:
        yield waiting


def interleave(sources: Sequence[Sequence[str]]) -> list[str]:
    """All rows, each source spread evenly over the whole and in its own order."""
    placed = [
        ((index + 0.5) / len(rows), number, row)
        for number, rows in enumerate(sources)
        for index, row in enumerate(rows)
    ]
    return [row for _, _, row in sorted(placed, key=lambda place: place[:2])]


def join_wikitext(lines: Iterable[str]) -> str:
    """WikiText's lines as the single text over which its perplexities are published.

    Published numbers join the data set's rows by a blank line; a row is a line with its line break,
    or nothing where the line is blank.
    """
    rows = [line.rstrip("\n") for line in lines]
    if rows and rows[-1] == "":
        rows.pop()  # what follows a file's last line break
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)
