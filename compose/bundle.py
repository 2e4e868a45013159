"""The code that an export carries: our own sources of decoding, rewritten to stand in one folder.

With `trust_remote_code=True` transformers loads `custom_generate/generate.py` of a folder, and
what that imports beside itself. So the modules that decoding needs are copied there with their
imports made relative: the same implementation, not a second one.
"""

from __future__ import annotations

import importlib.resources
import re
from importlib import metadata, util
from pathlib import Path

ROOTS = ("checkpoint", "decode", "hook", "native", "skip")
ENTRY = "custom_generate/generate.py"
_MODULE = re.compile(r"^(\s*)from gateskip\.(\w+) import", re.MULTILINE)
_NAMED = re.compile(r"^(\s*)from gateskip import (\w+)$", re.MULTILINE)


def write_bundle(folder: Path) -> list[Path]:
    """Put `custom_generate/` into a model folder; the files written."""
    target = folder / ENTRY
    target.parent.mkdir(exist_ok=True)
    entry = importlib.resources.files("compose") / "templates" / "custom_generate.py.txt"
    text = entry.read_text(encoding="utf-8")
    target.write_text(text.replace("VERSION", metadata.version("gateskip-compose")), "utf-8")
    written = [target]
    for name, source in sorted(sources().items()):
        path = target.parent / f"gateskip_{name}.py"
        path.write_text(_relative(source), encoding="utf-8")
        written.append(path)
    return written


def sources() -> dict[str, str]:
    """Module name -> source, of all that decoding imports from gateskip."""
    found = util.find_spec("gateskip")
    assert found is not None and found.submodule_search_locations, "we are installed"
    package = Path(found.submodule_search_locations[0])
    waiting, texts = list(ROOTS), dict[str, str]()
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (package / f"{name}.py").read_text(encoding="utf-8")
            waiting += [each[1] for each in _MODULE.findall(texts[name])]
            waiting += [each[1] for each in _NAMED.findall(texts[name])]
    return texts


def _relative(source: str) -> str:
    source = _MODULE.sub(r"\1from .gateskip_\2 import", source)
    return _NAMED.sub(r"\1from . import gateskip_\2 as \2", source)
