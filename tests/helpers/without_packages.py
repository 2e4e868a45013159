"""A Python script in a process of its own, in which some packages cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HIDE = "import json, sys\nfor name in {names!r}:\n    sys.modules[name] = None\n"


def run_without(
    packages: Iterable[str], script: str, argument: Any, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder`, with caches of the hub there; `argument` is JSON in sys.argv[1].

    Importing one of `packages` fails in it. The test fails where the script does.
    """
    caches = {"HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    code = HIDE.format(names=tuple(packages)) + script
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(argument)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | caches,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done
