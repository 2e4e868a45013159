"""Which extra of this project installs a library that could not be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

from compose.errors import UserError

EXTRAS: dict[str, tuple[str, ...]] = {
    "compress": (
        "accelerate",
        "bitsandbytes",
        "fsspec",
        "gguf",
        "gptqmodel",
        "huggingface_hub",
        "jinja2",
        "optimum",
        "peft",
        "psutil",
        "pydantic",
        "pydantic_core",
        "rich",
        "ruamel",
        "torch_pruning",
        "typer",
    ),
    "eval": ("datasets", "lm_eval", "pyarrow", "scipy"),
    "report": ("markupsafe", "matplotlib"),
    "ray": ("ray",),
    "tensorboard": ("tensorboard",),
    "autoround": ("auto_round",),
    "gpu": ("triton",),
    "serve": ("llguidance", "prometheus_client", "starlette", "uvicorn"),
}
"""Top-level import names by the extra of pyproject.toml that installs them.

pyproject.toml has names of distributions, and what is not installed cannot be asked for its import
names. A library of two extras stands under the first.
"""


def leave_out_torchao() -> None:
    """Let this process not find torchao, which nothing here uses. gptqmodel installs it, and
    transformers would import it, in a fifth of the time that a process takes to start."""
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]


def extra_of(module: str) -> str | None:
    """The extra that installs a module, by its dotted name; None for a module of no extra."""
    top = module.partition(".")[0]
    return next((extra for extra, names in EXTRAS.items() if top in names), None)


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """The user's mistake behind `error`, with the extra to install; None where no extra has it."""
    extra = extra_of(error.name or "")
    if extra is None:
        return None
    fix = command(extra)
    return UserError(str(error), fix=None if fix in str(error) else fix)


def require(*extras: str, but: Iterable[str] = ()) -> None:
    """Check, without importing them, that all libraries of these extras can be found, but those of
    which one can do without.

    Raises:
        UserError: for the first extra with a library that is not installed.
    """
    names = dict.fromkeys(name for extra in extras for name in EXTRAS[extra])
    for error in not_installed(name for name in names if name not in but):
        raise error


def not_installed(names: Iterable[str]) -> list[UserError]:
    """An error for each extra that has some of these libraries, by import name, and is not
    installed whole. Nothing is imported."""
    absent: dict[str | None, list[str]] = {}
    for name in dict.fromkeys(names):
        if find_spec(name) is None:
            absent.setdefault(extra_of(name), []).append(name)
    return [_not_installed(extra, libraries) for extra, libraries in absent.items()]


def _not_installed(extra: str | None, libraries: list[str]) -> UserError:
    which = "library" if len(libraries) == 1 else "libraries"
    verb = "is" if len(libraries) == 1 else "are"
    fix = f"pip install {' '.join(libraries)}" if extra is None else command(extra)
    return UserError(f"the {which} {', '.join(libraries)} {verb} not installed", fix=fix)


def command(extra: str) -> str:
    """What installs an extra."""
    return f"pip install 'gateskip-compose[{extra}]'"
