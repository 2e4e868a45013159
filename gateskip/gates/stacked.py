"""Parameters of all branches in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Stacked(nn.Module):
    """Parameters that hold all branches' parts, one after the other."""

    _opened: dict[str, tuple[Tensor, ...]] | None = None

    def part(self, name: str, index: int) -> Tensor:
        """Part `index` of parameter `name`."""
        if self._opened is not None:
            return self._opened[name][index]
        whole: Tensor = getattr(self, name)
        return whole[index]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within this context all parts, those of modules inside too, come from one cut. The
        gradient of a part that is cut on its own is as large as the whole, and zero elsewhere."""
        inside = [module for module in self.modules() if isinstance(module, Stacked)]
        for each in inside:
            each._opened = {name: p.unbind(0) for name, p in each.named_parameters(recurse=False)}
        try:
            yield
        finally:
            for each in inside:
                each._opened = None
