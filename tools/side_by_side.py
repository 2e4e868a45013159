"""Is 5 % of decode speed seen where two versions share the rounds of one run, and nothing else?

    python tools/side_by_side.py        (`--help` has its options)

Two copies of one 4-bit folder are timed in turns by `gateskip bench --one-process`, again and
again. They are the same, so every difference that is called is a false one. Then the second copy's
decode speed is taken at 95 % in the numbers of the same rounds, and must be called slower. A
difference is called at the level at which `compare` calls one (`SPEED_ERROR`).

Writes `side-by-side.json`. Takes a minute a run on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

from compose.analysis.compare import SPEED_ERROR
from compose.results.io import load_results
from compose.results.schema import Results

SLOWER = 0.95  # of the second copy's decode speed


def main() -> int:
    """Measure, compare, plant, write; 0 where nothing is called but what was planted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a model folder, for instance one of 4 bits")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each copy in a round")
    parser.add_argument("--out", type=Path, default=Path("runs/side-by-side"))
    options = parser.parse_args()
    runs = [_measure(options, number) for number in range(options.runs)]
    ratios = [_log_ratios(run) for run in runs]
    equal = [_called(logs) for logs in ratios]
    planted = [_called(logs + np.log(SLOWER)) for logs in ratios]
    summary: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]).replace(str(options.folder), "FOLDER"),
        "commit": runs[-1].environment.get("git_commit"),
        "processor": runs[-1].environment.get("processor"),
        "runs": len(runs),
        "rounds": options.rounds,
        "level": SPEED_ERROR,
        "equal_called_different": sum(each is not None for each in equal),
        "planted_5_percent_called_slower": sum(each == "slower" for each in planted),
        "ratios": [round(float(np.exp(logs.mean())), 4) for logs in ratios],
        "round_sd": round(float(np.sqrt(np.mean([logs.var(ddof=1) for logs in ratios]))), 4),
        "run_sd": round(float(np.std([logs.mean() for logs in ratios], ddof=1)), 4),
    }
    (options.out / "side-by-side.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return 0 if not any(equal) and all(each == "slower" for each in planted) else 1


def _measure(options: argparse.Namespace, number: int) -> Results:
    """One `gateskip bench` of the folder and its copy; what was measured before is kept."""
    kept = options.out / f"results-{number:02d}.json"
    if not kept.is_file():
        copies = [options.out / name for name in ("first", "second")]
        for copy in copies:
            shutil.copytree(options.folder, copy, dirs_exist_ok=True)
        shutil.rmtree(options.out / "run", ignore_errors=True)
        shape = ["--prompt-tokens", "64", "--new-tokens", "64", "--repeats", str(options.rounds)]
        shape += ["--min-seconds", str(options.seconds), "--one-process"]
        command = [sys.executable, "-m", "compose", "bench", *map(str, copies), *shape]
        command += ["--out", str(options.out / "run"), "--name", "pair", "--quiet"]
        subprocess.run(command, check=True)
        shutil.copyfile(options.out / "run" / "pair" / "results.json", kept)
    return load_results(kept)


def _log_ratios(run: Results) -> Any:
    """Logarithms [rounds] of the second copy's decode speed over the first's, round by round."""
    speeds = []
    for cell in run.measured:
        assert cell.speed is not None and cell.speed.decode_tokens_per_s is not None
        speeds.append(np.log(cell.speed.decode_tokens_per_s.repeats))
    first, second = speeds
    return second - first


def _called(logs: Any) -> str | None:
    """What is called of the second copy: `slower`, `faster`, or nothing."""
    if ttest_1samp(logs, 0.0).pvalue >= SPEED_ERROR:
        return None
    return "slower" if logs.mean() < 0 else "faster"


if __name__ == "__main__":
    sys.exit(main())
