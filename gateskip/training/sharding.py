"""Training whose weights, gradients and optimizer state are shared out over processes: FSDP2.

accelerate shards on accelerators alone: on CPUs it takes `--use_fsdp` and then copies everything to
every process. So the request is taken from it and met here, by torch's `fully_shard`, on any
device. All that trains is one unit: its weights are gathered for a forward and backward pass, and
between steps each process holds its share of weights, gradients and AdamW's two moments.
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
def asked() -> bool:
    """Whether this process was launched with `--use_fsdp`; accelerate itself no longer sees it."""
    return os.environ.pop(VARIABLE, "false").lower() == "true"


def refuse(config: LoopConfig, precision: str) -> None:
    """Raises ValueError where sharding would bring nothing, or was never made to work."""
    if config.backbone == "frozen":
        raise ValueError(
            "FSDP shares out weights that train, and with backbone: frozen only gates do: launch"
            " without --use_fsdp"
        )
    if config.backbone in PACKED:
        raise ValueError(
            f"FSDP cannot share out packed weights, which backbone: {config.backbone} trains:"
            " launch without --use_fsdp"
        )
    if precision == "fp16":
        raise ValueError("FSDP with precision: fp16 is not supported: set bf16 or no")


class Shards:
    """A copy of a module of which every process holds a share.

    What does not train, and the parameters in `kept`, is common to both modules: nothing of it is
    copied or shared out.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, kept: Iterable[nn.Parameter]
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        common = {p for p in module.parameters() if not p.requires_grad} | set(kept)
        self.module: Any = copy.deepcopy(module, {id(p): p for p in common})
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        fully_shard(self.module, mesh=mesh, ignored_params=common)
        shared_out = dict(self.module.named_parameters())
        self.pairs = [
            (own, shared_out[name]) for name, own in module.named_parameters() if own not in common
        ]
        """The module's own parameter, and the share of it that this process trains."""

    def share_of(self, parameter: Tensor) -> Tensor:
        """What is trained in place of one of the module's own parameters."""
        return next((share for own, share in self.pairs if own is parameter), parameter)

    def collect(self) -> None:
        """Write what was trained into the module's own parameters, in every process."""
        with torch.no_grad():
            for own, share in self.pairs:
                own.copy_(whole(share))


def whole(value: Any) -> Any:
    """A state with every shared-out tensor gathered; all processes have to call it."""
    if isinstance(value, Tensor):
        own: Any = value.detach()
        return own.full_tensor() if _is_share(own) else own
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value


def like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, shared out as `parameter` is."""
    if not _is_share(parameter) or _is_share(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), *where)


def _is_share(value: Any) -> bool:
    """Whether a tensor is this process's share of a larger one (a DTensor): its class takes long to
    import, and one process never needs it."""
    return hasattr(value, "full_tensor")


def share_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Share out the moments that a whole checkpoint has set."""
    for parameter, moments in _states(optimizer):
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = like(value, parameter)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, optimizer.state[parameter]
