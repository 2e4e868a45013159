"""The page at `/`: a chat in the browser, which needs nothing but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

FILE = Path(__file__).parents[1] / "templates" / "serve.html"


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The page, and headers that let no other script run and nothing else be fetched."""
    text = FILE.read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self';"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    return text, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


async def page_response(request: Request) -> Response:
    """The page."""
    text, headers = _page()
    return HTMLResponse(text, headers=headers)
