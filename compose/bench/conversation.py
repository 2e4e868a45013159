"""A conversation with a model folder: its history, the model's context, and stopping an answer."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.bench.generate import (
    answer_ids,
    answer_text,
    chat_ids,
    open_decoder,
    prepare,
    stop_token_ids,
)
from compose.bench.text_stream import TextStream
from compose.contract import Device
from compose.errors import ArtifactError, UserError

if TYPE_CHECKING:
    from gateskip.decoding.decoder import Decoder

SHARE_OF_ANSWERS = 4
"""A quarter of the context is kept free for the answer, or less where answers are shorter."""


class StopRequest:
    """Ctrl-C (SIGINT) inside this context stops an answer with KeyboardInterrupt.

    During prefill it is raised at once. After the first token `check` raises it with the next
    token: in between kernels run, and no exception may pass through them.
    """

    def __init__(self) -> None:
        self._requested = self._writing = False

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _request(self, *_: object) -> None:
        again, self._requested = self._requested, True
        if not (again or self._writing):
            raise KeyboardInterrupt

    def check(self) -> None:
        """Note that a token was written; raises KeyboardInterrupt where SIGINT came."""
        self._writing = True
        if self._requested:
            raise KeyboardInterrupt


class Conversation:
    """The turns so far, and the model that answers. Call `load` first."""

    def __init__(
        self,
        folder: Path,
        max_new_tokens: int,
        budget: float | None = None,
        speculate: bool | None = None,
        sampling: Mapping[str, Any] | None = None,
        seed: int = 0,
        draft_model: Path | None = None,
        device: Device = "cpu",
    ) -> None:
        self.draft_model, self.device = draft_model, device
        self.folder, self.max_new_tokens, self.seed = folder, max_new_tokens, seed
        self.budget, self.speculate, self.sampling = budget, speculate, sampling
        self.messages: list[dict[str, str]] = []
        """User and assistant in turns, the oldest first."""

    def load(self) -> dict[str, Any]:
        """Load the model and make its draft: {"context"}, the most tokens that the model takes.

        Raises:
            ArtifactError: the folder has no chat template, or as `decode_settings`.
        """
        self.decoder, self.settings = open_decoder(
            self.folder,
            budget=self.budget,
            speculate=self.speculate,
            draft_model=self.draft_model,
            device=self.device,
        )
        if not getattr(self.decoder.tokenizer, "chat_template", None):
            raise ArtifactError(
                f"{self.folder} has no chat template, so it cannot chat",
                fix="chat with an instruct model, or continue a text with `gateskip generate`",
            )
        self.context = context_of(self.decoder)
        prepare(self.decoder, self.settings)
        return {"context": self.context}

    def reset(self) -> dict[str, Any]:
        """Forget all turns."""
        self.messages = []
        return {}

    def say(self, text: str, on_text: Callable[[str], None]) -> dict[str, Any]:
        """Answer a message: the result of `answer_ids`, and {"context", "used", "dropped",
        "ended"}.

        `used` is the number of tokens of the conversation with this answer, out of `context`.
        `dropped` is the number of oldest turns that no longer fit and were forgotten. `ended` is
        `stopped` (by SIGINT; an answer without text is forgotten with its message), `length` (the
        limit of tokens), or `done`.

        Raises:
            UserError: the message alone does not fit the context; nothing is forgotten.
        """
        messages, ids = self._fitting({"role": "user", "content": text})
        dropped = (len(self.messages) + 1 - len(messages)) // 2
        answered = self._answer(ids, on_text)
        self.messages = messages[:-1]
        if answered["text"] or answered["ended"] != "stopped":
            said = {"role": "assistant", "content": answered["text"]}
            self.messages = [*messages, said]
        used = len(ids) + answered["tokens"]
        return answered | {"context": self.context, "used": used, "dropped": dropped}

    def _fitting(self, message: dict[str, str]) -> tuple[list[dict[str, str]], list[int]]:
        """The newest turns and the message that leave room for an answer, and their token ids."""
        room = min(self.max_new_tokens, self.context // SHARE_OF_ANSWERS)
        messages = [*self.messages, message]
        while True:
            ids = chat_ids(self.decoder.tokenizer, messages)
            if len(ids) + room <= self.context:
                return messages, ids
            if len(messages) == 1:
                raise UserError(
                    f"the message has {len(ids)} tokens; the model takes {self.context},"
                    f" of which {room} are kept free for the answer",
                    fix="shorten the message",
                )
            messages = messages[2:]

    def _answer(self, ids: list[int], on_text: Callable[[str], None]) -> dict[str, Any]:
        """The result of `answer_ids`, or of the part written before SIGINT; and "ended"."""
        stream, stop = TextStream(self.decoder.tokenizer, on_text), StopRequest()
        limit = min(self.max_new_tokens, self.context - len(ids))

        def on_token(token: int) -> None:
            stream.add(token)
            stop.check()

        started = time.perf_counter()
        try:
            with stop:
                answered = answer_ids(
                    self.decoder,
                    self.settings,
                    ids,
                    on_token,
                    max_new_tokens=limit,
                    sampling=self.sampling,
                    seed=self.seed + len(self.messages),
                )
            ends = stop_token_ids(self.decoder)
            cut = len(stream.tokens) == limit and stream.tokens[-1] not in ends
            answered["ended"] = "length" if cut else "done"
        except KeyboardInterrupt:
            answered = {
                "text": answer_text(self.decoder.tokenizer, stream.tokens),
                "tokens": len(stream.tokens),
                "seconds": time.perf_counter() - started,
                "preparing_s": 0.0,
                "settings": self.settings,
                "stats": {},
                "kept": None,
                "ended": "stopped",
            }
        stream.finish(answered["text"])
        return answered


def context_of(decoder: Decoder) -> int:
    """Most tokens of prompt and answer together: the model's positions, without the room that
    drafts need."""
    from gateskip.decoding.prefill import cache_capacity

    positions: int = decoder.skipping.model.config.max_position_embeddings
    return positions - cache_capacity(0, 0)
