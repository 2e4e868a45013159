"""Old spellings of options, which go on working but are in no help."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from compose.units import parse_bytes


def _in_megabytes(size: str) -> str:
    """A size such as 90MB, 1.5GiB or 120000000 as a number of megabytes."""
    return repr(parse_bytes(size) / 1e6)


RENAMED: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "--budget-minutes": ("--minutes", str),
    "--context": ("--prompt-tokens", str),
    "--max-bytes": ("--at-most-mb", _in_megabytes),
    "--max-kl": ("--at-most-kl", str),
    "--max-perplexity-ratio": ("--at-most-perplexity-ratio", str),
    "--max-resident": ("--at-most-memory-mb", _in_megabytes),
}
"""Old spelling -> the option of now, and its value from the old one's. All of them take a value."""


def with_new_names(args: Sequence[str], options: Collection[str]) -> list[str]:
    """The arguments of a command that has `options`, its old spellings replaced.

    Raises:
        UserError: the value of an old spelling cannot be read.

    >>> with_new_names(["a.yaml", "--budget-minutes", "5"], ["--minutes"])
    ['a.yaml', '--minutes', '5']
    >>> with_new_names(["--max-bytes=90MB", "--", "--max-kl"], ["--at-most-mb", "--at-most-kl"])
    ['--at-most-mb', '90.0', '--', '--max-kl']
    """
    renamed: list[str] = []
    rest = list(args)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        option, has_value, value = word.partition("=")
        new, convert = RENAMED.get(option, ("", str))
        if new not in options:
            renamed.append(word)
            continue
        values = [value] if has_value else rest[:1]
        rest = rest if has_value else rest[1:]
        renamed += [new, *map(convert, values)]
    return renamed + rest
