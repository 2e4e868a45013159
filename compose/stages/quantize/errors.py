"""What quantization did to each layer, measured on text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compose.stages.base import StageJob

if TYPE_CHECKING:
    from torch import Tensor


def layer_errors(job: StageJob, blocks: Tensor) -> dict[str, float]:
    """Relative error of every packed layer's output: its name -> ||y' - y|| / ||y||.

    Both see what the source model gives the layer on token ids [N, S], so that errors do not add
    up from layer to layer; y' is computed by the layer as it loads from `job.target`.
    """
    import torch

    from gateskip.model.folders import load_model

    dense, packed = load_model(job.source, "float32"), load_model(job.target)
    twins = dict(packed.named_modules())
    sums: dict[str, Tensor] = {}  # squared error and squared output

    def watch(name: str, twin: Any) -> Any:
        # gptqmodel's kernels hold no parameters, and are 10 to 20 times slower in float32
        kind = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.bfloat16)

        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = twin(inputs[0].to(_device(twin), kind)).to(output)
            seen = torch.stack([(found - output).square().sum(), output.square().sum()])
            sums[name] = sums.get(name, torch.zeros_like(seen)) + seen

        return hook

    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and type(twins[name]) is not torch.nn.Linear:
            module.register_forward_hook(watch(name, twins[name]))
    with torch.inference_mode():
        for done, block in enumerate(blocks.split(1)):
            dense(block, use_cache=False)
            job.progress(done + 1, len(blocks), "measuring what rounding did")
    return {name: float(f"{(e / y).sqrt().item():.4g}") for name, (e, y) in sums.items()}


def _device(module: Any) -> Any:
    """Where a packed layer keeps its weights: as parameters or as buffers."""
    return next(iter([*module.parameters(), *module.buffers()])).device
