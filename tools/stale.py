"""What has changed since each published run, in what it measured: `make stale`.

A line for each run of reports/published: its version, commit and day, and how many definitions of
today's measuring code compute something that no file of that commit did, by file. A moved file and
a mended comment count as nothing (compose/planning/fingerprint.py). The exit code is 0.
"""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compose.planning.fingerprint import (
    PACKAGES,
    ROOT,
    code_parts,
    measuring_files,
    project_modules,
)
from compose.results.environment import library_versions
from compose.results.io import load_results
from compose.results.schema import Results
from reports.documents.markers import PUBLISHED
from reports.documents.provenance import PACKAGE


def changed_since(commit: str, root: Path = ROOT) -> dict[str, int] | None:
    """File of today's measuring code -> its parts that the commit lacks; None: no such commit."""
    before = _parts_at(commit, root)
    if before is None:
        return None
    modules = project_modules(root)
    new = {
        file.relative_to(root).as_posix(): len(set(code_parts(file, modules)) - before)
        for file in measuring_files(root)
    }
    return {file: count for file, count in new.items() if count}


@functools.cache
def _parts_at(commit: str, root: Path) -> frozenset[bytes] | None:
    """Every part of the packages' files at a commit."""
    command = ["git", "-C", str(root), "archive", commit.removesuffix("-dirty"), *PACKAGES]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files_then:
            files_then.extractall(folder, filter="data")
        modules = project_modules(Path(folder))
        files = (file for file in Path(folder).rglob("*") if file.is_file())
        return frozenset(part for file in files for part in code_parts(file, modules))


def _lines(name: str, results: Results) -> Iterator[str]:
    facts = results.environment
    versions, commit = facts.get("versions", {}), str(facts.get("git_commit", "?"))
    version, day = versions.get(PACKAGE, "?"), str(facts.get("date", "?"))[:10]
    changed = changed_since(commit)
    if changed is None:
        state = "git does not know this commit"
    elif not changed:
        state = "nothing has changed"
    else:
        state = f"{sum(changed.values())} definitions changed in {len(changed)} files"
    yield f"{name}: version {version}, commit {commit[:12]}, {day}: {state}"
    yield from (f"    {file}: {count}" for file, count in (changed or {}).items())
    now = {library: v for library, v in library_versions().items() if library != PACKAGE}
    for library, old in versions.items():
        if now.get(library, old) != old:
            yield f"    {library}: {old} then, {now[library]} now"


def main() -> int:
    """Print every published run; always 0."""
    for file in sorted((ROOT / PUBLISHED).glob("*/results.json")):
        print("\n".join(_lines(file.parent.name, load_results(file))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
