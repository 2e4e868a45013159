"""The numbers of docs/scale.md: 1,000 cells on a model of 70B weights, from published costs.

`python tools/scale.py` prints the tables; `--write` puts them into the page, between its markers.
Costs are those of reports/published/small-matrix/results.json, taken to other sizes as
`gateskip plan --estimate` does it; nothing is timed here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compose.language.parse import load_pipeline  # noqa: E402
from compose.language.schema import Pipeline  # noqa: E402
from compose.planning.plan import FOLDERS_HELD, PROCESS_BYTES, SOURCE, speculates  # noqa: E402
from compose.planning.planner import make_plan  # noqa: E402
from compose.results.io import load_results  # noqa: E402
from compose.results.schema import Results  # noqa: E402
from compose.run.costs import (  # noqa: E402
    COMPARED,
    SCORED,
    Cost,
    cell_passes,
    step_passes,
)
from compose.run.estimate import folder_size, seconds_of  # noqa: E402
from compose.run.steps import WIDTHS  # noqa: E402
from compose.stages.registry import STAGES, ModelShape  # noqa: E402

PUBLISHED = ROOT / "reports" / "published" / "small-matrix" / "results.json"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- scale -->", "<!-- end -->"

SMALL = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, tie_embeddings=True)
"""SmolLM2-135M, on which the costs were measured."""
LARGE = ModelShape("llama", 8192, 28672, 80, 64, 8, 128, 128256, tie_embeddings=False)
"""The sizes of Llama 3 70B."""
DATA = load_pipeline(ROOT / "pipelines" / "small-matrix.yaml").data
"""As much text as the small matrix has."""


def published_costs(results: Results) -> list[Cost]:
    """What each step and cell of the published run took."""
    found: dict[str, Cost] = {}
    assert DATA.train is not None and DATA.calibration is not None, "the small matrix has both"
    data = {"train": DATA.train, "calibration": DATA.calibration}
    for cell in results.measured:
        uses = {step.name: step for step in cell.steps or ()}
        for name, seconds in (cell.step_seconds or {}).items():
            step = uses.get(name)
            given = {} if step is None else step.model_dump(exclude_none=True, exclude={"name"})
            if "init" in given:
                given["init"] = "warm"  # a file of the pipeline's folder; its cost is the same
            stage = None if step is None else STAGES[step.use].model_validate(given)
            kind = SOURCE if stage is None else stage.use
            where = f"{'+'.join(cell.chain)}: {name}" if stage else SOURCE
            passes, peak = step_passes(stage, SMALL, data), (cell.step_peak_bytes or {}).get(name)
            found.setdefault(
                f"{kind} {seconds}", Cost(kind, passes, SMALL.weights, seconds, peak, 0, where)
            )
        if cell.seconds is not None and cell.peer is None:
            kind = COMPARED if cell.speculates else SCORED
            passes = cell_passes(SMALL.weights, results.benchmark or {}, kind)
            peak = None if cell.size is None else cell.size.peak_bytes
            found[cell.name] = Cost(kind, passes, SMALL.weights, cell.seconds, peak, 0, cell.name)
    return list(found.values())


def matrix(results: Results) -> Pipeline:
    """Eight ways of storing weights, four gates and none, thirty ways of decoding: 1,000 cells."""
    groups = [(group, bits) for group in (32, 64, 128) for bits in (8, 4)] + [(32, 6)]
    stages: dict[str, dict[str, Any]] = {
        f"int4-{group}-{bits}": {
            "use": "int4",
            "group_size": group,
            "embedding": bits,
        }
        for group, bits in groups
    }
    quantizers = ["none", *stages]
    gate = {"use": "gate", "backbone": "frozen", "steps": 4, "length": 128, "calibration_blocks": 8}
    gates = {
        f"gates{n}": gate | {"budget": b, "budgets": (0.5,)}
        for n, b in enumerate((0.5, 0.6, 0.7, 0.8))
    }
    budgets = range(55, 85, 2)
    decode = {f"skip{n}": {"use": "skip", "budget": n / 100} for n in budgets}
    decode |= {f"spec{n}": {"use": "speculate", "draft_budget": n / 100} for n in budgets}
    return Pipeline.model_validate(
        {
            "schema": 1,
            "name": "scale",
            "model": {"source": "llama-70b", "dtype": "bfloat16"},
            "data": DATA.model_dump(),
            "stages": stages | gates | decode,
            "matrix": {
                "gate": ("none", *gates),
                "quantize": tuple(quantizers),
                "decode": ("none", *decode),
            },
            "benchmark": {
                key: value
                for key, value in (results.benchmark or {}).items()
                if key in ("speed", "quality", "lossless")
            },
        },
        strict=False,
    )


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size < 1e12 else f"{size / 1e12:,.1f} TB"


KINDS = {
    "source": "`source`: fetching and checking the model",
    "int4": "`int4`",
    "gate": "`gate`, frozen, 4 steps",
    SCORED: "a cell: loading and scoring",
    COMPARED: "a cell with drafts: loading and comparing",
}


def row(*cells: str | float) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measured_rows(costs: list[Cost]) -> list[str]:
    """What was measured, kind by kind."""
    rows = [
        row(
            "measured on 135M weights",
            "seconds",
            "weights x tokens",
            "weights x tokens per second",
            "peak memory",
        ),
        "|---|---|---|---|---|",
    ]
    for kind, shown in KINDS.items():
        own = [cost for cost in costs if cost.kind == kind]
        seconds, passes = mean([c.seconds for c in own]), mean([c.passes for c in own])
        peak = f"{max(cost.peak_bytes or 0 for cost in own) / 1e9:.2f} GB"
        numbers = (f"{seconds:.1f}", f"{passes:.3g}", f"{passes / seconds:.3g}")
        rows.append(row(f"{shown} (mean of {len(own)})", *numbers, peak))
    return rows


def tables() -> str:
    """The page's tables, as Markdown."""
    results = load_results(PUBLISHED)
    costs = published_costs(results)
    machine = results.environment
    plan = make_plan(matrix(results), LARGE)
    shapes = plan.shapes(LARGE)
    data = {"train": plan.pipeline.data.train, "calibration": plan.pipeline.data.calibration}
    benchmark = plan.pipeline.benchmark.model_dump(mode="json")

    def seconds(kind: str, passes: float) -> float:
        found, _ = seconds_of(passes, [cost for cost in costs if cost.kind == kind])
        assert found is not None, f"the published run has no {kind}"
        return found

    took: dict[str, list[float]] = {}
    ends: dict[str, float] = {}
    """Step key -> seconds of the chain that ends with it."""
    disk = 0
    for step in plan.steps:
        kind, shape = SOURCE if step.stage is None else step.stage.use, shapes[step.key] or LARGE
        each = seconds(kind, step_passes(step.stage, shape, data))
        took.setdefault(kind, []).append(each)
        ends[step.key] = ends.get(step.parent or "", 0.0) + each
        disk += folder_size(plan, step, shape)
    longest = 0.0
    for cell in plan.cells:
        kind = COMPARED if speculates(cell.decode) else SCORED
        each = seconds(kind, cell_passes(LARGE.weights, benchmark, kind))
        took.setdefault(kind, []).append(each)
        longest = max(longest, ends[cell.weights] + each)
    total = sum(map(sum, took.values()))
    speed = plan.pipeline.benchmark.speed
    dense = LARGE.weights * WIDTHS["bfloat16"]
    turn = speed.new_tokens * dense / (machine["roofline"]["memory_gb_per_s"] * 1e9)
    timed = turn * (speed.repeats + 1)
    memory = {s.stage.use: s.memory or 0 for s in plan.steps if s.stage is not None}
    rows = [
        f"Measured: {machine.get('processor')}, {machine['threads']} threads, "
        f"`{results.command}`: [its results](../{PUBLISHED.relative_to(ROOT)}).",
        "",
        *measured_rows(costs),
        "",
        row(
            f"{len(plan.cells):,} cells on 70B weights",
            "number",
            "hours of the longest",
            "hours of all",
        ),
        "|---|---|---|---|",
    ]
    for kind, times in took.items():
        rows.append(row(KINDS[kind], len(times), hours(max(times)), hours(sum(times))))
    cells = len(plan.cells)
    rows += [
        row("speed rounds on one node, at most", cells, hours(timed), hours(timed * cells)),
        "",
        row("requirement", ""),
        "|---|---|",
        row("memory of a `gate` stage, estimated", gigabytes(memory["gate"])),
        row("memory of an `int4` stage, estimated", gigabytes(memory["int4"])),
        row(
            "memory for measuring a cell in bfloat16",
            gigabytes(PROCESS_BYTES + FOLDERS_HELD * dense),
        ),
        row(f"disk of {len(plan.steps)} model folders", gigabytes(disk)),
        row("node-hours of all stages and cells", hours(total)),
        row("hours on 64 nodes, at least", hours(max(total / 64, longest))),
        row("hours of the longest chain, on any number of nodes", hours(longest)),
    ]
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with its tables as they are now."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    else:
        print(tables())
