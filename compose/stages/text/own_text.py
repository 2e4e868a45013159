"""Text that the dense model writes itself, as token blocks.

The text is cached: stages, runs and pipelines that ask for the same text of the same model share
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.assets.fetch import build_once
from compose.assets.models.asset import digest
from compose.hashes import remembered_hash

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.decoding.self_generate import Writer

Progress = Callable[[int, int], None]

VERSION = 1  # raised when a model is to write its text anew
BLOCKS = "blocks.safetensors"


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """Text that the model in the folder `dense` writes, in blocks of `length` tokens."""

    dense: Path
    cache: Path
    """The cache folder of downloaded models and data; the written text is kept there, too."""
    length: int
    seed: int
    progress: Progress

    def written(self, count: int) -> Tensor:
        """Blocks [count, length] that the model writes without a prompt."""
        from gateskip.decoding.self_generate import write

        return self._once(
            {"how": "written"},
            count,
            lambda decoder: write(decoder, count, self.length, self.seed, self.progress),
        )

    def continued(self, prefixes: Tensor) -> Tensor:
        """Blocks [N, length] that begin as `prefixes` [N, P] and go on as the model does."""
        from gateskip.decoding.self_generate import go_on

        return self._once(
            {"how": "continued", "given": prefixes.tolist()},
            len(prefixes),
            lambda decoder: go_on(decoder, prefixes, self.length, self.seed, self.progress),
        )

    def answered(self, prompts: Sequence[str], count: int) -> Tensor:
        """Blocks [N, length], N at most `count`, of prompts and the model's answers, end to end.

        Raises:
            ValueError: prompts and answers do not fill one block.
        """
        from gateskip.decoding.self_generate import answer

        return self._once(
            {"how": "answered", "prompts": list(prompts)},
            count,
            lambda decoder: answer(decoder, prompts, count, self.length, self.seed, self.progress),
        )

    def _once(
        self, request: dict[str, Any], count: int, make: Callable[[Writer], Tensor]
    ) -> Tensor:
        """The cached blocks of this text; they are made where the cache has none.

        If another process is making them, wait for it.
        """
        from safetensors.torch import load_file, save_file

        import gateskip

        def build(folder: Path) -> dict[str, Any]:
            self.progress(0, count)
            blocks = make(gateskip.load(self.dense))
            save_file({"blocks": blocks}, folder / BLOCKS)
            return {"how": request["how"], "blocks": len(blocks), "length": self.length}

        target = self.cache / "own-text" / self._key(request, count)
        build_once(target, build, note="text that the model writes")
        return load_file(target / BLOCKS)["blocks"]

    def _key(self, request: dict[str, Any], count: int) -> str:
        """A hash over the model's files and every setting that decides the text."""
        files = sorted(file for file in self.dense.iterdir() if file.is_file())
        recipe = request | {
            "version": VERSION,
            "model": {file.name: remembered_hash(file) for file in files},
            "count": count,
            "length": self.length,
            "seed": self.seed,
        }
        return digest(recipe)
