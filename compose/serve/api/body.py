"""Reading a request's body as JSON, within limits of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from compose.serve.api.errors import ApiError, invalid

BODY_S = 30.0
"""Seconds that a client may take to send a body."""


async def read_json(request: Request, most_bytes: int) -> Any:
    """The value in a body. Raises ApiError where it is too large, too slow, or not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "send JSON, with the header `Content-Type: application/json`"
        raise ApiError(415, message, code="wrong_content_type")
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read(request, most_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body took over {BODY_S:g} s", code="timeout") from None
    return _value(body)


async def _read(request: Request, most_bytes: int) -> bytes:
    too_large = ApiError(
        413, f"the body is larger than {most_bytes} bytes (--max-body-kb)", code="body_too_large"
    )
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise too_large
    return bytes(body)


def _value(body: bytes) -> Any:
    try:
        value = json.loads(body)
        if b"\\ud" in body.lower():  # halves of surrogate pairs are no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the body is not valid JSON: {reason[:200]}", code="invalid_json") from None
    return value
