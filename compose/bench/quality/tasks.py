"""Scores a model on the tasks of lm-eval: `run_tasks`, and the model as lm-eval sees it.

Importing this module loads lm-eval, which takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import lm_eval
import lm_eval.tasks
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compose.analysis.intervals import mean_interval, wilson
from compose.assets import TASKS, load_task
from compose.assets.table import OURS
from compose.bench.quality.continuations import Pair, score_continuations
from compose.bench.quality.sandbox import require_limits
from compose.bench.quality.text import ScoredModel
from compose.errors import AssetError, UserError, suggest
from compose.units import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = (
    "acc_norm",
    "acc",
    "f1",
    "pass@1",
    "exact_match",
)  # the first that a task has is reported
FALLBACK_LENGTH = 2048  # longest input where the tokenizer does not know the model's
LONGEST_ANSWER = 256  # tokens, where a task does not say; lm-eval's own default


@runtime_checkable
class GeneratingModel(ScoredModel, Protocol):
    """A model that can also continue prompts."""

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations, each of up to `new_tokens` or to a token of `stop_tokens`."""


@dataclass(frozen=True)
class TaskScore:
    """A task's score: the mean over its questions, each between 0 and 1."""

    metric: str
    value: float
    n: int
    ci95: tuple[float, float]
    """Wilson's interval for answers that are right or wrong, otherwise a bootstrap interval."""
    data: str
    """Where the questions came from."""
    kind: Literal["likelihood", "generative"]
    """Whether the model ranked given answers, or wrote them."""
    outcomes: tuple[float, ...]
    """The score of each question, in the order asked, to 4 decimals."""
    questions: str
    """Hash of the questions, 16 hex digits. Where it is equal, the outcomes of two models are
    compared question by question."""


def run_tasks(
    model: ScoredModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Progress | None = None,
    written: Callable[[str], None] | None = None,
) -> dict[str, TaskScore]:
    """Score `model` on tasks of lm-eval: its prompts and metrics, the first `limit` questions.

    `written` is called with a task's name after each batch of its answers. Tasks in
    `compose.assets.TASKS` are read from local files; others come from the hub.

    Raises:
        UserError: a task is unknown, or needs written answers from a model that cannot generate.
        AssetError: a task's questions are not available.
    """
    if not tasks:
        return {}
    if any(name in TASKS and TASKS[name].runs_code for name in tasks):
        require_limits()
    with tempfile.TemporaryDirectory(prefix="gateskip-tasks-") as scratch:
        ours = [name for name in tasks if name in TASKS]
        origins = {name: _define(name, Path(scratch), cache, limit) for name in ours}
        manager = _manager(Path(scratch), tasks)
        scorer = Scorer(model, batch_size=batch_size, progress=progress, written=written)
        chats = [name for name in ours if TASKS[name].chat and model.tokenizer.chat_template]
        evaluations: dict[str, dict[str, Any]] = {}
        try:
            for templated in (False, True):
                names = [name for name in tasks if (name in chats) == templated]
                if names:
                    evaluation = lm_eval.simple_evaluate(
                        model=scorer,
                        tasks=names,
                        limit=limit,
                        apply_chat_template=templated,
                        bootstrap_iters=0,
                        log_samples=True,
                        task_manager=manager,
                    )
                    evaluations |= dict.fromkeys(names, evaluation)
        except NotImplementedError as error:
            raise UserError(str(error), fix=f"choose among {', '.join(TASKS)}") from error
        except (ConnectionError, FileNotFoundError) as error:
            raise AssetError(
                f"the questions of a task among {', '.join(tasks)} are not available: {error}",
                fix=f"go online, or choose among {', '.join(TASKS)}",
            ) from error
    return {
        name: _score(name, evaluations[name], origins.get(name, "hub:lm-eval")) for name in tasks
    }


def _define(name: str, folder: Path, cache: Path | None, limit: int | None = None) -> str:
    """Write lm-eval's definition of the task with our rows as its data; returns the rows' origin.

    Only the first `limit` rows are written: lm-eval would otherwise prepare all of them.
    """
    data = load_task(name, cache)
    definition = _definition(name, data.definition)
    rows = folder / f"{name}.jsonl"
    with data.path.open(encoding="utf-8") as lines:
        rows.write_text("".join(islice(lines, limit)), encoding="utf-8")
    splits = {f"{split}_split": None for split in ("training", "validation", "test", "fewshot")}
    text = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {data.split: str(rows)},
            "cache_dir": str(folder / "datasets"),
        },
        **splits,
        f"{data.split}_split": data.split,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    return data.origin


def _definition(name: str, place: str) -> Path:
    """The task's YAML file: this project's, or that of the installed lm-eval."""
    if place.startswith(OURS):
        return Path(__file__).parents[2] / "data" / "tasks" / place.removeprefix(OURS)
    theirs = Path(lm_eval.tasks.__file__).parent / place
    if not theirs.is_file():
        raise UserError(f"this version of lm-eval has no task {name!r} at {place}")
    return theirs


def _manager(folder: Path, tasks: Sequence[str]) -> lm_eval.tasks.TaskManager:
    """An index of the task files in `folder`, and of lm-eval's where `tasks` name one of them.

    Indexing lm-eval's thousands of tasks takes many seconds.

    Raises:
        UserError: neither has a task of that name.
    """
    others = [name for name in tasks if name not in TASKS]
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=bool(others))
    for name in others:
        if name not in manager.all_tasks:
            raise UserError(
                f"lm-eval has no task {name!r}: {suggest(name, TASKS)}",
                fix="`lm-eval ls tasks` lists all others",
            )
    return manager


def _score(name: str, evaluation: dict[str, Any], origin: str) -> TaskScore:
    metric, filtered = _metric_of(name, evaluation["results"][name])
    value = float(evaluation["results"][name][f"{metric},{filtered}"])
    members = evaluation.get("group_subtasks", {}).get(name) or [name]
    samples = [
        sample
        for member in members
        for sample in sorted(evaluation["samples"][member], key=lambda entry: entry["doc_id"])
        if sample["filter"] == filtered
    ]
    outcomes = tuple(round(float(sample[metric]), 4) for sample in samples)
    kinds = {evaluation["configs"][member]["output_type"] for member in members}
    return TaskScore(
        metric=metric,
        value=value,
        n=len(outcomes),
        ci95=score_interval(value, outcomes),
        data=origin,
        kind="generative" if "generate_until" in kinds else "likelihood",
        outcomes=outcomes,
        questions=_digest_of(samples),
    )


def _metric_of(name: str, measured: Mapping[str, Any]) -> tuple[str, str]:
    """The metric to report and its answer filter, unfiltered ones first."""
    pairs = [key.split(",") for key in measured if "," in key and "_stderr" not in key]
    for metric in METRICS:
        filters = [filtered for key, filtered in pairs if key == metric]
        if filters:
            return metric, "none" if "none" in filters else min(filters)
    names = sorted(metric for metric, _ in pairs)
    raise UserError(f"task {name!r} has no accuracy, only {', '.join(names)}")


def _digest_of(samples: Sequence[Mapping[str, Any]]) -> str:
    """16 hex digits over the questions, their prompts and right answers, in order."""
    hashes = [
        [sample[f"{part}_hash"] for part in ("doc", "prompt", "target")] for sample in samples
    ]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def score_interval(value: float, outcomes: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of outcomes between 0 and 1."""
    spread = mean_interval(outcomes)
    if spread is None or all(outcome in (0, 1) for outcome in outcomes):
        return wilson(value, len(outcomes))
    return spread.low, spread.high


def longest_input(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model takes, by its tokenizer; absurd numbers are ignored."""
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and length < 1 << 24 else FALLBACK_LENGTH


# --- The model as lm-eval sees it ---------------------------------------------------------------


class Scorer(TemplateLM):  # type: ignore[misc]  # lm-eval has no annotations
    """A scored model as a model class of lm-eval."""

    def __init__(
        self,
        model: ScoredModel,
        *,
        batch_size: int,
        progress: Progress | None = None,
        written: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self._written = written
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_size = batch_size
        self.max_length = longest_input(model.tokenizer)
        self._progress = progress
        self._stop_tokens: dict[tuple[str, ...], list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end: int | None = self.tokenizer.eos_token_id
        return 0 if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests, which is not used."""
        return "scored"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one text; without the start of an answer, the last message goes on."""
        text: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the tokens that the tokenizer itself puts before a text."""
        begin = self.tokenizer.bos_token
        special = add_special_tokens
        if special is None:
            special = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation) its log-probability, and whether it is greedy."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._pairs([(context, ending) for _, context, ending in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """For each whole text its log-probability, in windows as long as the model takes."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = self._pairs([make_disjoint_window(window) for window in windows])
            totals.append(sum(value for value, _ in scored))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy continuation of each context, cut at the task's stop strings."""
        if not isinstance(self.model, GeneratingModel):
            names = sorted({str(request.task_name) for request in requests})
            raise NotImplementedError(f"{', '.join(names)}: this model cannot generate answers")
        queue = [_Request.of(self, index, request) for index, request in enumerate(requests)]
        answers = [""] * len(queue)
        done = 0
        for batch in _batches(queue, self.batch_size):
            limit, stops = max(request.limit for request in batch), batch[0].stops
            if any(request.stops != stops for request in batch):
                stops = ()
            prompts = [request.prompt for request in batch]
            generated = self.model.generate(prompts, limit, self._stop_ids(stops))
            for request, tokens in zip(batch, generated, strict=True):
                text = self.tokenizer.decode(tokens[: request.limit], skip_special_tokens=True)
                answers[request.index] = _cut(str(text), request.stops)
            if self._written is not None:
                self._written(batch[0].task)
            done += len(batch)
            if self._progress is not None:
                self._progress(done, len(queue), "generating answers")
        return answers

    def _stop_ids(self, stops: tuple[str, ...]) -> list[int]:
        """Tokens that end an answer: the end of text, and all that contain a whole stop string."""
        if stops not in self._stop_tokens:
            words = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            held = [i for i, word in enumerate(words) if any(stop in word for stop in stops)]
            self._stop_tokens[stops] = sorted({self.eot_token_id, *held})
        return self._stop_tokens[stops]

    def _pairs(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return score_continuations(
            self.model,
            pairs,
            batch_size=self.batch_size,
            max_length=self.max_length,
            progress=self._progress,
        )


@dataclass(frozen=True)
class _Request:
    """One request for free text."""

    index: int
    prompt: list[int]
    limit: int
    stops: tuple[str, ...]
    task: str

    @classmethod
    def of(cls, scorer: Scorer, index: int, request: Any) -> _Request:
        context, settings = request.args
        if settings.get("do_sample") and settings.get("temperature", 0):
            raise NotImplementedError(f"{request.task_name}: answers are generated greedily here")
        limit = int(settings.get("max_gen_toks", LONGEST_ANSWER))
        until = settings.get("until") or []
        stops = tuple([until] if isinstance(until, str) else until)
        ids = scorer.tok_encode(context)[-(scorer.max_length - limit) :]
        return cls(index, ids, limit, stops, str(request.task_name))


def _batches(requests: Sequence[_Request], size: int) -> Iterator[list[_Request]]:
    """Requests of one task in batches of `size`, equal settings together and the longest prompts
    first."""
    for task in sorted({request.task for request in requests}):
        group = [request for request in requests if request.task == task]
        group.sort(key=lambda request: (request.limit, request.stops, -len(request.prompt)))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
