"""What `mutmut run` left in `mutants/`: counts by file, and each mutant that no test noticed.

    python tools/mutants.py [FOLDER]

FOLDER is where mutmut ran, else this one. Puts the counts of the files that were run as a whole
into docs/mutants.md, with the commit, and prints the changed lines of each mutant that survived or
that no test reaches. Exits 1 where less than 95 % were noticed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from compose.results.environment import git_commit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mutants.md"
HEAD = """\
# Mutants

A mutant is the source code with one changed expression or statement. `make mutants` creates mutants
with mutmut (configured in `pyproject.toml`) and runs the quick tests that execute the changed code.
Only files that compute published numbers are changed. If a mutant passes all tests, either a test
is missing or the change has no effect. `make mutants MUTANTS="gateskip.model.compute*"` tests the
mutants of one file and prints the mutants that passed all tests.

| file | mutants | noticed by a test | share | commit |
|---|---|---|---|---|
"""
NOTICED = ("killed", "timeout", "segfault")
WANTED = 0.95


class Counts(NamedTuple):
    """The mutants of one file at one commit."""

    mutants: int
    noticed: int
    commit: str


def page(counts: dict[str, Counts]) -> str:
    """docs/mutants.md with these counts by file."""
    lines = [_line(f"`{file}`", own) for file, own in sorted(counts.items())]
    total = sum(own.mutants for own in counts.values())
    together = Counts(total, sum(own.noticed for own in counts.values()), "")
    return HEAD + "\n".join([*lines, _line("together", together)]) + "\n"


def counts_of(text: str) -> dict[str, Counts]:
    """The counts by file that a page holds."""
    rows = re.findall(r"^\| `(.+)` \| (\d+) \| (\d+) \| .+ \| (\w+) \|$", text, re.MULTILINE)
    return {file: Counts(int(all_), int(noticed), commit) for file, all_, noticed, commit in rows}


def _line(name: str, own: Counts) -> str:
    share = own.noticed / own.mutants if own.mutants else 0.0
    return f"| {name} | {own.mutants} | {own.noticed} | {share:.1%} | {own.commit} |"


def _statuses() -> Iterator[tuple[str, dict[str, str]]]:
    """Source file -> the status of each of its mutants, for those in `mutants/`."""
    from mutmut.stats import status_by_exit_code

    for path in sorted(Path("mutants").rglob("*.py.meta")):
        codes = json.loads(path.read_text("utf-8"))["exit_code_by_key"]
        source = path.relative_to("mutants").as_posix().removesuffix(".meta")
        yield source, {name: status_by_exit_code[code] for name, code in codes.items()}


def _survivor(source: str, mutant: str, status: str) -> str:
    """The lines that a mutant takes away and puts in."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    lines = get_diff_for_mutant(mutant).splitlines()
    changed = [x for x in lines if x[:1] in ("+", "-") and x[:3] not in ("+++", "---")]
    return "\n".join([f"{source}, {mutant.rpartition('.')[2]}, {status}", *changed, ""])


def main(folder: Path) -> int:
    """Write the counts of one run and print its survivors; 0 where enough was noticed."""
    os.chdir(folder)
    counts, run = counts_of(PAGE.read_text("utf-8")), Counter[str]()
    commit = (git_commit() or "unknown")[:7]
    for source, statuses in _statuses():
        tried = {name: status for name, status in statuses.items() if status != "not checked"}
        noticed = sum(status in NOTICED for status in tried.values())
        run.update(mutants=len(tried), noticed=noticed)
        for name, status in tried.items():
            if status not in NOTICED:
                print(_survivor(source, name, status))
        if tried and len(tried) == len(statuses):
            counts[source] = Counts(len(tried), noticed, commit)
    PAGE.write_text(page(counts), "utf-8")
    print(f"{run['noticed']} of {run['mutants']} mutants were noticed")
    return 0 if run["noticed"] >= WANTED * max(1, run["mutants"]) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()))
