"""Rounding errors of packed layers, measured on text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compose.stages.base import StageJob

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def layer_errors(job: StageJob, blocks: Tensor) -> dict[str, float]:
    """Relative error of every packed layer's output: its name -> ||y' - y|| / ||y||.

    Both outputs use the source model's inputs to the layer on token ids [N, S], so errors do not
    add up from layer to layer. y' is computed by the layer as it loads from `job.target`. Source
    weights become float32 for one product at a time.
    """
    import torch

    from compose.artifacts.packed_folder import stored_dtype
    from gateskip.model.families import backbone
    from gateskip.quantization.as_stored import compute_in_float32
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.packed_linear import DenseLinear

    dense = compute_in_float32(load_model(job.source, stored_dtype(job.source)))
    packed_layers = dict(load_model(job.target).named_modules())
    plain = torch.nn.Linear, DenseLinear
    sums: dict[str, Tensor] = {}  # squared error and squared output

    def watch(name: str, layer: Any) -> Any:
        # gptqmodel's kernels hold no parameters, and are 10 to 20 times slower in float32
        dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.bfloat16)

        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rounded = layer(inputs[0].to(_device(layer), dtype)).to(output)
            squares = torch.stack([(rounded - output).square().sum(), output.square().sum()])
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return hook

    watched = []
    for name, module in dense.named_modules():
        if isinstance(module, plain) and type(packed_layers[name]) is not torch.nn.Linear:
            module.register_forward_hook(watch(name, packed_layers[name]))
            watched.append(module)
    run = dense if dense.get_output_embeddings() in watched else backbone(dense)
    with torch.inference_mode():
        for done, block in enumerate(blocks.split(1)):
            run(block.to(dense.device), use_cache=False)
            job.progress(done + 1, len(blocks), "measuring rounding errors")
    return {name: float(f"{(e / y).sqrt().item():.4g}") for name, (e, y) in sums.items()}


def _device(module: Any) -> torch.device:
    """The device of a packed layer's weights, which are parameters or buffers."""
    device: torch.device = next(iter([*module.parameters(), *module.buffers()])).device
    return device
