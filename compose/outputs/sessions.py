"""Speed sessions: rounds of cells whose speed is compared, stored one line per round."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compose.bench.speed.workloads import add_turns
from compose.outputs.run_folder import MEASURE_VERSION, RunFolder
from compose.planning.keys import digest, text_hashes
from compose.planning.plan import Cell, Plan
from compose.store import write_text

Numbers = dict[str, Any]
"""One repeat of one cell; see `compose.bench.speed.turns.add_turns`."""


class Shape(NamedTuple):
    """The shape of a measurement: the number of rows and the length of each prompt, or a category
    of prompts."""

    batch: int
    """Number of prompts at once."""
    context: int
    """Tokens of each prompt; 0 where prompts come by category."""
    category: str = ""


class Round(NamedTuple):
    """One measurement of every cell of a group, in one shape."""

    group: int
    """Index in `Session.groups`."""
    shape: Shape
    number: int
    """Number of the repeat, from 0."""


@dataclass
class Session:
    """Cells measured in interleaved rounds, and the complete rounds.

    Only numbers of one session may be compared, and ratios are taken within a round. The file's
    first line describes the session. Each further line is one round with every cell's numbers, or
    the machine's roofline.
    """

    file: Path
    settings: dict[str, Any]
    """Everything, apart from the cells, on which the numbers depend."""
    members: dict[str, str]
    """Cell name -> cell key."""
    groups: list[list[str]]
    """Names of cells that were in memory together; the baseline is in each group."""
    environment: dict[str, Any]
    command: str
    categories: list[str] = field(default_factory=list)
    """Of the prompts, where these come from a file."""
    rounds: dict[Round, dict[str, Numbers]] = field(default_factory=dict)
    """Round -> cell name -> its numbers."""
    roofline: dict[str, float] | None = None
    """The machine's roofline, measured before the first round."""
    load_averages: list[float] = field(default_factory=list)
    """Load averages of the machine, over the minute before each round."""
    seconds: float = 0.0
    """Wall time of all rounds."""

    @classmethod
    def load(cls, file: Path) -> Session | None:
        """Read a session, without a last line that a kill cut short; None where the file is not a
        session."""
        lines = [_json_or_none(line) for line in _lines(file)]
        if not lines or lines[0] is None or "categories" not in lines[0]:
            return None
        session = cls(file=file, **lines[0])
        for line in lines[1:]:
            if line is not None and "roofline" in line:
                session.roofline = line["roofline"]
            elif line is not None:
                shape = Shape(line["batch"], line["context"], line["category"])
                session._keep(Round(line["group"], shape, line["round"]), line)
        return session

    def _keep(self, timed_round: Round, line: Mapping[str, Any]) -> None:
        self.rounds[timed_round] = line["cells"]
        self.seconds += line["seconds"]
        if line.get("load_average") is not None:
            self.load_averages.append(line["load_average"])

    def create(self) -> None:
        """Write the first line."""
        head = {
            "settings": self.settings,
            "members": self.members,
            "groups": self.groups,
            "environment": self.environment,
            "command": self.command,
            "categories": self.categories,
        }
        write_text(self.file, json.dumps(head) + "\n")

    def add(
        self,
        timed_round: Round,
        cells: dict[str, Numbers],
        seconds: float,
        load_average: float | None = None,
    ) -> None:
        """Store a round: its cells' numbers by name, its duration, and the load of the machine
        before it."""
        group, shape, number = timed_round
        line = {"group": group, **shape._asdict(), "round": number, "seconds": round(seconds, 3)}
        line |= {"load_average": load_average, "cells": cells}
        self._append(line)
        self._keep(timed_round, line)

    def add_roofline(self, roofline: dict[str, float]) -> None:
        """Store the machine's roofline."""
        self._append({"roofline": roofline})
        self.roofline = roofline

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("r+b") as file:
            content = file.read()
            file.seek(content.rfind(b"\n") + 1)  # over a line that a kill cut short
            file.write(json.dumps(line).encode() + b"\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that are timed, the main shape first where there is one."""
        speed = self.settings["speed"]
        if self.categories:
            return [Shape(1, 0, name) for name in self.categories]
        main = speed["prompt_tokens"]
        batches = sorted(speed["batch_sizes"], key=lambda batch: batch != 1)
        others = [context for context in speed["contexts"] if context != main]
        return [
            *(Shape(n, main) for n in batches),
            *(Shape(1, length) for length in others),
        ]

    @property
    def main_shape(self) -> Shape | None:
        """The shape whose numbers stand for a cell; None where the categories together do."""
        return None if self.categories else self.shapes[0]

    def planned(self) -> list[Round]:
        """Every round of the session, in the order in which they run."""
        return [
            Round(group, shape, number)
            for group in range(len(self.groups))
            for shape in self.shapes
            for number in range(self.settings["speed"]["repeats"])
        ]

    def complete(self, timed_round: Round) -> bool:
        """Whether a round has the numbers of every cell of its group."""
        return set(self.rounds.get(timed_round, {})) >= set(self.groups[timed_round.group])

    def finished(self) -> bool:
        """Whether every round is complete."""
        return all(map(self.complete, self.planned()))

    def of_cell(self, name: str) -> dict[Shape, list[Numbers]]:
        """Shape -> the cell's numbers, round by round."""
        return {
            shape: [numbers for numbers, _ in pairs] for shape, pairs in self.paired(name).items()
        }

    def paired(
        self, name: str, other: str | None = None
    ) -> dict[Shape, list[tuple[Numbers, Numbers]]]:
        """Shape -> the numbers of two cells in each round that both have, the other's second.

        Without another cell, the cell is paired with itself.
        """
        by_shape: dict[Shape, list[tuple[Numbers, Numbers]]] = {}
        for timed_round in self.planned():
            cells = self.rounds.get(timed_round, {})
            pair = cells.get(name), cells.get(other or name)
            if pair[0] is not None and pair[1] is not None:
                by_shape.setdefault(timed_round.shape, []).append((pair[0], pair[1]))
        return by_shape

    def main(self, name: str) -> list[Numbers]:
        """The numbers that stand for a cell, round by round."""
        return [numbers for numbers, _ in self.main_paired(name, name)]

    def main_paired(self, name: str, other: str) -> list[tuple[Numbers, Numbers]]:
        """Two cells in the main shape, round by round; with categories, all of them together."""
        by_shape = self.paired(name, other)
        if self.main_shape is not None:
            return by_shape.get(self.main_shape, [])
        rounds = zip(*by_shape.values(), strict=False)
        return [
            (_together([numbers for numbers, _ in pairs]), _together([base for _, base in pairs]))
            for pairs in rounds
        ]


def _together(numbers: list[Numbers]) -> Numbers:
    """The repeats of all categories in one round, as one repeat."""
    digests = [repeat["digest"] for repeat in numbers]
    texts = None if None in digests else "-".join(digests)
    return add_turns(numbers) | {"digest": texts}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def speed_settings(plan: Plan, environment: Mapping[str, Any], code: str) -> dict[str, Any]:
    """The settings, apart from the cells, that two speed measurements must share to be comparable.

    `code` is the fingerprint of the timed code and libraries.
    """
    benchmark = plan.pipeline.benchmark
    prompts = benchmark.speed.prompts
    files = text_hashes([prompts] if prompts is not None else [])
    machine = ("processor", "cores", "threads", "memory_bytes", "accelerator", "versions")
    return {
        "speed": benchmark.speed.model_dump(mode="json"),
        "seed": plan.pipeline.seed,
        "machine": {name: environment.get(name) for name in machine},
        "version": MEASURE_VERSION,
        "code": code,
        **({"device": environment["device"]} if "device" in environment else {}),
        **({"files": files} if files else {}),
    }


def find_session(run: RunFolder, settings: dict[str, Any], cells: Iterable[Cell]) -> Session | None:
    """The session of these cells and settings with the most rounds; else None."""
    keys = {cell.name: cell.key for cell in cells}.items()
    sessions: list[Session] = []
    for file in sorted(run.speed.glob("*.jsonl")):
        session = Session.load(file)
        if session and session.settings == settings and session.members.items() >= keys:
            sessions.append(session)
    return max(
        sessions, key=lambda session: (session.finished(), len(session.rounds)), default=None
    )


def new_session(
    run: RunFolder,
    settings: dict[str, Any],
    cells: Iterable[Cell],
    groups: list[list[str]],
    environment: dict[str, Any],
    command: str,
    categories: list[str] | None = None,
) -> Session:
    """Begin a session of these cells; it replaces one with the same cells and settings."""
    members = {cell.name: cell.key for cell in cells}
    file = run.speed / f"{digest({'settings': settings, 'members': members})}.jsonl"
    session = Session(file, settings, members, groups, environment, command, categories or [])
    session.create()
    return session
