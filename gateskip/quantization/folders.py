"""Loads model folders: all that transformers loads, this project's integer grids, and GPTQ with
mixed bits.

A GPTQ checkpoint whose layers differ in bits says so in `dynamic` (patterns of layer names, and
their settings); one whose LM head is packed says so in `lm_head`. gptqmodel, vLLM and SGLang read
both. transformers loads GPTQ through optimum, which gives every layer of the decoder the same bits,
so optimum is called once for each number of bits.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from gateskip.errors import FormatError
from gateskip.extras import need
from gateskip.model.families import UnsupportedModel
from gateskip.quantization.grid_linear import METHOD

QUANTIZER = "gptq"
END = ".qweight"  # of the tensor that has a layer's codes
BITSANDBYTES = "bitsandbytes"
LIBRARIES = {QUANTIZER: ("optimum", "gptqmodel"), BITSANDBYTES: ("accelerate", BITSANDBYTES)}
"""Libraries that transformers loads packed weights with, by `quant_method`."""
ON_CUDA = (METHOD, BITSANDBYTES)
"""Formats of packed weights with kernels for CUDA devices."""
CPU = torch.device("cpu")


_MADE_ANEW = re.compile(r"\.(g_idx|bias)$")
"""Tensors of packed layers that other libraries may leave out of a file: the default order of a
layer's inputs, and biases of zero."""


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: torch.device = CPU,
) -> Any:
    """A transformers causal LM from a folder, in evaluation mode. `device` is that of
    bitsandbytes' weights; other models load on the CPU.

    Raises ModuleNotFoundError, with the extra's name, where its packed weights need a library that
    is not installed.
    Raises FormatError where a tensor is missing, or has another shape than the config says.
    Raises UnsupportedModel where weights of this format do not run on the device.
    """
    from transformers import AutoModelForCausalLM

    from gateskip.quantization.hf_quantizer import register

    packed: str = _quantization(folder).get("quant_method", "")
    _refuse_device(packed, device)
    need(f"{folder}: loading {packed} weights", *LIBRARIES.get(packed, ()))
    if packed == METHOD:
        register()
    loaded_type = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    # Quantizers themselves refuse packed tensors of another shape
    options: dict[str, Any] = {} if packed else {"ignore_mismatched_sizes": True}
    if packed == BITSANDBYTES:  # which takes a CUDA device by itself
        options["device_map"] = {"": device}
    with mixed_bits() if is_mixed(folder) else nullcontext():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=loaded_type, output_loading_info=True, **options
        )
    info = loaded[1]
    if packed:
        missing, ours = info.get("missing_keys") or (), packed == METHOD
        info = {"missing_keys": [n for n in missing if ours or not _MADE_ANEW.search(n)]}
    _refuse_random(folder, info)
    return loaded[0].eval()


def _refuse_device(packed: str, device: torch.device) -> None:
    """UnsupportedModel for weights, packed by a method, without kernels for the device."""
    supported = not packed or device.type == "cpu" or (device.type == "cuda" and packed in ON_CUDA)
    if not supported:
        raise UnsupportedModel(f"{packed} weights are decoded on a CPU, not on {device}")


def _refuse_random(folder: str | Path, info: dict[str, Any]) -> None:
    """FormatError where transformers filled a tensor with random numbers; it only warns then.

    `info` is its loading info: names of missing tensors, and (name, stored shape, config's shape).
    """
    for name, stored, expected in info.get("mismatched_keys") or ():
        raise FormatError(
            f"{folder}: the tensor {name} has the shape {list(stored)}, and the config asks for"
            f" {list(expected)}"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(f"{folder}: the weights lack the tensor {missing[0]}{more}")


def is_mixed(folder: str | Path) -> bool:
    """Whether the folder's weights need `mixed_bits`."""
    stated = _quantization(folder)
    mixed = stated.get("dynamic") or stated.get("lm_head")
    return stated.get("quant_method") == QUANTIZER and bool(mixed)


def _quantization(folder: str | Path) -> dict[str, Any]:
    """The quantization config of the folder's config; empty without one."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config.get("quantization_config") or {}


@contextmanager
def mixed_bits() -> Iterator[None]:
    """Within this context `from_pretrained` reads such folders; all others load as before.

    transformers chooses a quantizer by name in two tables and has no argument for another one. So
    two entries are replaced while a folder loads, and restored afterwards.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
    from transformers.utils.quantization_config import GPTQConfig

    class MixedConfig(GPTQConfig):
        """The config with the two entries that transformers does not know."""

        def __init__(
            self, *args: Any, dynamic: Any = None, lm_head: bool = False, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self.dynamic, self.lm_head = dynamic, lm_head

        def to_dict_optimum(self) -> dict[str, Any]:
            fields = super().to_dict_optimum()  # type: ignore[no-untyped-call]
            return {name: fields[name] for name in fields.keys() - {"dynamic", "lm_head"}}

    class MixedQuantizer(GptqHfQuantizer):
        """Layers get the bits that the config gives them."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            config: Any = self.quantization_config
            if self.pre_quantized and (config.dynamic or config.lm_head):
                _place_packed_layers(model, config, self.optimum_quantizer, kwargs)
            else:
                super()._process_model_before_weight_loading(model, **kwargs)

    before = AUTO_QUANTIZATION_CONFIG_MAPPING[QUANTIZER], AUTO_QUANTIZER_MAPPING[QUANTIZER]
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANTIZER] = MixedConfig
    AUTO_QUANTIZER_MAPPING[QUANTIZER] = MixedQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANTIZER], AUTO_QUANTIZER_MAPPING[QUANTIZER] = before


def _place_packed_layers(
    model: Any, config: Any, quantizer: Any, arguments: dict[str, Any]
) -> None:
    """Replace layers by empty packed ones where the checkpoint has packed ones, for one number of
    bits after another."""
    from gptqmodel.quantization.config import dynamic_get

    usual = quantizer.bits
    layers = defaultdict(list)
    for name in packed_layers(arguments["checkpoint_files"]):
        layers[dynamic_get(config.dynamic, name, "bits", usual)].append(name)
    for bits, names in layers.items():
        quantizer.bits = bits
        quantizer.select_quant_linear(device_map=arguments.get("device_map"), pack=False)
        quantizer._replace_by_quant_layers(model, names)
    quantizer.bits = usual


def packed_layers(files: Iterable[str | Path]) -> list[str]:
    """Names of the GPTQ layers in safetensors files."""
    from safetensors import safe_open

    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    return [name.removesuffix(END) for name in names if name.endswith(END)]
