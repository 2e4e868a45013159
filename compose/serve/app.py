"""The paths of the server, and the function that answers each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from compose.serve.api.answer import Answer
from compose.serve.api.body import read_json
from compose.serve.api.calls import CallReader
from compose.serve.api.errors import ApiError, invalid
from compose.serve.api.fields import ChatBody, CompletionBody, Options, TokenizeBody, parsed
from compose.serve.api.generation import Generation, Scheduler, stopping
from compose.serve.api.shapes import Chat, Completion, Envelope, Shape
from compose.serve.api.strict import Body
from compose.serve.api.text import AnswerText
from compose.serve.api.token_bytes import TokenBytes
from compose.serve.call_format import CallFormat
from compose.serve.constraint import Constraint
from compose.serve.entrance import App, Entrance, Receive, Scope, Send, error_response
from compose.serve.metrics import Metrics
from compose.serve.model import ServedModel
from compose.serve.page import page_response
from compose.serve.settings import ServeSettings

LOG = logging.getLogger("gateskip.serve")
Result = TypeVar("Result")
Asked = TypeVar("Asked", bound=Body)
Bounded = TypeVar("Bounded", bound=Options)
Endpoint = Callable[[Request], Awaitable[Response]]


class Service:
    """Answers the requests to one model."""

    def __init__(
        self, settings: ServeSettings, model: ServedModel, scheduler: Scheduler, metrics: Metrics
    ) -> None:
        self.settings, self.model, self.scheduler = settings, model, scheduler
        self.metrics = metrics
        self.draining = False
        self._bytes = TokenBytes(model.tokenizer)
        self._began = int(time.time())
        self._encoding = ThreadPoolExecutor(1, "tokenizer")
        self._grammars = ThreadPoolExecutor(1, "grammars")

    def app(self) -> App:
        """The ASGI application."""
        routes = [
            Route("/", page_response),
            Route("/health", self._guarded(self.health)),
            Route("/metrics", self._guarded(self.show_metrics)),
            Route("/tokenize", self._guarded(self.tokenize), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_path})
        return Entrance(app, self.settings, self.metrics.count_status)

    # -- the endpoints -------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, 503 while the server stops."""
        if self.draining:
            raise stopping()
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """The counts as Prometheus reads them."""
        text, kind = self.metrics.text(self.scheduler.snapshot())
        return Response(text, media_type=kind)

    async def models(self, request: Request) -> Response:
        """The names of the model, and how it can skip."""
        same = {"object": "model", "created": self._began, "owned_by": "gateskip"}
        same |= {"gateskip": self.model.skipping}
        listed = [{"id": name, **same} for name in self.model.names]
        return JSONResponse({"object": "list", "data": listed})

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, or of a chat by the model's template."""
        body = await self._read(request, TokenizeBody)
        if body.messages is not None:
            ids = await self._encode(self.model.chat_prompt, body.messages)
        else:
            ids = await self._encode(self.model.text_prompt, body.prompt or "")
        context = self.model.limits.context
        return JSONResponse({"tokens": ids, "count": len(ids), "max_context": context})

    async def chat(self, request: Request) -> Response:
        """Answer the messages of a chat."""
        body = await self._read(request, ChatBody)
        constraint = await self._constraint(self.model.chat_constraint, body)
        prompt = await self._encode(self.model.chat_prompt, body.messages, body.callable_tools)
        answering = partial(self._answer, body, form=self.model.call_format(body), strip=True)
        return self._answered(body, [prompt], constraint, Chat(), answering)

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        body = await self._read(request, CompletionBody)
        constraint = await self._constraint(self.model.constraint, body)
        prompts = [await self._encode(self.model.text_prompt, prompt) for prompt in body.prompt]
        answering = partial(self._answer, body, form=None, strip=False)
        return self._answered(body, prompts, constraint, Completion(), answering)

    # -- their parts ---------------------------------------------------------------------------

    async def _read(self, request: Request, kind: type[Asked]) -> Asked:
        body = parsed(kind, await read_json(request, self.settings.max_body_kb * 1024))
        self.model.require_name(getattr(body, "model", None))
        return body

    async def _encode(self, encode: Callable[..., list[int]], *given: Any) -> list[int]:
        """Token ids of a text."""
        return await in_thread(self._encoding, encode, *given)

    async def _constraint(
        self, make: Callable[[Bounded], Constraint | None], body: Bounded
    ) -> Constraint | None:
        """The grammar of an answer, in a thread of its own: a large schema takes seconds, for which
        free answers do not wait."""
        if not body.constrained:
            return None
        return await in_thread(self._grammars, make, body)

    def _answer(
        self, options: Options, index: int, *, form: CallFormat | None, strip: bool
    ) -> Answer:
        """An answer that has not begun, with calls of that form if it may have any."""

        def text(strip: bool) -> AnswerText:
            return AnswerText(self.model.tokenizer, options.stop, strip=strip)

        calls = None if form is None else CallReader(form, partial(text, False))
        shares = options.gateskip.token_shares
        return Answer(index, text(strip), self._bytes, self.model.eos, calls, with_shares=shares)

    def _answered(
        self,
        options: Options,
        prompts: Sequence[Sequence[int]],
        constraint: Constraint | None,
        shape: Shape,
        answer: Callable[[int], Answer],
    ) -> Response:
        """The response that answers prompts: it decodes when it is sent."""
        limit = self.model.limits.queue
        if len(prompts) * options.n > limit:
            raise invalid(f"one request may ask for at most {limit} answers", "n")
        requests = [one for ids in prompts for one in self.model.requests(ids, options, constraint)]
        answers = [answer(index) for index in range(len(requests))]
        envelope = Envelope(shape, self.model.names[0])
        generation = Generation(self.scheduler, requests, answers, envelope, n=options.n)
        return Answering(generation, options)

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint; what it raises becomes an error in OpenAI's form."""

        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Exception as error:
                return error_response(api_error(error))

        return answer


class Answering(Response):
    """Sends an answer, whole or as a stream, and cancels it when the client leaves."""

    def __init__(self, generation: Generation, options: Options) -> None:
        self._generation, self._stream = generation, options.stream
        asked = options.stream_options
        self._with_usage = asked is not None and asked.include_usage
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        send_it = self._send_stream if self._stream else self._send_whole
        try:
            scope["gateskip"]["gone"] = not await unless_gone(
                receive, send_it(scope, receive, send)
            )
        finally:
            self._generation.cancel()
            if receipts := self._generation.receipts:
                scope["gateskip"] |= {
                    "prompt": receipts[0].prompt_tokens,
                    "new": sum(receipt.new_tokens for receipt in receipts),
                    "first_s": min(receipt.first_token_s for receipt in receipts),
                }

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(await self._generation.whole())
        except Exception as error:
            response = error_response(api_error(error))
        await response(scope, receive, send)

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events():
            body = b"data: " + event + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._generation.chunks(with_usage=self._with_usage):
                yield _json(chunk)
        except Exception as error:
            yield _json(api_error(error).body())
        else:
            yield b"[DONE]"


async def in_thread(
    executor: ThreadPoolExecutor, compute: Callable[..., Result], *given: Any
) -> Result:
    """The result of a call in a thread: others are answered meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(executor, compute, *given)


async def unless_gone(receive: Receive, sending: Awaitable[None]) -> bool:
    """Await `sending`, or stop it when the client leaves; whether the client stayed."""
    work = asyncio.ensure_future(sending)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return False
        work.result()
        return True
    except OSError:  # the connection broke while something was sent
        return False
    finally:
        for task in (work, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def api_error(error: Exception) -> ApiError:
    """The error that a client gets. Of an unexpected one the log has the place, and neither the
    message nor any text of the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "the client left", code="disconnected")
    place = "".join(traceback.format_tb(error.__traceback__))
    LOG.error("a request failed: %s\n%s", type(error).__name__, place)
    return ApiError(500, "the server failed on this request", code="internal_error")


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        known = ApiError(405, f"{request.method} is not answered here", code="wrong_method")
    else:
        known = ApiError(error.status_code, "there is no such path", code="not_found")
    known.headers.update(error.headers or {})
    return error_response(known)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
