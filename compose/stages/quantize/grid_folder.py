"""A model folder with some weights stored as integer grids.

The format is this project's (gateskip/quantization/hf_quantizer.py) or, where zero points are
integers, GPTQ, which gptqmodel, vLLM and transformers read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compose.stages.base import StageJob
from gateskip.quantization.offsets import bits_beside

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.quantization.grid import Grid

Stored = dict[str, "Tensor"]
"""A grid's tensors as stored in a file: name after the module's name -> tensor."""


def write_grids(job: StageJob, grids: Mapping[str, Stored], quantization: dict[str, Any]) -> None:
    """Write `job.source` into `job.target`, with grids in place of the named modules' weights."""
    from compose.artifacts.folder import copy_companions, require_model
    from compose.artifacts.shards import save_shards
    from compose.store import write_json

    config = {**require_model(job.source), "dtype": job.dtype, "quantization_config": quantization}
    config.pop("torch_dtype", None)
    write_json(job.target / "config.json", config)
    save_shards(job.target, _replaced(job, grids))
    copy_companions(job.source, job.target)


def _replaced(job: StageJob, grids: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the source, with grids in place of the weights that they replace."""
    import torch

    from compose.artifacts.packed_folder import tensor_files, tensors_of

    tensor_of = tensors_of(job.source)
    for name in tensor_files(job.source):
        grid = grids.get(name.removesuffix(".weight"))
        if grid is None:
            tensor = tensor_of(name)
            floats = tensor.is_floating_point()
            yield name, tensor.to(getattr(torch, job.dtype)) if floats else tensor
        else:
            module = name.removesuffix("weight")
            yield from ((module + key, part) for key, part in grid.items())


TABLE_GROUP = 32  # weights of an embedding or LM head that share a scale
HEADER = 400  # bytes of a packed layer in a file's header and the config, at most


def bytes_beside(job: StageJob, packed: set[str], tables: Mapping[str, int]) -> int:
    """Bytes of the folder's files without the grids of the layers `packed`: unchanged tensors, the
    `tables` in their bits, headers, and the tokenizer's files."""
    from safetensors import safe_open

    from compose.artifacts.folder import COMPANIONS

    total = sum(p.stat().st_size for pattern in COMPANIONS for p in job.source.glob(pattern))
    total += (job.source / "config.json").stat().st_size + HEADER * len(packed)
    for shard in job.source.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                module = name.removesuffix(".weight")
                if module in packed:
                    continue
                plain = 32 if job.dtype == "float32" else 16
                bits = stored_table_bits(tables[module]) if module in tables else plain
                total += int(math.prod(shape) * bits / 8) + HEADER
    return total


def stored_table_bits(bits: int) -> float:
    """Bits of a weight of a packed embedding or LM head in a file, with its share of the scale."""
    return bits + bits_beside(bits, "none") / TABLE_GROUP


def as_gptq(grid: Grid, older: bool = False) -> dict[str, Tensor]:
    """A grid with integer zero points as GPTQ stores it: in the format `gptq_v2`, or in the older
    format, whose stored zero points are one lower and which therefore has no zero point of 0.

    qweight [in / codes, out] and qzeros [groups, out / codes] hold 32 / bits codes in an int32,
    lowest bits first; scales [groups, out] are float16; g_idx [in] is each column's group.
    """
    import torch

    from compose.artifacts.packed_folder import packed

    assert grid.minimum is not None, "GPTQ's zero points are codes"
    flat = grid.scale == 0  # a group of zeros, whatever its codes
    zeros = torch.where(flat, grid.middle, grid.zero_points()).to(torch.uint8)
    if older:
        assert bool(zeros.all()), "the older format has no zero point of 0"
        zeros -= 1
    columns = torch.arange(grid.codes.shape[1], dtype=torch.int32)
    return {
        "qweight": packed(grid.codes, grid.bits).T.contiguous(),
        "qzeros": packed(zeros.T.contiguous(), grid.bits),
        "scales": grid.scale.T.half().contiguous(),
        "g_idx": columns // grid.group,
    }


def gptq_config(bits: int, group: int, sym: bool = False) -> dict[str, Any]:
    """`quantization_config` of such a folder."""
    layout = "gptq" if sym else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": sym,
        "format": layout,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "lm_head": False,
    }
