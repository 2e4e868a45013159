"""A process that decodes with the kernels of the gateskip that it finds: `wheel_process.py`, a job.

The job is JSON on stdin, {"models", "prompt", "threads", "torch_first"}. The answer is JSON on
stdout: the library of the kernels, OpenMP's libraries in this process, OpenMP's threads as the
kernels see them, and the tokens of each model.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the kernels before or after torch, and decode."""
    job: dict[str, Any] = json.load(sys.stdin)
    if job["torch_first"]:
        import torch
    from gateskip.kernels import build

    assert build.library() is not None, build.problem()
    import torch

    import gateskip

    torch.set_num_threads(job["threads"])
    decoders = [gateskip.load(folder, backend="native") for folder in job["models"]]
    tokens = [decoder.generate([job["prompt"]], 32).tokens for decoder in decoders]
    answer = {
        "compilers": build.compilers(),
        "library": str(build.build()),
        "openmp": sorted(openmp_libraries()),
        "threads": ctypes.CDLL(str(build.build())).omp_get_max_threads(),
        "tokens": tokens,
    }
    print(json.dumps(answer))


def openmp_libraries() -> set[str]:
    """Files of libgomp and its kind that hold code of this process, scikit-learn's left out."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    names = ("libgomp", "libomp", "libiomp")
    return {f for f in files if Path(f).name.startswith(names) and "scikit_learn" not in f}


if __name__ == "__main__":
    main()
