"""Runs in the environment of compressed-tensors: what its library makes of a folder.

    python compressed_tensors_weights.py FOLDER IDS.safetensors RESULT.safetensors

Saves, by the layer's name: `library/NAME`, the weights as transformers with compressed-tensors
multiplies by them; `float32/NAME`, as the library's compressor decompresses the file's own tensors
with their scales in float32; and `logits` of token ids [1, S].
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def main(folder: str, ids_file: str, result: str) -> None:
    """Load, run, save."""
    config = AutoConfig.from_pretrained(folder)
    stated = dict(config.quantization_config)
    groups = stated["config_groups"].values()
    # Kept packed, asymmetric weights do not load: compressed-tensors 0.20 has room for zero points
    # that are not packed, where its own compressor packs them.
    stated["dequantize"] = not all(group["weights"]["symmetric"] for group in groups)
    config.quantization_config = stated
    model = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {n: t for p in Path(folder).glob("*.safetensors") for n, t in load_file(p).items()}
    found = {}
    with torch.inference_mode():
        found["logits"] = model(load_file(ids_file)["ids"]).logits.float()
    stated.pop("dequantize")
    for scheme in QuantizationConfig.model_validate(stated).config_groups.values():
        for name, module in match_named_modules(model, scheme.targets, stated["ignore"]):
            parts = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
            parts["weight_scale"] = parts["weight_scale"].float()
            exact = compressor.decompress(parts, scheme)["weight"]
            found[f"float32/{name}"] = exact.float().contiguous()
            found[f"library/{name}"] = module.weight.detach().float().contiguous()
    save_file(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
