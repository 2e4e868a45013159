"""The compiled kernels, as a new process finds them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateskip.kernels import build


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew, and again afterwards."""
    build._loaded.cache_clear()
    yield
    build._loaded.cache_clear()
