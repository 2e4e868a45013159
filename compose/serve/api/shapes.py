"""The answers of OpenAI's API as JSON: of chats and of completions, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from compose.serve.api.answer import TokenLogprob, TokenShare
from compose.serve.api.calls import CallDelta
from gateskip.serving.requests import Finished, FinishReason, Receipt, Request

ENDINGS: Mapping[FinishReason, str] = {"stop": "stop", "length": "length", "deadline": "length"}
"""`finish_reason` of the answers that are given to clients."""

JSON = dict[str, Any]
Logprobs = Sequence[TokenLogprob] | None


class Shape(Protocol):
    """How a kind of request is answered."""

    whole: str
    chunk: str
    """`object` of a whole answer, and of a chunk of a stream."""
    prefix: str

    def choice(self, text: str, logprobs: Logprobs, calls: Sequence[CallDelta]) -> JSON:
        """The answer's own fields, of a whole answer."""

    def delta(
        self, text: str, logprobs: Logprobs, calls: Sequence[CallDelta], *, first: bool
    ) -> JSON:
        """The same of a chunk."""


class Chat:
    """/v1/chat/completions."""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, text: str, logprobs: Logprobs, calls: Sequence[CallDelta]) -> JSON:
        """{"message", "logprobs"}."""
        message: JSON = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        return {"message": message, "logprobs": _chat_logprobs(logprobs)}

    def delta(
        self, text: str, logprobs: Logprobs, calls: Sequence[CallDelta], *, first: bool
    ) -> JSON:
        """{"delta", "logprobs"}; the role comes with the first chunk."""
        delta: JSON = {"role": "assistant"} if first else {}
        delta |= {"content": text} if text or (first and not calls) else {}
        delta |= {"tool_calls": [{"index": c.index, **_call(c)} for c in calls]} if calls else {}
        return {"delta": delta, "logprobs": _chat_logprobs(logprobs)}


class Completion:
    """/v1/completions."""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, text: str, logprobs: Logprobs, calls: Sequence[CallDelta]) -> JSON:
        """{"text", "logprobs"}; a completion calls no functions."""
        return {"text": text, "logprobs": _text_logprobs(logprobs)}

    def delta(
        self, text: str, logprobs: Logprobs, calls: Sequence[CallDelta], *, first: bool
    ) -> JSON:
        """{"text", "logprobs"}."""
        return self.choice(text, logprobs, calls)


class Envelope:
    """The fields around the choices, equal in all chunks of a stream."""

    def __init__(self, shape: Shape, model: str) -> None:
        self.shape, self._model = shape, model
        self._id = f"{shape.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: Sequence[JSON], **more: Any) -> JSON:
        """A whole answer."""
        return self._around(self.shape.whole, choices, more)

    def chunk(self, choices: Sequence[JSON], **more: Any) -> JSON:
        """A chunk of a stream."""
        return self._around(self.shape.chunk, choices, more)

    def _around(self, kind: str, choices: Sequence[JSON], more: Mapping[str, Any]) -> JSON:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": list(choices),
            **more,
        }


def ended(finished: Finished | None, *, called: bool) -> JSON:
    """{"finish_reason"}: None while the answer goes on; `called` says whether it has a call."""
    reason = None if finished is None else ENDINGS.get(finished.reason)
    return {"finish_reason": "tool_calls" if called and reason == "stop" else reason}


def token_shares(shares: Sequence[TokenShare]) -> JSON:
    """The field `gateskip` of a choice: the share of compute of each token, with its text."""
    parts = [
        {"text": part.text, "compute": None if part.compute is None else round(part.compute, 4)}
        for part in shares
    ]
    return {"gateskip": {"token_shares": parts}}


def usage(receipts: Sequence[Receipt], answers: int) -> JSON:
    """Counts of tokens. The `answers` answers to one prompt read it once."""
    firsts = receipts[::answers]
    prompt = sum(receipt.prompt_tokens for receipt in firsts)
    new = sum(receipt.new_tokens for receipt in receipts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(r.reused_tokens for r in firsts)},
    }


def receipt_of(receipts: Sequence[Receipt], request: Request) -> JSON:
    """The field `gateskip` of an answer: the mode, drafted and skipped work, and times in
    seconds."""
    skipped = [(r.skipped, r.new_tokens) for r in receipts if r.skipped is not None]
    tokens = sum(new for _, new in skipped)
    share = sum(share * new for share, new in skipped) / tokens if tokens else None
    return {
        "mode": request.mode,
        "budget": receipts[0].budget,
        "drafted": sum(r.drafted for r in receipts),
        "accepted": sum(r.accepted for r in receipts),
        "looked_up": sum(r.looked_up for r in receipts),
        "skipped": share,
        "queued_s": round(max(r.queued_s for r in receipts), 6),
        "first_token_s": round(max(r.first_token_s for r in receipts), 6),
        "total_s": round(max(r.total_s for r in receipts), 6),
    }


def _call(call: CallDelta) -> JSON:
    """A call, or what is new in it; its id and its name come once."""
    if call.name is None:
        return {"function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _chat_logprobs(logprobs: Logprobs) -> JSON | None:
    if logprobs is None:
        return None
    return {"content": [_chat_logprob(token) for token in logprobs], "refusal": None}


def _chat_logprob(token: TokenLogprob) -> JSON:
    top = [
        {"token": text, "logprob": logprob, "bytes": list(raw)} for text, raw, logprob in token.top
    ]
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.raw),
        "top_logprobs": top,
    }


def _text_logprobs(logprobs: Logprobs) -> JSON | None:
    if logprobs is None:
        return None
    return {
        "tokens": [token.text for token in logprobs],
        "token_logprobs": [token.logprob for token in logprobs],
        "top_logprobs": [{text: value for text, _, value in token.top} for token in logprobs],
        "text_offset": [token.offset for token in logprobs],
    }
