"""Plans, results, findings and measurements as text and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from compose.analysis.metrics import METRICS, interval_of, metrics
from compose.analysis.verdicts import TONES
from compose.artifacts.zero_points import price_text
from compose.errors import UserError
from compose.language.limits import Limits
from compose.language.schema import DEFAULT_MATRIX, Pipeline
from compose.numbers import PLAIN, bytes_text, duration_text, metric_text
from compose.outputs.run_folder import RunFolder, is_measured, only_code_changed
from compose.planning.plan import Plan
from compose.results.schema import CellResult, Results
from compose.run.preflight import Readiness, not_ready
from compose.run.runner import RunResult
from compose.stages.base import Stage
from compose.table import Entry, Table, text_table
from compose.terminal.doctor import Finding
from compose.terminal.shown import shown
from compose.terminal.stages import first_sentence
from compose.terminal.table import rich_table
from compose.units import printable

CODE_CHANGED = "code or libraries changed"
STEP_HEADS = ("step", "stage", "after", "key", "memory", "state")
CELL_HEADS = ("cell", "weights", "decode", "also called", "state")
SIGNS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "missing": "[red]✗[/]"}


def plan_counts(plan: Plan) -> str:
    """The plan in one line."""
    return (
        f"{len(plan.steps)} steps, {len(plan.cells)} cells, {len(plan.left_out)} left out by a rule"
    )


def default_matrix_text(pipeline: Pipeline) -> str:
    """What `matrix: default` stands for in a file, one line a stage; empty where it has another."""
    if pipeline.matrix is not DEFAULT_MATRIX:
        return ""
    lines = ["matrix: default combines these stages, at most one of each kind:"]
    for axis, chains in DEFAULT_MATRIX.axes.items():
        for name in chain.from_iterable(chains):
            stage = pipeline.stages[name]
            summary = first_sentence(stage.__doc__).removesuffix(".")
            lines.append(f"  {axis:<10}{name}: {_stage_text(stage)}  # {summary}")
    return "\n".join(lines)


def _stage_text(stage: Stage) -> str:
    """A stage as a pipeline file has it: `{use: heal, steps: 7}`."""
    settings = {"use": stage.use, **stage.model_dump(mode="json", exclude_unset=True)}
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in settings.items()
    }
    return "{" + ", ".join(f"{key}: {text}" for key, text in texts.items()) + "}"


def plan_state(plan: Plan, run: RunFolder) -> dict[str, Any]:
    """The plan as JSON, with `cached` for each step and cell; `why` where only code has changed."""
    shown = plan.to_json()
    for step in shown["steps"]:
        manifest = run.store.manifest(step["key"])
        step["cached"] = manifest is not None
        step["peak_bytes"] = ((manifest or {}).get("record") or {}).get("peak_bytes")
    for row, cell in zip(shown["cells"], plan.cells, strict=True):
        row["cached"] = is_measured(run, plan, cell)
        if only_code_changed(run, plan, cell):
            row["why"] = CODE_CHANGED
    return shown


def _memory(estimated: int | None, measured: int | None, limit: float | None) -> str:
    """A step's peak memory: as it was measured, else as it is estimated; and whether that is more
    than the limit, in megabytes."""
    size = measured if measured is not None else estimated
    if size is None:
        return ""
    text = bytes_text(size) if measured is not None else f"~{bytes_text(size)}"
    return f"{text}, over the limit" if limit is not None and size > limit * 1e6 else text


def limits_text(limits: Limits) -> str:
    """What a step and a cell may take, in one line; empty where nothing is limited."""
    parts = []
    for what, limit in (("step", limits.step), ("cell", limits.cell)):
        most = [] if limit.seconds is None else [duration_text(limit.seconds)]
        most += [] if limit.memory_mb is None else [bytes_text(limit.memory_mb * 1e6)]
        if most:
            parts.append(f"a {what} {' and '.join(most)}")
    return f"limits: {', '.join(parts)}" if parts else ""


def plan_tables(plan: Plan, run: RunFolder) -> Group:
    """Steps, cells, and what is left out by which rule."""
    state = plan_state(plan, run)
    names = {step.key: plan.title(step) for step in plan.steps}
    steps = []
    for step in state["steps"]:
        use = step["stage"]["use"] if step["stage"] else plan.pipeline.model.source
        after = names.get(step["parent"], "")
        memory = _memory(step["memory"], step["peak_bytes"], plan.pipeline.limits.step.memory_mb)
        state_text = _state(step["cached"])
        steps.append((names[step["key"]], use, after, step["key"], memory, state_text))
    cells = []
    for cell in state["cells"]:
        decode = cell["decode"]["use"] if cell["decode"] else "plain"
        also = ", ".join(cell["aliases"])
        state_text = _state(cell["cached"], cell.get("why"))
        cells.append((cell["name"], names[cell["weights"]], decode, also, state_text))
    parts: list[RenderableType] = [
        rich_table(text_table(STEP_HEADS, steps), "Steps (models to make)"),
        "",
        rich_table(text_table(CELL_HEADS, cells), "Cells (variants to measure)"),
    ]
    if plan.left_out:
        left_out = [(left.name, left.rule, left.message) for left in plan.left_out]
        parts += ["", rich_table(text_table(("chain", "rule", "why"), left_out), "Left out")]
    limits = [Text(text)] if (text := limits_text(plan.pipeline.limits)) else []
    if text := default_matrix_text(plan.pipeline):
        parts = [Text(text), "", *parts]
    return Group(*parts, "", *limits, Text(plan_counts(plan)))


def readiness_state(ready: Readiness) -> dict[str, Any]:
    """What a plan lacks, and what is fetched before its first step, as JSON."""
    missing = [{"what": lacking.what, "fix": lacking.fix} for lacking in ready.missing]
    return {"missing": missing, "to_fetch": ready.fetched()}


def readiness_text(ready: Readiness) -> str:
    """What is fetched before the first step, and what is missing; empty where nothing is."""
    parts = []
    if fetched := ready.fetched():
        parts.append("\n  ".join(["Fetched before the first step:", *fetched]))
    if ready.missing:
        parts.append(str(not_ready(list(ready.missing))))
    return printable("\n".join(parts))


def _state(cached: bool, why: str | None = None) -> Entry:
    if cached:
        return Entry("cached", tone="good")
    return Entry("to run" if why is None else f"to measure again: {why}")


def print_result(console: Console, result: RunResult) -> None:
    """How a run ended, and where its report is."""
    cells = [cell for cell in result.results.cells if cell.status != "left-out"]
    failed = [cell for cell in cells if cell.status == "failed"]
    if not result.worked:
        before = f"{len(failed)} failed in an earlier run"
        tried = before if failed else "all variants are measured"
        console.print(f"Nothing to do: {tried}.", highlight=False)
    for cell in failed:
        where = f" in {shown(cell.failed_in)}" if cell.failed_in else ""
        console.print(
            f"[red]✗[/] {shown(cell.name)} failed{where}: {shown(cell.reason or '')}",
            highlight=False,
            soft_wrap=True,
        )
    done = len(cells) - len(failed)
    console.print(f"{done} of {len(cells)} variants measured.", highlight=False)
    if any(cell.verdict is not None for cell in cells):
        console.print(verdict_table(cells))
    for name in ("report.html", "report.md", "results.json"):
        path = shown(str(result.folder.root / name))
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def verdict_table(cells: Sequence[CellResult]) -> RichTable:
    """One line a cell: its verdict, and what it rests on."""
    judged = [(cell.name, cell.verdict) for cell in cells if cell.verdict is not None]
    lines = [
        (name, Entry(verdict.verdict, tone=TONES[verdict.verdict]), verdict.why)
        for name, verdict in judged
    ]
    return rich_table(text_table(("variant", "verdict", "why"), lines), "Verdicts")


def cell_text(results: Results, cell: CellResult) -> Group:
    """A picked cell with its numbers, their 95 % intervals, and its verdict."""
    lines = []
    baseline = metrics(results, results.cell(results.baseline))
    for name, value in metrics(results, cell).items():
        ends = interval_of(results, name, cell)
        interval = "" if ends is None else " to ".join(metric_text(name, end) for end in ends)
        other = metric_text(name, baseline.get(name))
        lines.append((METRICS[name].title, metric_text(name, value), interval, other))
    heads = ("", "this variant", "95 % interval", results.baseline)
    parts: list[RenderableType] = [rich_table(text_table(heads, lines), cell.name)]
    if cell.verdict is not None:
        parts += ["", Text(printable(f"{cell.verdict.verdict}: {cell.verdict.why}"))]
    return Group(*parts)


def cell_json(results: Results, cell: CellResult) -> dict[str, Any]:
    """A picked cell for scripts: its result (the verdict is in it), metrics, and intervals."""
    values = metrics(results, cell)
    ends = {name: interval_of(results, name, cell) for name in values}
    return {
        "run": results.run,
        "cell": cell.model_dump(mode="json"),
        "metrics": values,
        "ci95": {name: bounds for name, bounds in ends.items() if bounds is not None},
    }


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """A line for each finding of doctor, and below it what puts it right."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        name = finding.name.ljust(width)
        line = f"{SIGNS[finding.status]} {name}  {shown(finding.detail)}"
        console.print(line, highlight=False, soft_wrap=True)
        if finding.fix is not None:
            console.print(
                f"  {' ' * width}  fix: {shown(finding.fix)}", highlight=False, soft_wrap=True
            )


def compressed_text(to: Path, written: dict[str, Any]) -> str:
    """What a folder in the format of compressed-tensors holds, in one line."""
    schemes, size = " and ".join(written["schemes"]), bytes_text(written["bytes"])
    text = f"{to}: {schemes}, {written['layers']} layers, {size}, read back with equal integers"
    if written["floats"]:
        text += f"; converted back to floats: {', '.join(written['floats'])}"
    if written["rounded_scales"]:
        text += "; vLLM rounds the scales to the folder's float type"
    kl = metric_text("kl", written["kl"])
    text += f"; KL from the predictions of the model folder: {kl}"
    return "\n".join((text, *price_text(written["zero_points"])))


def read_text(text: str) -> str:
    """The text itself, or the content of the file that `@FILE` names.

    Raises:
        UserError: the file cannot be read.
    """
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text[1:]}: {error}") from error


def print_insight(console: Console, record: dict[str, Any]) -> None:
    """A text with each token's background the darker, the more compute it got; and the means."""
    from reports.insight import intensity

    shares = [token["compute"] for token in record["tokens"]]
    line = Text()
    for token in record["tokens"]:
        line.append(
            printable(token["text"]), style=_background(intensity(token["compute"], shares))
        )
    console.print(line)
    kinds = [
        (kind, str(use["tokens"]), PLAIN.percent(use["compute"]))
        for kind, use in record["summary"]["kinds"].items()
    ]
    heads = ("kind", "tokens", "share of compute")
    console.print(rich_table(text_table(heads, kinds), "Compute by kind of token"))
    mean = PLAIN.percent(sum(shares) / len(shares))
    console.print(f"budget {record['budget']:g}: {mean} of the attention and MLP compute was used")


def _background(level: float) -> str:
    """The style of a token at `level` 0 to 1: white to blue, behind black or white letters."""
    red, green, blue = (round(255 + level * (end - 255)) for end in (0, 90, 170))
    ink = "white" if level > 0.6 else "black"
    return f"{ink} on rgb({red},{green},{blue})"


def print_tuned(out: Console, tuned: dict[str, Any]) -> None:
    """What `gateskip tune-draft` found."""
    out.print(rich_table(_measurements(tuned["second"]), "Bench"))
    tried = {row["system"] for row in tuned["first"]} - {"plain"}
    done = "it is now the default of the folder" if tuned["written"] else "the folder is unchanged"
    gain = PLAIN.ratio(tuned["speedup"], tuned["speedup_ci95"])
    out.print(
        f"{tuned['best']}, the fastest of {len(tried)} kinds of drafts, compared with plain"
        f" decoding: {gain}; {done}"
    )


def _measurements(rows: list[dict[str, Any]]) -> Table[None]:
    base = {row["workload"]: row for row in rows if row["system"] == rows[0]["system"]}

    def speed(row: dict[str, Any], part: str) -> tuple[str, str]:
        """The median with the least and the most, and over that of the first system."""
        numbers, first = row[part], base[row["workload"]][part]
        text = PLAIN.with_ends(numbers["median"], (numbers["min"], numbers["max"]))
        return text, PLAIN.times(numbers["median"] / first["median"])

    return text_table(
        ("system", "on", "prefill, tok/s", "x", "decode, tok/s", "x", "accepted", "same"),
        [
            (
                row["system"],
                row["workload"],
                *speed(row, "prefill_tokens_per_s"),
                *speed(row, "decode_tokens_per_s"),
                PLAIN.percent(row["acceptance_rate"]),
                "yes" if row["equal_to_first"] else "no",
            )
            for row in rows
        ],
    )
