"""What every request passes first: the key, the host, and the line in the log."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from compose.serve.api.errors import ApiError
from compose.serve.settings import LOOPBACK, ServeSettings

LOG = logging.getLogger("gateskip.serve")
OPEN = ("/", "/health")
"""Paths that need no key."""
GONE = 499
"""The status in the log of a request whose client left."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Entrance:
    """Checks each request, hands it to `app`, and logs it without its content."""

    def __init__(self, app: App, settings: ServeSettings, on_status: Callable[[int], None]) -> None:
        self._app, self._settings, self._on_status = app, settings, on_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), GONE
        scope["gateskip"] = {}

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = self._app if refusal is None else error_response(refusal)
            await app(scope, receive, noted)
        finally:
            self._log(scope, GONE if scope["gateskip"].get("gone") else status, started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._is_our_host(headers.get("host", "")):
            message = "this host name is not served: use localhost, or start the server with a key"
            return ApiError(403, message, code="wrong_host")
        if scope["path"] not in OPEN and not self._has_key(headers.get("authorization", "")):
            hint = "send the header `Authorization: Bearer KEY`"
            return ApiError(
                401,
                f"the API key is missing or wrong: {hint}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _has_key(self, authorization: str) -> bool:
        key = self._settings.api_key
        if key is None:
            return True
        given = authorization.removeprefix("Bearer ")
        return hmac.compare_digest(given.encode("latin-1"), key.encode("utf-8"))

    def _is_our_host(self, host: str) -> bool:
        """Without a key, a page whose name leads to this machine could use a local server."""
        if self._settings.api_key is not None or not self._settings.loopback:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return name.strip("[]").lower() in LOOPBACK

    def _log(self, scope: Scope, status: int, started: float) -> None:
        self._on_status(status)
        seconds, noted = time.perf_counter() - started, scope["gateskip"]
        parts = [scope["method"], _printable(scope["path"]), str(status), f"{seconds:.3f} s"]
        if "prompt" in noted:
            parts.append(f"{noted['prompt']} + {noted['new']} tokens")
        if "first_s" in noted:
            parts.append(f"first after {noted['first_s']:.3f} s")
        LOG.info("%s", " ".join(parts[:3]) + ", " + ", ".join(parts[3:]))


def error_response(error: ApiError) -> JSONResponse:
    """The response to a request that is refused."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _printable(path: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in path[:100])
