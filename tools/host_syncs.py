"""How often decoding makes the host wait for its device, counted without a GPU.

    python tools/host_syncs.py

Tiny models decode on a pretended device (tests/helpers/pretend_device.py), which runs on the CPU
and counts what would make the host of a CUDA device wait. `in steps` counts questions inside of
steps: forward pass, skipping, drafts, acceptance. `reads` counts how often the host reads between
them: the tokens of a step or of a round, and once a call the number of tokens that entered each
branch. Both are per generated token; prompts are not counted. Never run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from pretend_device import Questions, host_questions, onto_device, pretend_device  # noqa: E402

BACKENDS = ("gathered", "reference")
OWN = {"draft_weights": "own", "draft_budget": 0.6}
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, sampled": {"sampler": {"temperature": 0.8, "top_p": 0.9}},
    "skip": {"mode": "skip", "budget": 0.6},
    "skip, hold": {"mode": "skip", "budget": 0.6, "hold": True},
    "skip, copied keys": {"mode": "skip", "budget": 0.6, "kv_rule": "copy"},
    "speculate": {"mode": "speculate", **OWN, "draft_length": 4, "lookup": False},
    "speculate, look-up": {"mode": "speculate", **OWN, "draft_length": 4},
    "speculate, sampled": {
        **{"mode": "speculate", **OWN, "draft_length": 4},
        "sampler": {"temperature": 0.8},
    },
    "speculate, auto": {"mode": "speculate", **OWN, "draft_length": "auto"},
}
PROMPTS = ([5, 6, 7, 8, 9, 5, 6, 7], [11, 12, 13])
NEW_TOKENS = 16


@dataclass(frozen=True)
class Waits:
    """Waits of one path, and the tokens that it generated."""

    backend: str
    path: str
    tokens: tuple[tuple[int, ...], ...]
    questions: Questions

    @property
    def new_tokens(self) -> int:
        """Generated tokens of all rows, without the first ones, which belong to the prompts."""
        return sum(len(row) - 1 for row in self.tokens)


def count_waits(folder: Path, backend: str, path: str, rows: int = 1, device: bool = True) -> Waits:
    """Decode with a gated model folder on the pretended device, and count after the prompts."""
    from contextlib import nullcontext

    from gateskip.checkpoint import load_gates
    from gateskip.decoding.decoder import Decoder
    from gateskip.decoding.sampling import Sampler
    from gateskip.quantization.folders import load_model
    from gateskip.runtime.skipping import SkippingModel

    settings = dict(PATHS[path])
    kv_rule, sampler = settings.pop("kv_rule", "project"), Sampler(**settings.pop("sampler", {}))
    file = load_gates(folder)
    assert file is not None, "the folder has gates"
    questions = asked = Questions()
    model, gates = load_model(folder, "float32"), file.gates
    with pretend_device() if device else nullcontext():
        if device:
            model, gates = onto_device(model), onto_device(gates)
        skipping = SkippingModel(model, gates, kv_rule, backend)  # type: ignore[arg-type]
        decoder = Decoder(skipping, None, file.budgets)
        first: set[int] = set()

        def on_token(row: int, token: int) -> None:
            if len(first) < rows:  # the prompts' own tokens come before the first step
                first.add(row)
                asked.in_steps.clear()
                asked.reads.clear()

        with host_questions() as asked:
            prompts = [list(prompt) for prompt in PROMPTS[:rows]]
            done = decoder.generate(
                prompts, NEW_TOKENS, sampler=sampler, on_token=on_token, **settings
            )
            questions = Questions(list(asked.in_steps), list(asked.reads))
    return Waits(backend, path, tuple(map(tuple, done.tokens)), questions)


def table(waits: list[Waits]) -> str:
    """The waits per generated token as a table."""
    lines = ["| backend | path | in steps | reads |", "|---|---|---|---|"]
    for one in waits:
        counts = (len(one.questions.in_steps), len(one.questions.reads))
        numbers = " | ".join(f"{count / one.new_tokens:.2f}" for count in counts)
        lines.append(f"| `{one.backend}` | {one.path} | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table; 1 where a step asks the host."""
    from tiny_models import save_gated, save_tiny

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, choices=(1, 2), default=1)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as scratch:
        source = save_tiny(Path(scratch) / "tiny", "llama")
        folder = save_gated(source, Path(scratch) / "gated", (0.6, 0.8), shortcuts=True)
        waits = [count_waits(folder, backend, path, rows) for backend in BACKENDS for path in PATHS]
    print(table(waits))
    for one in waits:
        for name in sorted(set(one.questions.in_steps)):
            print(f"{one.backend}, {one.path}: a step asks by {name}", file=sys.stderr)
    return 1 if any(one.questions.in_steps for one in waits) else 0


if __name__ == "__main__":
    sys.exit(main())
