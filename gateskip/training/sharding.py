"""FSDP2: shards weights, gradients and optimizer state of a training over processes.

accelerate shards only on accelerators: on CPUs it accepts `--use_fsdp` and then copies everything
to every process. So this module handles the request and shards with torch's `fully_shard`, on any
device. All that trains is one unit: its weights are gathered for a forward and backward pass, and
between steps each process holds its shard of weights, gradients and AdamW's two moments.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.training.recipe import PACKED, LoopConfig

VARIABLE = "ACCELERATE_USE_FSDP"


@cache
def fsdp_requested() -> bool:
    """Whether this process was launched with `--use_fsdp`; hides the request from accelerate."""
    return os.environ.pop(VARIABLE, "false").lower() == "true"


def refuse(config: LoopConfig, precision: str) -> None:
    """Raises ValueError for settings under which sharding saves nothing or is not supported."""
    if config.backbone == "frozen":
        raise ValueError(
            "FSDP shards trained weights, but backbone: frozen trains only gates: launch"
            " without --use_fsdp"
        )
    if config.backbone in PACKED:
        raise ValueError(
            f"FSDP cannot shard packed weights, which backbone: {config.backbone} trains:"
            " launch without --use_fsdp"
        )
    if precision == "fp16":
        raise ValueError("FSDP with precision: fp16 is not supported: set bf16 or no")


class Shards:
    """A copy of a module of which every process holds a shard.

    Parameters that do not train, and those in `replicated`, belong to both modules: they are
    neither copied nor sharded.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, replicated: Iterable[nn.Parameter]
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        common = {p for p in module.parameters() if not p.requires_grad} | set(replicated)
        self.module: Any = copy.deepcopy(module, {id(p): p for p in common})
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        fully_shard(self.module, mesh=mesh, ignored_params=common)
        shards = dict(self.module.named_parameters())
        self.pairs = [(p, shards[name]) for name, p in module.named_parameters() if p not in common]
        """A parameter of the module, and the shard of it that this process trains."""

    def shard_of(self, parameter: Tensor) -> Tensor:
        """The shard that trains in place of a parameter; the parameter itself where it has none."""
        return next((shard for original, shard in self.pairs if original is parameter), parameter)

    def collect(self) -> None:
        """Copy the trained weights into the module's parameters, in every process."""
        with torch.no_grad():
            for parameter, shard in self.pairs:
                parameter.copy_(whole(shard))


def whole(value: Any) -> Any:
    """A state with every sharded tensor gathered; all processes have to call it."""
    if isinstance(value, Tensor):
        tensor: Any = value.detach()
        return tensor.full_tensor() if _is_shard(tensor) else tensor
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, sharded in the same way as `parameter`."""
    if not _is_shard(parameter) or _is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), *where)


def _is_shard(value: Any) -> bool:
    """Whether a tensor is this process's shard of a larger one: a DTensor, by an attribute, since
    importing the class takes long and a single process never needs it."""
    return hasattr(value, "full_tensor")


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard the moments that were loaded whole from a checkpoint."""
    for parameter, moments in _states(optimizer):
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = like(value, parameter)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, optimizer.state[parameter]
