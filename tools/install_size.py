"""Prints how much disk each extra of gateskip-compose takes once installed, as a Markdown table.

`pip install --dry-run` lists the packages that a new environment would get; nothing is installed.
The sizes are those of the same packages in the environment that runs this program, so run it where
all extras are installed: `make test` makes such an environment in .venv.

    .venv/bin/python tools/install_size.py [EXTRA ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("", "serve", "compress", "eval", "report", "all")
OWN = "gateskip-compose"
TORCH = "torch"
MB = 1e6


def packages(extra: str) -> set[str]:
    """The packages that pip would install for an extra, by their names."""
    what = f"{ROOT}[{extra}]" if extra else str(ROOT)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    ended = subprocess.run([*command, "--report", "-", what], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return {item["metadata"]["name"] for item in json.loads(ended.stdout)["install"]}


def size(package: str) -> int | None:
    """Bytes of a package's files in this environment; None where it is not installed."""
    if package == OWN:
        return bytes_of(
            path for name in ("gateskip", "compose", "reports", "pipelines") for path in files(name)
        )
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None
    return bytes_of(Path(str(found.locate_file(file))) for file in found.files or ())


def files(folder: str) -> Iterable[Path]:
    """The files of one of our own packages."""
    return (path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)


def bytes_of(paths: Iterable[Path]) -> int:
    """What these files hold; compiled Python is left out, because pip makes it anew."""
    return sum(p.stat().st_size for p in paths if p.is_file() and p.suffix != ".pyc")


def main() -> None:
    """Print a row for each extra."""
    print("| extra | packages | MB without torch | MB of torch | largest |\n|---|---:|---:|---:|---|")
    unknown = set()
    for extra in sys.argv[1:] or EXTRAS:
        sizes = {name: size(name) for name in packages(extra)}
        unknown |= {name for name, found in sizes.items() if found is None}
        known = {name: found / MB for name, found in sizes.items() if found is not None}
        torch = known.pop(TORCH, 0)
        largest = sorted(known, key=known.__getitem__, reverse=True)[:3]
        named = ", ".join(f"{name} {known[name]:.0f}" for name in largest)
        row = f"| {extra or 'none'} | {len(sizes)} | {sum(known.values()):.0f} | {torch:.0f} |"
        print(f"{row} {named} |", flush=True)
    if unknown:
        print(f"\nnot installed here, so not counted: {', '.join(sorted(unknown))}")


if __name__ == "__main__":
    main()
