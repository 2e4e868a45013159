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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def main(folder: str, ids_file: str, result: str) -> None:
    """Load, run, save."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {n: t for p in Path(folder).glob("*.safetensors") for n, t in load_file(p).items()}
    found = {}
    with torch.inference_mode():
        found["logits"] = model(load_file(ids_file)["ids"]).logits.float()
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        parts = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
        parts["weight_scale"] = parts["weight_scale"].float()
        exact = compressor.decompress(parts, scheme)["weight"]
        found[f"float32/{name}"] = exact.float().contiguous()
        found[f"library/{name}"] = module.weight.detach().float().contiguous()
    save_file(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
