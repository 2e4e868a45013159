"""What a reader of the project must never meet in it: machine paths, registry hosts, bulk."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST_BYTES = 1 << 20
TRAINED_BYTES = 10 << 20  # shipped gates, with their shortcuts, and draft networks

# Put together here, so that this file passes its own test.
_HOSTS = [
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("npmjs", "org"),
    ("crates", "io"),
    ("rubygems", "org"),
    ("proxy.golang", "org"),
    ("debian", "org"),
    ("download.pytorch", "org"),
]
HOSTS = re.compile("|".join(re.escape(f"{name}.{tld}") for name, tld in _HOSTS))
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.~-])/" + "work" + r"/\w",
            r"(?<![\w.~-])/" + "root" + r"/[\w.]",
            r"(?<![\w.~-])/" + "home" + r"/[a-z]\w*/",
            r"(?<![\w.~-])/" + "Users" + r"/\w+/",
            r"[A-Z]:\\" + "Users" + r"\\",
        ]
    )
)


def _project_files() -> list[Path]:
    """What git tracks or would track; outside a checkout, all but hidden and made folders."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout.decode()
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        made = {"runs", "exports", "build", "dist"}
        paths = [
            p
            for p in ROOT.rglob("*")
            if not any(
                part.startswith(".") or part in made or part.endswith(".egg-info")
                for part in p.relative_to(ROOT).parts
            )
        ]
    return sorted(p for p in paths if p.is_file() and "__pycache__" not in p.parts)


def _lines() -> list[tuple[str, str]]:
    """("path:line", text) of every text file; a file that is not UTF-8 is data and is left out."""
    found = []
    for path in _project_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT).as_posix()
        found += [(f"{name}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]
    return found


def test_no_machine_paths() -> None:
    above = str(ROOT.parent)
    # A checkout directly below the root or a one-letter folder would match innocent text.
    here = re.compile(re.escape(above) + "/") if len(above) > 4 else None
    bad = [
        f"{where}: {line.strip()[:120]}"
        for where, line in _lines()
        if MACHINE.search(line) or (here and here.search(line))
    ]
    assert not bad, "\n" + "\n".join(bad)


def test_no_registry_hosts() -> None:
    bad = [f"{where}: {line.strip()[:120]}" for where, line in _lines() if HOSTS.search(line)]
    assert not bad, "\n" + "\n".join(bad)


def test_no_bulk() -> None:
    sizes = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in _project_files()}
    trained = {name for name in sizes if name.startswith(("pipelines/gates/", "pipelines/drafts/"))}
    limits = {name: TRAINED_BYTES if name in trained else LARGEST_BYTES for name in sizes}
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}


def test_the_ignored_and_the_kept() -> None:
    """Runs and exports stay out of git; published reports and shipped gates go in."""

    def ignored(name: str) -> bool:
        try:
            done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False)
        except OSError:
            pytest.skip("git is not installed")
        if done.returncode > 1:
            pytest.skip("not a git checkout")
        return done.returncode == 0

    for name in (".venv/bin/python", "runs/quickstart/results.json", "exports/shipped/config.json"):
        assert ignored(name), name
    for name in (
        "reports/published/peers/report.md",
        "reports/published/peers/results.json",
        "pipelines/gates/smollm2.safetensors",
        "compose/data/prompts.jsonl",
    ):
        assert not ignored(name), name


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("cd /" + "work/main && make", True),
        ("see /" + "home/ada/models", True),
        ("open(r'C:\\" + "Users\\ada')", True),
        ("the framework/workers of compose", False),
        ("~/.cache/gateskip-compose", False),
        ("a route such as api/home/page/", False),
    ],
)
def test_the_guard_sees(line: str, bad: bool) -> None:
    assert bool(MACHINE.search(line)) is bad
