"""What a token costs at the size of a larger model: random weights beside llama.cpp's.

    python tools/sizes.py llama-1b                        (`--help` has its options)

Writes a model of random weights, a pipeline file and, by `gateskip run`, its results: bfloat16, 8
and 4 bits, each with a quarter of the multiply-adds skipped by gates that nothing trained, and
llama.cpp on the same weights. Nothing of it has any quality; what is compared is speed at equal
bytes.

Random weights say nothing about which drafts are accepted. So drafts are timed (an int4 copy,
each length forced), and `summary.json` has the gain that these times would give with the
acceptance of a real model's int4 copy, position by position, out of a results file.

Takes about half an hour on two cores that do nothing else, at the size of 1B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_random

import gateskip
from compose.bench.speed.workloads import running_text
from compose.results.io import load_results
from gateskip.decoding.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
ACCEPTED = (ROOT / "reports/published/peers/results.json", "bf16+int4-draft")
"""An int4 copy and look-up, whose drafts are accepted less often than the copy's alone."""
LENGTHS = range(1, 9)
PIPELINE = """\
schema: 1
name: {shape}
model: {{source: {folder}, dtype: bfloat16}}
data:
  train:       {{source: calibration-text, limit: 2, length: 64}}
  calibration: {{source: calibration-text, limit: 2, length: 64}}
stages:
  int8:   {{use: int8}}
  int4:   {{use: int4, compensate: false}}
  gates:
    use: gate
    steps: 0
    shortcut: 0
    backbone: frozen
    length: 64
    budgets: [0.75]
    calibration_blocks: 2
  skip75: {{use: skip, budget: 0.75}}
pipelines:
  int8:        [int8]
  int4:        [int4]
  bf16-skip75: [gates, skip75]
  int8-skip75: [int8, gates, skip75]
  int4-skip75: [int4, gates, skip75]
benchmark:
  against: [llama.cpp:bf16, llama.cpp:q8_0, llama.cpp:q4_k_m, llama.cpp:q4_0]
  speed:   {{prompt_tokens: 128, new_tokens: 32, repeats: {repeats}}}
  quality: {{perplexity: null, own_answers: null}}
"""


def main() -> None:
    """Write, run, time drafts, and print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of timing drafts")
    options = parser.parse_args()
    folder = options.out / options.shape
    if not (folder / "config.json").is_file():
        write_random(options.shape, folder)
    file = options.out / f"{options.shape}.yaml"
    file.write_text(PIPELINE.format(shape=options.shape, folder=folder, repeats=options.repeats))
    subprocess.run(
        [sys.executable, "-m", "compose", "run", str(file), "--workers", "1"], check=True
    )
    results = load_results(Path("runs") / options.shape / "results.json")
    decoder = gateskip.load(folder)
    costs = draft_costs(decoder, options.rounds)
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "commit": results.environment.get("git_commit"),
        "processor": results.environment.get("processor"),
        "drafts": {
            "accepted_as": [str(ACCEPTED[0].relative_to(ROOT)), ACCEPTED[1]],
            **gains(costs, acceptance(*ACCEPTED)),
        },
    }
    (Path("runs") / options.shape / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def draft_costs(decoder: Decoder, rounds: int) -> list[dict[int, tuple[float, float]]]:
    """Of each round: draft length -> seconds that drafting and verifying take; at length 0 the
    seconds of a plain token."""
    prompt = running_text(decoder.tokenizer, 1, 128, None)
    found = []
    for _ in range(rounds + 1):
        plain = decoder.generate(prompt, 33).stats
        costs = {0: (0.0, plain.decode_s / 32)}
        for length in LENGTHS:
            settings: dict[str, Any] = {"draft_weights": "int4", "lookup": False}
            stats = decoder.generate(
                prompt, 3 * (length + 1), "speculate", draft_length=length, **settings
            ).stats
            costs[length] = (stats.draft_s / stats.passes, stats.verify_s / stats.passes)
        found.append(costs)
    return found[1:]  # in the first one the copy is made


def acceptance(file: Path, cell: str) -> list[float]:
    """Share of drafted tokens accepted at each position, where all before them were, with drafts of
    one length: those of the timed rounds end where they are unsure."""
    checked = load_results(file).cell(cell).lossless_check
    assert checked is not None and checked.acceptance_by_position, "the cell speculates"
    return list(checked.acceptance_by_position)


def gains(costs: list[dict[int, tuple[float, float]]], accepted: list[float]) -> dict[str, Any]:
    """What drafts of each length gain over plain decoding: medians over rounds, and the best."""
    rates = accepted + accepted[-1:] * len(LENGTHS)
    found: dict[str, Any] = {"accepted_by_position": accepted, "by_length": {}}
    for length in LENGTHS:
        tokens, whole = 1.0, 1.0
        for rate in rates[:length]:
            whole *= rate
            tokens += whole
        each = [tokens * round_[0][1] / sum(round_[length]) for round_ in costs]
        found["by_length"][length] = {
            "tokens_a_round": round(tokens, 2),
            "draft_ms": round(1e3 * statistics.median(r[length][0] for r in costs), 2),
            "verify_ms": round(1e3 * statistics.median(r[length][1] for r in costs), 2),
            "gain": round(statistics.median(each), 3),
            "lowest": round(min(each), 3),
            "highest": round(max(each), 3),
        }
    found["plain_ms"] = round(1e3 * statistics.median(r[0][1] for r in costs), 2)
    found["best"] = max(found["by_length"].values(), key=lambda each: each["gain"])
    return found


if __name__ == "__main__":
    main()
