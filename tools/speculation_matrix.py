"""Does any way of drafting lose against plain decoding? Weights by samplers by lengths.

    python tools/speculation_matrix.py BF16 INT8 INT4        (`--help` has its options)

The folders hold one model in three formats, each with a draft network
(pipelines/studies/learned-drafts.yaml makes them). Each is decoded plainly and with its drafts by
`gateskip bench`, greedily and at temperature 0.7, in up to 32 and 128 tokens after prompts of eight
kinds. Ratios to plain decoding of the same folder, with 95 % intervals, go to `summary.json`.

An interval is over rounds, each of other texts. Look-up gains on few of them, so that it takes many
rounds to say that it loses on none. Takes three to ten minutes for each of the twelve on two cores
that do nothing else, and must have them: a disturbed choice of drafts stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from compose.results.io import load_results
from compose.results.schema import Results

WEIGHTS = ("bf16", "int8", "int4")
DRAFTS = ("draft:1+auto+lookup", "draft:1+lookup", "draft:1+learned+lookup", "draft:1+int4+lookup")
"""The first is what `speculate` does without settings."""
TEMPERATURES, LENGTHS = (0.0, 0.7), (32, 128)
LEAST = 0.97  # which no interval may lie below


def main() -> int:
    """Measure and write; 0 where no interval reaches below LEAST."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs=3, metavar=("BF16", "INT8", "INT4"))
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, default=DRAFTS, metavar="SYSTEM")
    parser.add_argument("--limit", type=int, default=1, help="prompts of each kind")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way in a round")
    parser.add_argument("--out", type=Path, default=Path("runs/speculation-matrix"))
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for weights, folder in zip(WEIGHTS, options.folders, strict=True):
        for temperature in TEMPERATURES:
            for length in LENGTHS:
                run = _measure(options, folder, weights, temperature, length)
                found += _ratios(run, weights, temperature, length)
    command = " ".join(["python", *sys.argv])
    for name, folder in zip(WEIGHTS, options.folders, strict=True):
        command = command.replace(str(folder), name.upper())
    summary: dict[str, Any] = {
        "command": command,
        "processor": run.environment.get("processor"),
        "lowest": min(each["low"] for each in found),
        "ratios": found,
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return int(summary["lowest"] < LEAST)


def _measure(
    options: argparse.Namespace, folder: Path, weights: str, temperature: float, length: int
) -> Results:
    """One `gateskip bench`; what was measured before is kept."""
    name = f"{weights}-{temperature}-{length}"
    kept = options.out / name / "results.json"
    if not kept.is_file():
        drafts = [each for each in options.drafts if weights != "int4" or "int4" not in each]
        systems = [word for each in ("plain", *drafts) for word in ("--system", each)]
        shape = ["--prompts", "prompts", "--limit", str(options.limit)]
        shape += ["--new-tokens", str(length), "--temperature", str(temperature)]
        shape += ["--repeats", str(options.rounds)]
        shape += ["--min-seconds", str(options.seconds), "--out", str(options.out)]
        command = [sys.executable, "-m", "compose", "bench", str(folder), *systems, *shape]
        subprocess.run([*command, "--name", name, "--quiet"], check=True)
    return load_results(kept)


def _ratios(run: Results, weights: str, temperature: float, length: int) -> list[dict[str, Any]]:
    """Each way of drafting over plain decoding."""
    found = []
    for cell in run.measured:
        timed = cell.speculation
        if timed is None or timed.speedup is None or timed.speedup_ci95 is None:
            continue
        low, high = timed.speedup_ci95
        found.append(
            {
                **{"weights": weights, "temperature": temperature, "new_tokens": length},
                **{"drafts": cell.name, "ratio": round(timed.speedup, 3)},
                **{"low": round(low, 3), "high": round(high, 3)},
                **{"plain_steps": timed.plain_steps, "accepted": timed.acceptance_rate},
                "commit": run.environment.get("git_commit"),
            }
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
