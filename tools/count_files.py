"""Which files one warm decoded token passes: those of gateskip/ by tracing, C++ sources by name.

    python tools/count_files.py FOLDER [--mode skip] [--budget 0.8]

FOLDER is a model folder with gates. The first call warms up; of the second, everything after the
prompt's token is traced, which is one decoded token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import gateskip

PACKAGE = Path(gateskip.__file__).parent
DOOR = "checkpoint.py"  # `gateskip.load`, which is not entered again for each token
SOURCES = (  # of a token of one row, in the order in which it enters them
    "kernels/src/decode/decode.cpp",
    "kernels/src/decode/pass.cpp",
    "kernels/src/linear/share.cpp",
    "kernels/src/linear/matvec.h",
    "kernels/src/decode/attention.cpp",
)
"""What does a token's work. Not among them: headers that declare (api.h, decoder.h, products.h) or
hold primitives that these include (simd.h, rows.h, codes.h, embedding.h, team.h)."""


def traced(decoder: Any, prompt: list[int], **settings: Any) -> list[str]:
    """Files of gateskip/ that are entered while one token is decoded after a prompt."""
    entered: dict[str, None] = {}

    def note(code: CodeType) -> None:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            entered[path.relative_to(PACKAGE).as_posix()] = None

    def on_event(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            note(frame.f_code)

    def on_token(row: int, token: int) -> None:
        frame = sys._getframe()
        while sys.getprofile() is None and frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code.co_name in ("_decode", "generate"):  # where decoding goes on
                note(frame.f_code)
        sys.setprofile(on_event)

    try:
        decoder.generate([prompt], 2, on_token=on_token, **settings)
    finally:
        sys.setprofile(None)
    return list(entered)


def main() -> None:
    """Print the files, one a line, and how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", default="skip")
    parser.add_argument("--budget", type=float, default=0.8)
    options = parser.parse_args()
    decoder = gateskip.load(options.folder, backend="native")
    settings: dict[str, Any] = {"mode": options.mode, "budget": options.budget}
    decoder.generate([[5, 6, 7, 8]], 8, **settings)
    files = [DOOR, *traced(decoder, [5, 6, 7, 8], **settings), *SOURCES]
    missing = [file for file in files if not (PACKAGE / file).exists()]
    assert not missing, f"no such files: {', '.join(missing)}"
    print("\n".join(files), f"{len(files)} files", sep="\n")


if __name__ == "__main__":
    main()
