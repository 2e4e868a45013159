"""Counts the malformed inputs that tests refuse with a message: one line a test, and the sum.

A row is a case of a parametrized test whose name says that something is refused. Files are read as
syntax, so nothing is imported; a table that is not written out as a literal counts as one row.
`python tests/helpers/count_malformed.py` ends with 1 where there are fewer than 250 rows.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1]
REFUSES = re.compile(
    r"refused|refuses|mistake|never_made_up|damage_is_said|is_no_pipeline|is_not_text"
)
WANTED = 250


def rows_of(node: ast.expr, tables: dict[str, ast.expr]) -> int:
    """Entries of a literal, or of a table by name; 1 where they cannot be told."""
    if isinstance(node, ast.Name) and node.id in tables:
        return rows_of(tables[node.id], tables)
    if isinstance(node, ast.Dict):
        return len(node.keys)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        starred = (each.value for each in node.elts if isinstance(each, ast.Starred))
        plain = sum(not isinstance(each, ast.Starred) for each in node.elts)
        return plain + sum(rows_of(each, tables) for each in starred)
    return 1


def counted(file: Path) -> dict[str, int]:
    """Test -> its rows, of all tests in a file that refuse something."""
    module = ast.parse(file.read_text("utf-8"))
    tables: dict[str, ast.expr] = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            tables[node.target.id] = node.value
    found = {}
    tests = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    for test in tests:
        if test.name.startswith("test_") and REFUSES.search(test.name):
            found[f"{file.name}::{test.name}"] = _cases(test, tables)
    return found


def _cases(test: ast.FunctionDef, tables: dict[str, ast.expr]) -> int:
    cases = 1
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            cases *= rows_of(decorator.args[1], tables)
    return cases


def total() -> tuple[dict[str, int], int]:
    """The counts of all test files, and their sum."""
    found: dict[str, int] = {}
    for file in sorted(FOLDER.rglob("test_*.py")):
        found |= counted(file)
    return found, sum(found.values())


def main() -> int:
    """Print the counts."""
    found, rows = total()
    for test, count in found.items():
        print(f"{count:5}  {test}")
    print(f"{rows:5}  malformed inputs, each with its message")
    return 0 if rows >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
