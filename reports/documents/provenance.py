"""Where a number comes from: the line under each table, and how old a results file is."""

from __future__ import annotations

import subprocess
from pathlib import Path

from compose.results.schema import Results

MEASURED_BY = ("gateskip", "compose/bench")
"""Folders whose changes can change a published number; kernels are in the first."""

MOST_COMMITS = 20
"""Commits to those folders after which a result is too old to be published."""

WANTED = ("processor", "versions", "git_commit", "date")


def provenance(results: Results, link: str) -> str:
    """One line: the results file, the machine, the commit, the day and the command."""
    facts = results.environment
    commit, day = str(facts.get("git_commit", "?"))[:12], str(facts.get("date", "?"))[:10]
    threads = facts.get("threads", "?")
    machine = f"{facts.get('processor', '?')}, {threads} threads"
    shown = link.rpartition("../")[2]
    return f"[{shown}]({link}): {machine}, commit {commit}, {day}, `{results.command}`"


def missing_provenance(results: Results) -> list[str]:
    """What a published result has to say of itself and does not."""
    missing = [name for name in WANTED if not results.environment.get(name)]
    return missing + ([] if results.command else ["command"])


def commits_since(commit: str, root: Path) -> int | None:
    """Commits that touched `MEASURED_BY` since `commit`; None where git does not know it."""
    asked = commit.removesuffix("-dirty")
    counted = _git(root, "rev-list", "--count", f"{asked}..HEAD", "--", *MEASURED_BY)
    return None if counted is None else int(counted)


def is_shallow(root: Path) -> bool:
    """Whether the clone lacks history (or is no clone at all)."""
    return _git(root, "rev-parse", "--is-shallow-repository") != "false"


def _git(root: Path, *words: str) -> str | None:
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
