"""A model of ours as lm-eval sees models. Importing this loads lm-eval, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compose.assets.fetch import Progress
from compose.bench.quality import Pair, ScoredModel, longest_input, score_continuations


class Scorer(TemplateLM):  # type: ignore[misc]  # lm-eval has no annotations
    """Answers lm-eval's requests by `score_continuations`."""

    def __init__(
        self, model: ScoredModel, *, batch_size: int, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_size = batch_size
        self.max_length = longest_input(model.tokenizer)
        self._progress = progress

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
        """Not offered: only tasks that score given answers are."""
        names = sorted({str(request.task_name) for request in requests})
        raise NotImplementedError(
            f"{', '.join(names)}: tasks in which the model writes its answer are not offered, "
            "only tasks that score given answers"
        )

    def _pairs(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return score_continuations(
            self.model,
            pairs,
            batch_size=self.batch_size,
            max_length=self.max_length,
            progress=self._progress,
        )
