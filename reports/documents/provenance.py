"""Where a number comes from: the line under each table."""

from __future__ import annotations

from compose.results.schema import Results

PACKAGE = "gateskip-compose"
WANTED = ("processor", "versions", "git_commit", "date")


def provenance(results: Results, link: str) -> str:
    """One line: the results file, the machine, the version, the commit, the day and the command."""
    facts = results.environment
    version = facts.get("versions", {}).get(PACKAGE, "?")
    commit, day = str(facts.get("git_commit", "?"))[:12], str(facts.get("date", "?"))[:10]
    threads = facts.get("threads", "?")
    machine = f"{facts.get('processor', '?')}, {threads} threads"
    shown = link.rpartition("../")[2]
    measured = f"version {version}, commit {commit}, {day}"
    return f"[{shown}]({link}): {machine}, {measured}, `{results.command}`"


def missing_provenance(results: Results) -> list[str]:
    """What a published result has to say of itself and does not."""
    facts = results.environment
    missing = [name for name in WANTED if not facts.get(name)]
    if not facts.get("versions", {}).get(PACKAGE):
        missing.append("version")
    if not all(cell.fingerprint for cell in results.measured):
        missing.append("fingerprint")
    return missing + ([] if results.command else ["command"])
