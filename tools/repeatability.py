"""Is a difference called only where there is one? Equal runs compared, then planted differences.

    make repeatability        (`python tools/repeatability.py --help` has its options)

Runs `pipelines/studies/repeatability.yaml` again and again. Quality is measured once, since
unchanged code gives unchanged answers; speed is measured anew, in new processes, each time. How far
these equal runs lie apart is stored for this machine: from then on every run has it in its
intervals.

Each run is compared with the one before it, by the spread of all other runs: every change that is
called is a false one. Then decode speed and 2 points of accuracy are taken away from one cell in
the records of the last run, and must be called. Of decode speed goes as much as two single runs can
show on this machine, and 5 %, which they show only where equal runs lie within half a percent.

Writes `summary.json` beside the results of all runs. Takes a minute or two a run on a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from compose.analysis.compare import Change, compare
from compose.analysis.spread import measured_spread, store_spread
from compose.results.io import load_results
from compose.results.schema import Results
from gateskip.kernels.build import cache_folder

PIPELINE = Path(__file__).parents[1] / "pipelines" / "studies" / "repeatability.yaml"
PLANTED_IN = "nf4"
SLOWER = 0.95  # of the planted cell's decode speed
CALLED = 5.0  # standard errors of a change that the test of a whole family calls
POINTS = 0.02  # of its accuracy


def main() -> int:
    """Run, compare, plant, and write the summary; 0 where all is called as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("runs/repeatability"))
    options = parser.parse_args()
    run = _Runs(options.out)
    results = [run.measure(number) for number in range(options.runs)]
    pairs = [_false_calls(results, number) for number in range(1, len(results))]
    spread = measured_spread(results)
    stored = store_spread(cache_folder(), spread, results[-1].environment)
    seen = math.exp(-CALLED * math.sqrt(2) * spread.decode)
    planted = {
        f"decode speed x {by:.2f}": run.planted(partial(run.slow_down, by), results[-1], "decode")
        for by in (SLOWER, seen)
    }
    planted["accuracy - 2 points"] = run.planted(run.lower_scores, results[-1], "accuracy")
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "commit": results[-1].environment.get("git_commit"),
        "processor": results[-1].environment.get("processor"),
        "pairs": len(pairs),
        "pairs_without_a_call": sum(not calls for calls in pairs),
        "false_calls": [_text(call) for calls in pairs for call in calls],
        "between_runs": spread.model_dump(),
        "decode_ratios": _ratios(results),
        "planted": {name: _text(call) for name, call in planted.items()},
        "planted_called": {name: call.outcome == "worse" for name, call in planted.items()},
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    print(f"kept for this machine: {stored}")
    called = [each for name, each in summary["planted_called"].items() if "0.95" not in name]
    return 0 if not any(pairs) and all(called) else 1


class _Runs:
    """Runs of the pipeline in one folder, each result kept under its number."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "repeatability"

    def kept(self) -> list[Path]:
        """The results of all runs so far."""
        return list(self.out.glob("results-*.json"))

    def measure(self, number: int) -> Results:
        """Speed measured anew; what an earlier call of this script measured is kept."""
        kept = self.out / f"results-{number:02d}.json"
        if not kept.is_file():
            shutil.rmtree(self.folder / "speed", ignore_errors=True)
            self._gather()
            shutil.copyfile(self.folder / "results.json", kept)
        return load_results(kept)

    def _gather(self) -> None:
        """`gateskip run`, which measures what has no record and gathers the rest."""
        command = [sys.executable, "-m", "compose", "run", str(PIPELINE)]
        subprocess.run([*command, "--out", str(self.out), "--workers", "1", "--quiet"], check=True)

    def planted(self, plant: Callable[[], None], before: Results, metric: str) -> Change:
        """What is called of a metric of the planted cell, the records being put back afterwards."""
        saved = self.out / "saved"
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(self.folder, saved)
        try:
            plant()
            self._gather()
            after = load_results(self.folder)
        finally:
            shutil.rmtree(self.folder)
            saved.rename(self.folder)
        spread = measured_spread([load_results(file) for file in sorted(self.kept())])
        known = {"between_runs": spread.model_dump()}
        before = before.model_copy(update={"environment": before.environment | known})
        changes = compare(before, after)
        return next(c for c in changes if (c.cell, c.metric) == (PLANTED_IN, metric))

    def slow_down(self, by: float) -> None:
        """Each repeat of the planted cell as it would have been at `by` times the speed."""
        (file,) = (self.folder / "speed").glob("*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            numbers: dict[str, Any] | None = line.get("cells", {}).get(PLANTED_IN)
            if numbers is not None:
                numbers["decode_tokens_per_s"] *= by
                numbers["decode_s"] /= by
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def lower_scores(self) -> None:
        """Right answers of the planted cell become wrong, evenly over each task's questions."""
        file = self.folder / "cells" / PLANTED_IN / "quality.json"
        record = json.loads(file.read_text())
        for score in record["result"]["tasks"].values():
            right = [i for i, outcome in enumerate(score["outcomes"]) if outcome == 1]
            count = round(POINTS * score["n"])
            for i in right[:: len(right) // count][:count]:
                score["outcomes"][i] = 0.0
            score["value"] = sum(score["outcomes"]) / score["n"]
        file.write_text(json.dumps(record))


def _false_calls(results: list[Results], number: int) -> list[Change]:
    """What is called of a run and the one before it, by the spread of all others."""
    spread = measured_spread(results[: number - 1] + results[number + 1 :])
    known = {"between_runs": spread.model_dump()}
    before, after = (
        run.model_copy(update={"environment": run.environment | known})
        for run in results[number - 1 : number + 1]
    )
    return [c for c in compare(before, after) if c.outcome in ("better", "worse")]


def _text(change: Change) -> str:
    effect = change.effect
    by = (
        ""
        if effect is None
        else f", effect {effect.value:.3f} [{effect.low:.3f}, {effect.high:.3f}]"
    )
    return f"{change.cell}, {change.metric}: {change.outcome}{by}"


def _ratios(results: list[Results]) -> dict[str, list[list[float]]]:
    """Cell -> decode ratio to the baseline with its interval, run by run."""
    ratios: dict[str, list[list[float]]] = {}
    for each in results:
        for cell in each.measured:
            ratio = None if cell.speed is None else cell.speed.decode_ratio
            if ratio is not None and cell.name != each.baseline:
                row = [round(n, 4) for n in (ratio.value, ratio.low, ratio.high)]
                ratios.setdefault(cell.name, []).append(row)
    return ratios


if __name__ == "__main__":
    sys.exit(main())
