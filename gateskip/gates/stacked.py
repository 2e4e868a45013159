"""Parameters of all branches in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Stacked(nn.Module):
    """Parameters with the parts of all branches, one after the other."""

    _opened: dict[str, tuple[Tensor, ...]] | None = None

    def part(self, name: str, index: int) -> Tensor:
        """Part `index` of parameter `name`."""
        if self._opened is not None:
            return self._opened[name][index]
        whole: Tensor = getattr(self, name)
        return whole[index]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within this context all parts, also those of inner modules, come from one `unbind`.
        Otherwise the gradient of a part, indexed alone, would be as large as the whole parameter.
        """
        inside = [module for module in self.modules() if isinstance(module, Stacked)]
        for module in inside:
            parameters = module.named_parameters(recurse=False)
            module._opened = {name: parameter.unbind(0) for name, parameter in parameters}
        try:
            yield
        finally:
            for module in inside:
                module._opened = None
