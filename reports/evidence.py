"""Where the results keep a metric's 95 % interval."""

from __future__ import annotations

from compose.results.schema import CellResult, Results

Ends = tuple[float, float]


def interval_of(results: Results, cell: CellResult, metric: str) -> Ends | None:
    """The ends of the interval of a cell's metric (`METRICS`), or None: it has none, or is exact.

    Decode and prefill speed have that of their paired ratio to the baseline, as a ratio.
    """
    quality, speed, speculation = results.quality(cell), cell.speed, cell.speculation
    if metric in ("decode", "prefill"):
        ratio = None if speed is None else getattr(speed, f"{metric}_ratio")
        return None if ratio is None else (ratio.low, ratio.high)
    if metric == "speedup":
        return None if speculation is None else speculation.speedup_ci95
    if metric == "perplexity-ratio":
        perplexity = None if quality is None else quality.perplexity
        return None if perplexity is None else perplexity.ratio_ci95
    if metric == "kl":
        return None if quality is None else quality.kl_ci95
    return None
