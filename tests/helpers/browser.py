"""The Chromium in which pages are tested, and the mark of tests that need it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
MISSING = [
    *([] if CHROMIUM else ["Chromium (apt-get install chromium, or CHROMIUM names one)"]),
    *(
        f"{name} (pip install -e '.[dev]')"
        for name in ("playwright", "axe_playwright_python")
        if importlib.util.find_spec(name) is None
    ),
]
needs_chromium = pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")


@contextmanager
def launched() -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()
