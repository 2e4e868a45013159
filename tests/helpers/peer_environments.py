"""Environments of other engines: those that were made before, and those that tests make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compose.assets import default_cache
from compose.bench.peers.environment import environment_folder, python_of
from compose.bench.peers.table import Engine
from compose.errors import UserError

BUILD = "GATESKIP_BUILD_PEERS"
"""Names the engines whose environments are made where they are missing. An engine that pip cannot
install here is skipped; with `all`, as `make peers-test` says, it is an error."""
USERS_CACHE = default_cache()
"""Where environments are kept; tests have caches of their own."""

_failed: dict[str, str] = {}


def environment_of(engine: Engine) -> Path:
    """The folder of an engine's environment; the test is skipped where there is none."""
    folder = environment_folder(engine, USERS_CACHE)
    names = os.environ.get(BUILD, "").split(",")
    if not (folder / "asset.json").is_file():
        if engine.name not in names and names != ["all"]:
            pytest.skip(f"no environment of {engine.name}: make peers-test")
        if engine.name in _failed:
            pytest.skip(_failed[engine.name])
        try:
            python_of(engine, USERS_CACHE)
        except UserError as error:
            if names == ["all"]:
                raise
            _failed[engine.name] = str(error)
            pytest.skip(str(error))
    return folder
