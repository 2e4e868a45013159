"""A model of ours as lm-eval sees models. Importing this loads lm-eval, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compose.assets.fetch import Progress
from compose.bench.quality import Pair, ScoredModel, longest_input, score_continuations

LONGEST_ANSWER = 256  # tokens, where a task does not say; as lm-eval has it


class Scorer(TemplateLM):  # type: ignore[misc]  # lm-eval has no annotations
    """Answers lm-eval's requests: scores by `score_continuations`, texts by the model's `write`."""

    def __init__(
        self, model: ScoredModel, *, batch_size: int, progress: Progress | None = None
    ) -> None:
        super().__init__()
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
        """What stands before a text that has no context."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the tokens before a text that the tokenizer sets by itself."""
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
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

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
        """What the model writes after each context, greedily, cut where the task says."""
        if not hasattr(self.model, "write"):
            names = sorted({str(request.task_name) for request in requests})
            raise NotImplementedError(f"{', '.join(names)}: this model cannot write its answers")
        asked = [_Asked.of(self, index, request) for index, request in enumerate(requests)]
        answers = [""] * len(asked)
        asked.sort(key=lambda each: (each.limit, each.stops, -len(each.prompt)))
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            limit, stops = max(each.limit for each in batch), batch[0].stops
            if any(each.stops != stops for each in batch):
                stops = ()
            prompts = [each.prompt for each in batch]
            written = self.model.write(prompts, limit, self._ends(stops))
            for each, tokens in zip(batch, written, strict=True):
                text = self.tokenizer.decode(tokens[: each.limit], skip_special_tokens=True)
                answers[each.index] = _cut(text, each.stops)
            if self._progress is not None:
                self._progress(start + len(batch), len(asked), "writing answers")
        return answers

    def _ends(self, stops: tuple[str, ...]) -> list[int]:
        """Tokens that end an answer: the end of text, and all that hold a whole stop string."""
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
class _Asked:
    """One request for free text."""

    index: int
    prompt: list[int]
    limit: int
    stops: tuple[str, ...]

    @classmethod
    def of(cls, scorer: Scorer, index: int, request: Any) -> _Asked:
        context, settings = request.args
        if settings.get("do_sample") and settings.get("temperature", 0):
            raise NotImplementedError(f"{request.task_name}: answers are written greedily here")
        limit = int(settings.get("max_gen_toks", LONGEST_ANSWER))
        until = settings.get("until") or []
        stops = tuple([until] if isinstance(until, str) else until)
        ids = scorer.tok_encode(context)[-(scorer.max_length - limit) :]
        return cls(index, ids, limit, stops)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
