"""An environment for each other engine, made once by pip in the asset cache, apart from this one.

cache/peers/NAME-HASH       the environment, complete or absent; HASH is over this
                            interpreter's version, the ranges and, for compiled packages, the
                            processor
cache/peers/NAME-HASH.log   pip's output when it was made
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compose.assets.fetch import build_once
from compose.bench.peers.table import Engine
from compose.errors import UserError
from compose.numbers import duration_text
from compose.units import Progress

POLL_S = 0.5
LAST_LINES = 12
"""Lines of pip's log that an error shows."""

VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        sys.exit("the distribution " + name + " is missing")
print(json.dumps(found))
"""


def python_of(engine: Engine, cache: Path, progress: Progress | None = None) -> Path:
    """The interpreter that runs an engine's script; makes its environment where none exists.

    An engine without requirements runs by this interpreter, in a separate process.

    Raises:
        UserError: the engine cannot be installed on this machine; with pip's last lines and its
        log.
    """
    if not engine.requirements:
        return Path(sys.executable)
    target = environment_folder(engine, cache)
    build_once(
        target,
        lambda folder: _build(engine, folder, target.with_name(f"{target.name}.log"), progress),
        note=f"the environment of {engine.name}",
    )
    return _python(target)


def environment_folder(engine: Engine, cache: Path) -> Path:
    """The folder of an engine's environment, which may not exist yet."""
    decides: list[Any] = [
        platform.python_version(),
        platform.machine(),
        engine.requirements,
        engine.pip_options,
        dict(engine.variables),
        _processor() if engine.compiled else "",
    ]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    return cache / "peers" / f"{engine.name}-{digest}"


def versions_of(engine: Engine, python: Path) -> dict[str, str]:
    """Versions of an engine's distributions in its environment.

    Raises:
        UserError: the environment is broken.
    """
    command = [str(python), "-c", VERSIONS, *engine.distributions]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"peer {engine.name}: its environment does not work: {done.stderr.strip()[-400:]}",
            fix=f"remove the folder {python.parents[1]}; it is made again",
        )
    versions: dict[str, str] = json.loads(done.stdout)
    return {"python": platform.python_version(), **versions}


def _build(engine: Engine, folder: Path, log: Path, progress: Progress | None) -> dict[str, Any]:
    """Make the environment in `folder`; the record has the inputs of its hash and the time that it
    took."""
    started = time.monotonic()
    log.unlink(missing_ok=True)
    create = [sys.executable, "-m", "venv", str(folder)]
    _run(engine, create, log, f"an environment for {engine.name}", progress)
    pip = [str(_python(folder)), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--no-input", "--progress-bar=off", *engine.pip_options, *engine.requirements]
    verb = "compiling" if engine.compiled else "installing"
    _run(engine, pip, log, f"{verb} {engine.name}", progress)
    return {
        "engine": engine.name,
        "requirements": list(engine.requirements),
        "versions": versions_of(engine, _python(folder)),
        "seconds": round(time.monotonic() - started, 1),
    }


def _run(
    engine: Engine, command: list[str], log: Path, note: str, progress: Progress | None
) -> None:
    """Run one command of the build, its output added to `log`."""
    started = time.monotonic()
    # Variables of our environment must not reach into the other one.
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("a", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **engine.variables},
        )
        try:
            while child.poll() is None:
                if progress is not None:
                    progress(0, 1, f"{note}, {duration_text(time.monotonic() - started)}")
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode:
        lines = log.read_text("utf-8", errors="replace").splitlines()
        last = "\n  ".join(lines[-LAST_LINES:])
        raise UserError(
            f"peer {engine.name} cannot be installed on this machine: pip failed\n  {last}",
            fix=f"the whole log is {log}"
            + ("; it needs a C++ compiler and CMake" if engine.compiled else ""),
        )


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _processor() -> str:
    """The features of this processor that compiled code depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    lines = text.splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
