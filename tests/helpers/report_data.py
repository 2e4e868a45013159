"""Made-up results that reports are tested with; no number in them was measured."""

from __future__ import annotations

import copy
import math
from typing import Any


def measured(median: float, spread: float = 0.02) -> dict[str, Any]:
    """A median with five repeats around it."""
    return {"median": median, "repeats": [median * (1 + spread * k) for k in (0, -1, 0.4, 1, -0.3)]}


def made_up_cell(
    name: str,
    *,
    decode: float,
    disk: float,
    ratio: float,
    accuracy: float = 1.0,
    saved: float | None = None,
    speculation: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A measured cell; `disk` in MB, `ratio` of perplexity and `accuracy` against dense."""
    chain = [] if name == "dense" else name.split("+")
    uses: dict[str, tuple[str, dict[str, Any]]] = {
        "gates": ("gate", {"kind": "scalar", "budget": 0.8}),
        "nf4": ("bnb", {"format": "nf4"}),
        "gptq4": ("gptq", {"bits": 4, "group_size": 64}),
        "skip80": ("skip", {"budget": 0.8}),
        "spec": ("speculate", {"draft_budget": 0.5, "draft_length": "auto"}),
        "narrow": ("prune-width", {"ratio": 0.2}),
        "heal": ("heal", {"steps": 200}),
        "drop3": ("drop-layers", {"count": 3}),
    }
    scores = {"arc_easy": 0.512, "piqa": 0.668, "lambada_openai": 0.421}
    tasks = {}
    for task, dense in scores.items():
        value = dense * accuracy
        half = 1.96 * math.sqrt(value * (1 - value) / 500)
        tasks[task] = {
            "metric": "acc" if task == "lambada_openai" else "acc_norm",
            "value": value,
            "n": 500,
            "ci95": [value - half, value + half],
        }
    cell: dict[str, Any] = {
        "name": name,
        "chain": chain,
        "status": "ok",
        "steps": [{"name": n, "use": uses[n][0], **uses[n][1]} for n in chain if n in uses],
        "size": {
            "disk_bytes": round(disk * 1e6),
            "resident_bytes": round(disk * 1.08e6),
            "peak_bytes": round(disk * 1e6 + 410e6),
        },
        "speed": {
            "decode_tokens_per_s": measured(decode),
            "prefill_tokens_per_s": measured(decode * 31, 0.01),
            "ttft_s": measured(4.1 / decode),
            "by_batch": {"8": {"decode_tokens_per_s": measured(decode * 4.2)}},
        },
        "quality": {
            "perplexity": {"dataset": "wikitext2", "value": 21.4 * ratio, "tokens": 8192},
            "kl_to_baseline": 0.9 * math.log(ratio) if ratio > 1 else 0.0,
            "greedy_agreement": 1 / ratio**0.8,
            "tasks": tasks,
        },
    }
    cell["quality"]["perplexity"]["ratio_to_baseline"] = ratio
    if saved is not None:
        cell["compute"] = {
            "saved_gross": saved + 0.01,
            "saved_net": saved,
            "saved_model": saved * 0.79,
        }
    if speculation is not None:
        cell["lossless_check"] = {"lossless": True, "prompts": 16, "tokens": 1024}
        cell["lossless_check"] |= {k: speculation.pop(k) for k in CHECKED & speculation.keys()}
        cell["speculation"] = {"speedup": 1.2, **speculation}
        cell["quality_of"] = name.removesuffix("+spec")
        del cell["quality"]
    if chain and chain[-1] in ("spec", "skip80"):
        cell["plain"] = "+".join(chain[:-1]) or "dense"
    return cell | more


CHECKED = {"lossless", "prompts", "tokens", "first_divergence"}


def made_up_results() -> dict[str, Any]:
    """A run with every kind of cell: measured, speculative, pruned, ruined, failed, left out."""

    def spec(rate: float, mean: float, speedup: float, **more: Any) -> dict[str, Any]:
        lengths = {0: 41, 1: 122, 2: 310, 3: 284, 4: 133, 5: 60, 6: 17}
        return {
            "acceptance_rate": rate,
            "mean_accepted_tokens": mean,
            "speedup": speedup,
            "draft_length_histogram": {str(k): v for k, v in lengths.items()},
            **more,
        }

    near_tie = {"prompt": 11, "position": 37, "margin": 0.0031}
    curve = [
        {
            "step": step,
            "loss": 0.42 * math.exp(-step / 110) + 0.11 + 0.02 * math.sin(step),
            **({"valid": 0.40 * math.exp(-step / 120) + 0.13} if step % 50 == 0 else {}),
        }
        for step in range(0, 301, 10)
    ]
    heal = [{"step": s, "loss": 2.2 * math.exp(-s / 60) + 0.35} for s in range(0, 201, 10)]
    cells = [
        made_up_cell("dense", decode=23.6, disk=269.1, ratio=1.0),
        made_up_cell("nf4", decode=29.8, disk=114.2, ratio=1.082, accuracy=0.972),
        made_up_cell("gptq4", decode=31.2, disk=109.8, ratio=1.061, accuracy=0.981),
        made_up_cell("gates", decode=23.1, disk=269.4, ratio=1.004, accuracy=0.998, saved=0.0)
        | {"training": {"gates": curve}},
        made_up_cell(
            "gates+skip80", decode=28.7, disk=269.4, ratio=1.121, accuracy=0.957, saved=0.181
        ),
        made_up_cell(
            "gates+spec", decode=27.9, disk=269.4, ratio=1.0, speculation=spec(0.71, 2.31, 1.21)
        ),
        made_up_cell("gates+nf4", decode=29.2, disk=114.5, ratio=1.087, accuracy=0.969, saved=0.0),
        made_up_cell(
            "gates+nf4+skip80", decode=35.9, disk=114.5, ratio=1.229, accuracy=0.921, saved=0.180
        ),
        made_up_cell(
            "gates+nf4+spec",
            decode=31.8,
            disk=114.5,
            ratio=1.0,
            speculation=spec(
                0.64, 2.05, 1.09, lossless=False, first_divergence=near_tie, tokens=1016
            ),
        ),
        made_up_cell(
            "gates+gptq4", decode=30.6, disk=110.1, ratio=1.066, accuracy=0.979, saved=0.0
        ),
        made_up_cell(
            "gates+gptq4+skip80",
            decode=38.4,
            disk=110.1,
            ratio=1.192,
            accuracy=0.938,
            saved=0.181,
            notes=["one repeat ran beside another process"],
        ),
        made_up_cell(
            "gates+gptq4+spec",
            decode=43.1,
            disk=110.1,
            ratio=1.0,
            speculation=spec(0.78, 2.94, 1.41),
        ),
        made_up_cell("drop3", decode=26.1, disk=248.0, ratio=1.412, accuracy=0.861, saved=0.1),
        made_up_cell(
            "narrow+heal+gates+gptq4+spec",
            decode=46.7,
            disk=98.7,
            ratio=1.0,
            speculation=spec(0.69, 2.44, 1.33),
            aliases=["shipped"],
            training={"heal": heal},
        ),
        made_up_cell(
            "narrow+heal+gates+gptq4",
            decode=35.1,
            disk=98.7,
            ratio=1.338,
            accuracy=0.884,
            saved=0.12,
        ),
        made_up_cell("narrow", decode=26.8, disk=240.1, ratio=812.0, accuracy=0.41, saved=0.12),
    ]
    failed = {
        "name": "drop3+gates",
        "chain": ["drop3", "gates"],
        "status": "failed",
        "failed_in": "gates",
        "reason": "RuntimeError: the loss was not finite at step 40",
        "traceback": "Traceback (most recent call last):\n"
        '  File "compose/workers/main.py", line 88, in step\n    record = stage.run(job)\n'
        "RuntimeError: the loss was not finite at step 40\n",
    }
    rules = {
        "decode-needs-gates": (
            "skip has no gates to decide by: a gate stage must come before.",
            ["skip80", "spec", "nf4+skip80", "nf4+spec", "gptq4+skip80", "gptq4+spec"],
        ),
        "excluded": ("excluded by the pipeline file.", ["drop3+nf4"]),
    }
    left_out = [
        {
            "name": name,
            "chain": name.split("+"),
            "status": "left-out",
            "rule": rule,
            "reason": reason,
        }
        for rule, (reason, names) in rules.items()
        for name in names
    ]
    return {
        "schema_version": 3,
        "run": "made-up-for-tests",
        "baseline": "dense",
        "command": "gateskip run pipelines/made-up.yaml --out runs",
        "model": "a made-up model",
        "dtype": "bfloat16",
        "seconds": 1930.0,
        "pipeline": "schema: 1\nname: made-up-for-tests\n",
        "environment": {
            "processor": "A processor for tests",
            "threads": 2,
            "memory_bytes": 25_000_000_000,
            "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
            "git_commit": "0123abc",
            "platform": "Linux",
            "date": "2026-11-24T17:00:00+00:00",
        },
        "cells": [*cells, failed, *left_out],
    }


def estimate(value: float, width: float = 0.04, n: int = 5) -> dict[str, Any]:
    """A ratio with its interval, `width` of it to either side."""
    return {"value": value, "low": value * (1 - width), "high": value * (1 + width), "n": n}


VERDICTS = {
    "ACCEPT": "Decodes at least 1.2 times as fast, and keeps at least 95 % of the task scores.",
    "TRADE-OFF": "Decodes at least 1.2 times as fast, and loses 2 to 9 % of the task scores.",
    "REGRESSION": "Loses at least 12 % of the task scores.",
    "NO EVIDENCE": "25 questions were asked; below 200 there is no verdict from tasks.",
}


def with_evidence(results: dict[str, Any]) -> dict[str, Any]:
    """The same run with intervals, verdicts, other engines and everything else of schema 3."""
    results = copy.deepcopy(results)
    dense = results["cells"][0]
    speed = dense["speed"]["decode_tokens_per_s"]["median"]
    measured_cells = [cell for cell in results["cells"] if cell["status"] == "ok"]
    for place, cell in enumerate(measured_cells):
        own = cell["speed"]
        own["repeat_s"] = [2.1, 2.2, 2.05, 2.3, 2.0]
        own["by_context"] = {"512": {"decode_tokens_per_s": measured(speed * 0.8)}}
        cell["fingerprint"] = {"speed": "0123456789abcdef", "quality": "fedcba9876543210"}
        cell["choices"] = {"prompts": "bfloat16"}
        made = [name for name in cell["chain"] if name not in ("spec", "skip80")]
        cell["step_peak_bytes"] = dict.fromkeys(made, 900000000)
        cell["step_seconds"] = dict.fromkeys(made, 12.5)
        if not place:
            continue
        own["decode_ratio"] = estimate(own["decode_tokens_per_s"]["median"] / speed)
        own["prefill_ratio"] = estimate(1.01)
        verdict = list(VERDICTS)[place % 4]
        cell["verdict"] = {"verdict": verdict, "why": VERDICTS[verdict]}
        _with_intervals(cell)
    dense["quality"]["noise_floor"] = {"dtype": "float32", "kl": 0.0004, "ratio": 1.0005}
    _with_timed_drafts([cell for cell in measured_cells if "speculation" in cell])
    results["notes"] = ["These weights once were Q4_1."]
    results["cells"] += [_peer(*own) for own in _PEERS]
    results["skipping_curves"] = [_curve()]
    return results


def _with_intervals(cell: dict[str, Any]) -> None:
    quality = cell.get("quality")
    if quality is None:
        return
    text = quality["perplexity"]
    text["ratio_ci95"] = [text["ratio_to_baseline"] * k for k in (0.98, 1.02)]
    quality["kl_ci95"] = [quality["kl_to_baseline"] * k for k in (0.9, 1.1)]
    quality |= {"kl_median": 0.01, "kl_p90": 0.3}
    quality["own_answers"] = {"answers": 16, "tokens": 900, "kl": 0.2, "common_prefix": 17.5}
    for task in quality["tasks"].values():
        task["kind"] = "likelihood"


def _with_timed_drafts(cells: list[dict[str, Any]]) -> None:
    """The first falls back to plain decoding; the others draft."""
    for cell in cells:
        cell["speculation"] |= {"plain_steps": 0.04, "fell_back": False, "looked_up_share": 0.1}
        cell["speculation"] |= {"acceptance_by_position": [0.8, 0.7], "speedup_ci95": [1.1, 1.3]}
        cell["lossless_check"] |= {"forced_draft_length": 3, "acceptance_rate": 0.63}
        cell["lossless_check"] |= {"acceptance_rate_ci95": [0.57, 0.69]}
        cell["speculation"] |= {"acceptance_rate_ci95": [0.5, 0.7]}
        cell["lossless_check"] |= {"forced_draft_length_histogram": {"0": 3, "3": 300}}
    fell_back = {"plain_steps": 0.964, "fell_back": True, "speedup": 0.99}
    cells[0]["speculation"] |= fell_back | {"speedup_ci95": [0.96, 1.02]}
    cells[0]["speculation"]["draft_length_histogram"] = {"0": 27, "1": 1}


_PEERS = (("bf16", 271, 17.0, 1.001), ("q8_0", 145, 47.0, 1.003), ("q4_k_m", 105, 34.0, 1.09))


def _peer(option: str, size: float, decode: float, ratio: float) -> dict[str, Any]:
    cell = made_up_cell(f"llama.cpp:{option}", decode=decode, disk=size, ratio=ratio)
    cell |= {"chain": [], "steps": None}
    cell["speed"]["decode_ratio"] = estimate(decode / 23.6)
    cell["quality"]["perplexity"]["ratio_ci95"] = [ratio * 0.99, ratio * 1.01]
    cell["peer"] = {"engine": "llama.cpp", "option": option, "versions": {"llama-cpp": "0.3.9"}}
    cell["peer"] |= {"threads": 2, "settings": "Flash attention off, which was faster here."}
    return cell


def _curve() -> dict[str, Any]:
    def figures(reference: float, scale: float) -> dict[str, Any]:
        shares = (0.0, 0.1, 0.2)
        points = [{"cell": f"g{s}", "saved": s * scale, "accuracy": 0.5 - s / 2} for s in shares]
        own = {"points": points, "reference": reference, "saved_at_90": 0.09 * scale}
        return own | {"accuracy_at": {"0": 0.5, "5": 0.475, "10": 0.45}}

    named = {"weights": "gates", "kind": "likelihood", "tasks": ["arc_easy"]}
    return named | {"published": figures(0.49, 1.2), "ours": figures(0.5, 1.0)}


def many_cells(number: int) -> dict[str, Any]:
    """A run of so many measured cells: those of `with_evidence` again and again, renamed."""
    results = with_evidence(made_up_results())
    cells = [cell for cell in results["cells"] if cell["status"] == "ok"]
    others = [cell for cell in results["cells"] if cell["status"] != "ok"]
    more = []
    for place in range(number - len(cells)):
        cell = copy.deepcopy(cells[1 + place % (len(cells) - 1)])
        cell["name"] = f"{cell['name']}+v{place}"
        cell.pop("aliases", None)
        for name in ("decode_ratio", "prefill_ratio"):
            if name in cell["speed"]:
                cell["speed"][name] = estimate(0.7 + (place * 37 % 100) / 60)
        if "quality" in cell:
            ratio = 1.0 + (place * 53 % 97) / 150
            cell["quality"]["perplexity"] |= {"ratio_to_baseline": ratio}
            cell["quality"]["perplexity"]["ratio_ci95"] = [ratio * 0.98, ratio * 1.02]
            cell["quality"]["perplexity"]["block_nll"] = [2.5] * 500
            for task in cell["quality"]["tasks"].values():
                task["outcomes"] = [1.0] * 500
        more.append(cell)
    return results | {"cells": [*cells, *more, *others]}
