"""What `mutmut run` left in `mutants/`: counts by file, and each mutant that no test noticed.

    python tools/mutants.py [FOLDER]

FOLDER is where mutmut ran, else this one. Prints Markdown: a table, then the changed lines of each
mutant that survived or that no test reaches. The reasons in docs/mutants.md are written by hand.
Exits 1 where less than 95 % were noticed.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

NOTICED = ("killed", "timeout", "segfault")
WANTED = 0.95


def changed(mutant: str) -> list[str]:
    """The lines that a mutant takes away and puts in."""
    lines = get_diff_for_mutant(mutant).splitlines()
    return [x for x in lines if x[:1] in ("+", "-") and x[:3] not in ("+++", "---")]


def main(folder: Path) -> int:
    """Print the report of one run; 0 where enough was noticed."""
    os.chdir(folder)
    total, noticed = 0, 0
    rows, left = [], []
    for path in sorted(Path("mutants").rglob("*.py.meta")):
        codes = json.loads(path.read_text("utf-8"))["exit_code_by_key"]
        status = {name: status_by_exit_code[code] for name, code in codes.items()}
        tried = {name: each for name, each in status.items() if each != "not checked"}
        if not tried:
            continue
        source = path.relative_to("mutants").as_posix().removesuffix(".meta")
        counts = Counter(tried.values())
        own = sum(counts[each] for each in NOTICED)
        total, noticed = total + len(tried), noticed + own
        rows.append(
            f"| `{source}` | {len(tried)} of {len(status)} | {own} | {own / len(tried):.1%} |"
        )
        for name, each in tried.items():
            if each not in NOTICED:
                body = "\n".join(changed(name))
                left.append(
                    f"{source}, {name.rpartition('.')[2]}, {each}\n\n```diff\n{body}\n```\n"
                )
    print("| file | mutants run | noticed | share |\n|---|---|---|---|", *rows, sep="\n")
    share = noticed / total if total else 0.0
    print(f"| together | {total} | {noticed} | {share:.1%} |\n", *left, sep="\n")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()))
