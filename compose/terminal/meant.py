"""The command or option that someone meant who typed a model, or a name that does not exist."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from compose.errors import UserError, shortened
from compose.terminal.renamed import RENAMED

PIPELINES = (".yaml", ".yml")
OTHER_WORDS: Mapping[str, tuple[str, ...]] = {
    "ask": ("chat", "generate"),
    "benchmark": ("bench",),
    "check": ("validate",),
    "compare": ("report",),
    "compress": ("new",),
    "convert": ("export",),
    "evaluate": ("bench",),
    "create": ("new",),
    "estimate": ("plan",),
    "help": ("--help",),
    "init": ("new",),
    "quantize": ("compress", "new"),
    "serve": ("chat", "generate"),
    "version": ("--version",),
}
"""Words of other tools, and the commands that do this here; those that exist are suggested."""


def refuse_command(name: str, commands: Iterable[str]) -> None:
    """Refuse a command that does not exist, with the one that was meant.

    Raises:
        UserError: always.
    """
    existing = list(commands)
    if Path(name).suffix in PIPELINES:
        fix = f"gateskip run {shlex.quote(name)}"
        raise UserError(f"{name} is a file, not a command", fix=fix)
    refuse_model(name, "not a command")
    words = {command: (command,) for command in existing} | {
        word: tuple(name for name in meant if name in existing or name.startswith("-"))
        for word, meant in OTHER_WORDS.items()
        if word not in existing
    }
    begun = [word for word in words if word.startswith(name)]
    cutoff = 0.0 if begun else 0.65
    close = difflib.get_close_matches(name.lower(), begun or words, n=1, cutoff=cutoff)
    near = words[close[0]] if close else ()
    suggested = " or ".join(f"`gateskip {command}`" for command in near)
    fix = f"did you mean {suggested}?" if near else "`gateskip --help` lists all commands"
    raise UserError(f"there is no command {shortened(repr(name))}", fix=fix)


def refuse_model(source: str, instead_of: str) -> None:
    """Refuse a model, with the commands that compress it or write its pipeline; else do nothing.

    Raises:
        UserError: `source` is a model; `instead_of` ends the message.
    """
    what = _kind_of_model(source)
    if what is None:
        return
    stem = Path(source.partition("@")[0]).name.removesuffix(".gguf")
    file = shlex.quote(f"{stem}.yaml")
    raise UserError(
        f"{source} is {what}, but {instead_of}",
        fix="compress it, or write a pipeline for it:\n"
        f"    gateskip compress {shlex.quote(source)} --to {shlex.quote(f'exports/{stem}')}\n"
        f"    gateskip new {file} --model {shlex.quote(source)}",
    )


def _kind_of_model(source: str) -> str | None:
    """What kind of a model it is, if it is one: an alias, a folder, a GGUF file, or what looks like
    a hub id while no folder here has the owner's name."""
    from compose.artifacts.gguf.file import is_gguf
    from compose.assets import MODELS
    from compose.assets.models.hub import is_hub_id

    path = Path(source).expanduser()
    if path.is_file():
        return "a GGUF file" if is_gguf(source) else None
    if source in MODELS:
        return "a model"
    if (path / "config.json").is_file():
        return "a model folder"
    owner, slash, name = source.partition("/")
    named = bool(slash and owner and name) and Path(name).suffix not in PIPELINES
    if named and is_hub_id(source) and not Path(owner).exists():
        return "perhaps a model of the hub"
    return None


def fix_of_option(
    option: str, near: Sequence[str], others: Mapping[str, Sequence[str]]
) -> str | None:
    """How to put right an option that a command lacks: the commands that have it, else the options
    of the command that are `near` it, else the nearest option of another command; None without any.

    `others` has the options of every command.

    >>> others = {"run": ["--out"], "generate": ["--speculate"]}
    >>> fix_of_option("--speculate", [], others)
    'it is an option of `gateskip generate`'
    >>> fix_of_option("--speculat", [], others)
    'did you mean `gateskip generate --speculate`?'
    """
    option = RENAMED[option][0] if option in RENAMED else option
    having = [f"`gateskip {name}`" for name, options in others.items() if option in options]
    if having:
        return f"it is an option of {', '.join(having)}"
    if near:
        return f"did you mean {' or '.join(near)}?"
    typed = {word: name for name, options in reversed(list(others.items())) for word in options}
    close = difflib.get_close_matches(option, typed, n=1, cutoff=0.75)
    return f"did you mean `gateskip {typed[close[0]]} {close[0]}`?" if close else None
