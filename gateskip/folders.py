"""Model folders as transformers loads them, and those that it does not load by itself.

A GPTQ checkpoint whose layers differ in bits says so in `dynamic` (patterns of layer names, and
what is different there), one whose LM head is packed in `lm_head`; gptqmodel, vLLM and SGLang read
both. optimum, by which transformers loads GPTQ, gives every layer of the decoder the same bits, so
it is asked once for each number of bits.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

QUANTIZER = "gptq"


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """A transformers causal LM from a folder, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    if is_mixed(folder):
        read_mixed_bits()
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return AutoModelForCausalLM.from_pretrained(folder, dtype=wanted).eval()


def is_mixed(folder: Path) -> bool:
    """Whether the folder's weights need `read_mixed_bits`."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stated = config.get("quantization_config") or {}
    mixed = stated.get("dynamic") or stated.get("lm_head")
    return stated.get("quant_method") == QUANTIZER and bool(mixed)


def read_mixed_bits() -> None:
    """Let `from_pretrained` of this process read such folders; all others load as before."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
    from transformers.utils.quantization_config import GPTQConfig

    if AUTO_QUANTIZER_MAPPING[QUANTIZER] is not GptqHfQuantizer:
        return

    class MixedConfig(GPTQConfig):
        """With the two entries that transformers does not know."""

        def __init__(
            self, *given: Any, dynamic: Any = None, lm_head: bool = False, **more: Any
        ) -> None:
            super().__init__(*given, **more)
            self.dynamic, self.lm_head = dynamic, lm_head

        def to_dict_optimum(self) -> dict[str, Any]:
            known = super().to_dict_optimum()  # type: ignore[no-untyped-call]
            return {name: known[name] for name in known.keys() - {"dynamic", "lm_head"}}

    class MixedQuantizer(GptqHfQuantizer):
        """Layers get the bits that the config gives them."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            config: Any = self.quantization_config
            if self.pre_quantized and (config.dynamic or config.lm_head):
                _place_packed_layers(model, config, self.optimum_quantizer, kwargs)
            else:
                super()._process_model_before_weight_loading(model, **kwargs)

    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANTIZER] = MixedConfig
    AUTO_QUANTIZER_MAPPING[QUANTIZER] = MixedQuantizer


def _place_packed_layers(model: Any, config: Any, quantizer: Any, kwargs: dict[str, Any]) -> None:
    """Empty packed layers instead of linear ones, those of as many bits together."""
    from gptqmodel.quantization.config import dynamic_get

    from gateskip.branches import backbone

    inside = {id(part) for part in backbone(model).layers.modules()}
    head = model.get_output_embeddings() if config.lm_head else None
    usual = quantizer.bits
    layers = defaultdict(list)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and (id(part) in inside or part is head):
            bits = dynamic_get(config.dynamic, name, "bits", usual)
            if bits is not False:  # a pattern that begins with a minus: the layer stays
                layers[bits].append(name)
    for bits, names in layers.items():
        quantizer.bits = bits
        quantizer.select_quant_linear(device_map=kwargs.get("device_map"), pack=False)
        quantizer._replace_by_quant_layers(model, names)
    quantizer.bits = usual
