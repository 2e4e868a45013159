"""Prints how much disk space each extra of gateskip-compose takes, as a Markdown table.

    .venv/bin/python tools/install_size.py [EXTRA ...]      (after `make test`, which makes .venv)

Packages are those that each extra requires, and their requirements in turn. Sizes are those of the
packages' files in the environment that runs this program, compiled Python (.pyc) left out.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from core_alone import closure

OWN = "gateskip-compose"
EXTRAS = ("", "serve", "compress", "eval", "report", "all")
MB = 1e6
LARGEST = 4  # packages that are named


def size(package: str) -> float | None:
    """MB of an installed package; None where it is not installed."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None
    paths = [Path(str(found.locate_file(file))) for file in found.files or ()]
    return sum(p.stat().st_size for p in paths if p.suffix != ".pyc" and p.is_file()) / MB


def main() -> None:
    """Print a row for each extra."""
    print("| extra | packages | MB without torch | MB of torch | largest packages, MB |")
    print("|---|---:|---:|---:|---|")
    missing = set()
    for extra in sys.argv[1:] or EXTRAS:
        sizes = {name: size(name) for name in closure([f"{OWN}[{extra}]"]) - {OWN}}
        missing |= {name for name, found in sizes.items() if found is None}
        known = {name: found for name, found in sizes.items() if found is not None}
        torch = known.pop("torch")
        largest = sorted(known, key=known.__getitem__, reverse=True)[:LARGEST]
        named = ", ".join(f"{name} {known[name]:.0f}" for name in largest)
        row = f"| {extra or 'none'} | {len(sizes)} | {sum(known.values()):.0f} | {torch:.0f} |"
        print(f"{row} {named} |")
    if missing:
        print(f"\nnot installed here, and not counted: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
