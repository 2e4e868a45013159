"""The answer of a run: which variant to take for speed, for size, for exactness, and its price.

A variant is recommended where a gain is shown, no loss of task score is shown (or it is surely
under 1 - `KEEP`), and perplexity is shown to be at most 1 / `KEEP` times the baseline's. Tasks of a
few hundred questions cannot show that little is lost, but perplexity on a few thousand tokens can.
What the evidence does not exclude stands in the variant's sentence. Drafts take memory, so a
variant with drafts has to be faster than the same weights without them, too.

| aim | among variants that | the best by |
|---|---|---|
| speed | decode faster than the baseline | decode speed |
| size | take fewer bytes on disk | bytes on disk |
| exactness | are faster or smaller | identical predictions and speed, else the lowest KL |

Other engines are not recommended: this project cannot export them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compose.analysis.families import lossless_to
from compose.analysis.intervals import MIN_QUESTIONS
from compose.analysis.metrics import gain, interval_of, metric_of
from compose.analysis.verdicts import (
    KEEP,
    LEAST_BYTES,
    as_sentence,
    gives_baselines_predictions,
    question_count,
    too_few,
)
from compose.numbers import PLAIN
from compose.results.parts import Quality
from compose.results.schema import CellResult, Results

Aim = Literal["speed", "size", "exactness"]
AIMS: tuple[Aim, ...] = ("speed", "size", "exactness")


@dataclass(frozen=True)
class Recommendation:
    """The answer to one aim. Without a cell, the sentence says why nothing is recommended."""

    aim: Aim
    cell: CellResult | None
    sentence: str
    because: str = ""
    """Why there is no cell, as a clause."""


def recommendations(results: Results) -> tuple[Recommendation, ...]:
    """One answer for each of `AIMS`, in their order."""
    return tuple(_recommended(results, aim) for aim in AIMS)


def sentence(results: Results, cell: CellResult) -> str:
    """A variant's gains and its price in plain sentences, without its name.

    What was not measured is not mentioned, except that nothing is known of the quality:

        It decodes 4.4x as fast as the original model. It takes 36 % of the original model's disk
        space. On 200 questions no loss was found, and a loss of up to 6 % of the score cannot be
        excluded. Its perplexity is 1 % higher than the original model's.
    """
    if cell.name == results.baseline:
        return "This is the original model, with which the variants are compared."
    if cell.status != "ok":
        reason = (cell.reason or "no reason was recorded").rstrip(".")
        return f"This variant was not measured: {reason}."
    gains = [*_speed(results, cell), *_size(results, cell)]
    return " ".join(map(as_sentence, [*gains, *quality_words(results, cell)]))


def quality_words(results: Results, cell: CellResult) -> list[str]:
    """What is known of the quality, as clauses."""
    check, quality = cell.lossless_check, results.quality(cell)
    if check is not None and check.lossless is False:
        return [f"its drafts change the output of {lossless_to(results, cell)}"]
    if quality is not None and gives_baselines_predictions(results, quality):
        return ["its predictions are identical to those of the original model"]
    lossless = check is not None and bool(check.lossless)
    exact = f"its drafts do not change the output of {lossless_to(results, cell)} (lossless)"
    words = [exact] if lossless else []
    measured = [] if quality is None else [*_tasks(quality), *_perplexity(results, cell)]
    kl = metric_of(results, "kl", cell)
    if not measured and kl is not None:
        measured = [f"its KL from the original model is {PLAIN.number(kl)} nats per token"]
    return [*words, *(measured or ["its quality was not measured"])]


def _recommended(results: Results, aim: Aim) -> Recommendation:
    baseline = results.find(results.baseline)
    if baseline is None or baseline.status != "ok":
        return _nothing(aim, "the original model was not measured")
    others = [c for c in results.measured if c.peer is None and c is not baseline]
    if not others:
        return _nothing(aim, "no variant was measured beside the original model")
    gaining = [cell for cell in others if GAINS[aim](results, cell) and _pays(results, cell)]
    if not gaining:
        return _nothing(aim, f"no variant is shown to be {WORDS[aim]} than the original model")
    known = [cell for cell in gaining if _unknown(results, cell) is None]
    if not known:
        reasons = dict.fromkeys(str(_unknown(results, cell)) for cell in gaining)
        return _nothing(aim, ", and ".join(reasons))
    fit = [cell for cell in known if not _shown_to_lose(results, cell)]
    if not fit:
        return _nothing(aim, f"every {WORDS[aim]} variant is shown to lose quality")
    fit = [cell for cell in fit if _shown_to_keep(results, cell)]
    if not fit:
        why = f"no {WORDS[aim]} variant is shown to keep {KEPT} of the original model's quality"
        return _nothing(aim, why)
    best = max(fit, key=lambda cell: _rank(results, cell, aim))
    return Recommendation(aim, best, sentence(results, best))


def _nothing(aim: Aim, because: str) -> Recommendation:
    words = f"Nothing is recommended for {aim}, because {because}."
    return Recommendation(aim, None, words, because)


# --- which variants are recommended --------------------------------------------------------------


def _is_faster(results: Results, cell: CellResult) -> bool:
    """Whether a higher decode speed is shown."""
    ends = interval_of(results, "decode-ratio", cell)
    return ends is not None and ends[0] > 1


def _is_smaller(results: Results, cell: CellResult) -> bool:
    share = gain(results, "size", cell)
    return share is not None and share <= 1 - LEAST_BYTES


def _pays(results: Results, cell: CellResult) -> bool:
    """Whether a variant's drafts, if it has any, are shown to be faster than the same weights
    without them, where the two were compared."""
    if not cell.speculates or results.find(cell.plain) is None or cell.speculation is None:
        return True
    ends = cell.speculation.speedup_ci95
    return ends is None or ends[0] > 1


def _is_faster_or_smaller(results: Results, cell: CellResult) -> bool:
    return _is_faster(results, cell) or _is_smaller(results, cell)


GAINS: dict[Aim, Callable[[Results, CellResult], bool]] = {
    "speed": _is_faster,
    "size": _is_smaller,
    "exactness": _is_faster_or_smaller,
}
"""Aim -> what a variant has to gain before it is recommended."""

ORIGINAL = "the original model"
NO_QUALITY = "the quality of the variants was not measured"
KEPT = f"{round(100 * KEEP)} %"

WORDS: dict[Aim, str] = {
    "speed": "faster",
    "size": "smaller",
    "exactness": "faster or smaller",
}


def _unknown(results: Results, cell: CellResult) -> str | None:
    """Why nothing can be said of the quality, or None where something can."""
    check = cell.lossless_check
    if cell.speculates and (check is None or not check.lossless):
        refuted = check is not None and check.lossless is False
        return (
            "drafts change the output"
            if refuted
            else "it was not checked whether drafts change the output"
        )
    quality = results.quality(cell)
    if quality is None:
        return NO_QUALITY
    asked = quality.retained is not None and question_count(quality) >= MIN_QUESTIONS
    bounded = any(interval_of(results, name, cell) for name in ("perplexity-ratio", "kl"))
    if asked or bounded or gives_baselines_predictions(results, quality):
        return None
    if quality.tasks:
        return too_few(quality)
    measured = quality.perplexity is not None or quality.kl_to_baseline is not None
    return "the quality of the variants has no interval" if measured else NO_QUALITY


def _shown_to_lose(results: Results, cell: CellResult) -> bool:
    """Whether a loss of quality is shown that `KEEP` does not allow."""
    quality = results.quality(cell)
    if quality is None or gives_baselines_predictions(results, quality):
        return False
    if question_count(quality) >= MIN_QUESTIONS:
        kept = quality.retained
        if kept is not None and kept.high < 1 and kept.low < KEEP:
            return True
        if _lost_tasks(quality):
            return True
    return _by_text(results, cell, end=0)


def _shown_to_keep(results: Results, cell: CellResult) -> bool:
    """Whether the whole interval of what is measured on text lies within `KEEP`."""
    quality = results.quality(cell)
    if quality is None or gives_baselines_predictions(results, quality):
        return True
    return not _by_text(results, cell, end=1)


def _by_text(results: Results, cell: CellResult, end: int) -> bool:
    """Whether this end of the interval of perplexity, or else of KL, is beyond `KEEP`."""
    ends = interval_of(results, "perplexity-ratio", cell)
    if ends is not None:
        return ends[end] > 1 / KEEP
    ends = interval_of(results, "kl", cell)
    return ends is not None and ends[end] > -math.log(KEEP)


def _rank(results: Results, cell: CellResult, aim: Aim) -> tuple[float, ...]:
    """Higher is better."""
    speed = metric_of(results, "decode-ratio", cell) or 0.0
    if aim == "speed":
        return (speed,)
    share = gain(results, "size", cell)
    smaller = -math.inf if share is None else -round(share, 2)
    if aim == "size":
        return (smaller, speed)
    quality = results.quality(cell)
    if quality is not None and gives_baselines_predictions(results, quality):
        return (0.0, speed)
    ends, kl = interval_of(results, "kl", cell), metric_of(results, "kl", cell)
    furthest = ends[1] if ends is not None else math.inf if kl is None else kl
    return (-float(f"{max(furthest, 1e-12):.1e}"), smaller, speed)


# --- the parts of a sentence ---------------------------------------------------------------------


def _speed(results: Results, cell: CellResult) -> list[str]:
    ratio = metric_of(results, "decode-ratio", cell)
    ends = interval_of(results, "decode-ratio", cell)
    if ratio is None:
        ratio = gain(results, "decode", cell)
    words = []
    if ratio is not None:
        same = ends is not None and ends[0] <= 1 <= ends[1]
        faster = f"it decodes {_times(ratio)} as fast as {ORIGINAL}"
        words.append("no difference in decode speed is shown" if same else faster)
    slower = interval_of(results, "prefill-ratio", cell)
    prompts = metric_of(results, "prefill-ratio", cell)
    if prompts is not None and slower is not None and slower[1] < 1:
        words.append(f"it processes prompts {_times(prompts)} as fast as {ORIGINAL}")
    return words


def _size(results: Results, cell: CellResult) -> list[str]:
    """Bytes on disk; bytes in memory where they are more. Other engines' memory is that of their
    process, so it is not compared."""
    share, memory = gain(results, "size", cell), gain(results, "resident", cell)
    words = []
    if share is not None:
        same = abs(share - 1) < LEAST_BYTES
        smaller = f"it takes {PLAIN.whole(100 * share)} % of the original model's disk space"
        words.append(f"it takes as much disk space as {ORIGINAL}" if same else smaller)
    if memory is not None and memory >= 1 + LEAST_BYTES and cell.peer is None:
        words.append(f"it takes {_times(memory)} the memory of {ORIGINAL}")
    return words


def _tasks(quality: Quality) -> list[str]:
    count, kept = question_count(quality), quality.retained
    if not count:
        return []
    if count < MIN_QUESTIONS:
        return [f"only {count} questions were asked, which are too few to judge quality"]
    if kept is None:
        return []
    chosen = all(score.kind == "likelihood" for score in (quality.tasks or {}).values())
    asked = f"on {count} {'multiple-choice ' if chosen else ''}questions"
    words = [f"{asked} {_loss(kept.value, kept.low, kept.high)}"]
    if len(quality.tasks or {}) > 1:
        lost = _lost_tasks(quality)
        words += [f"on {name} it lost {_percents(ends)} of the score" for name, ends in lost]
    return words


def _lost_tasks(quality: Quality) -> Sequence[tuple[str, tuple[float, float]]]:
    """Tasks that are shown to keep less than `KEEP`, with the interval of the share kept."""
    scores = (quality.tasks or {}).items()
    ends = ((name, score.retained_ci95) for name, score in scores)
    return [(name, span) for name, span in ends if span is not None and span[1] < KEEP]


def _loss(kept: float, low: float, high: float) -> str:
    """What was lost of the score, and what cannot be excluded."""
    if low > 1:
        return f"it scored {_percent(kept - 1)} higher than {ORIGINAL}"
    if high < 1:
        return (
            f"it lost {_percent(1 - kept)} of the score (95 % interval: {_percents((low, high))})"
        )
    excluded = f"a loss of up to {_percent(1 - low)} of the score cannot be excluded"
    if 1 - low < 0.0005:
        return "no loss was found"
    if 1 - kept < 0.005:
        return f"no loss was found, and {excluded}"
    chance = f"a loss of up to {_percent(1 - low)} cannot be excluded"
    return f"it lost {_percent(1 - kept)} of the score, which can be chance; {chance}"


def _perplexity(results: Results, cell: CellResult) -> list[str]:
    ratio = metric_of(results, "perplexity-ratio", cell)
    ends = interval_of(results, "perplexity-ratio", cell)
    if ratio is None:
        return []
    if ends is not None and ends[0] <= 1 <= ends[1]:
        return ["no difference in perplexity is shown"]
    if ratio >= 2:
        return [f"its perplexity is {_times(ratio)} the original model's"]
    side = "higher" if ratio > 1 else "lower"
    return [f"its perplexity is {_percent(abs(ratio - 1))} {side} than the original model's"]


def _times(ratio: float) -> str:
    """4.4x, 1.05x."""
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def _percent(share: float) -> str:
    """6 %, 0.4 %."""
    return f"{100 * share:.{0 if share >= 0.0095 else 1}f} %"


def _percents(kept: tuple[float, float]) -> str:
    """The interval of a loss, from that of the share kept: 4 to 31 %."""
    low, high = (100 * max(0.0, 1 - end) for end in reversed(kept))
    return f"{PLAIN.span(low, high, PLAIN.whole)} %"
