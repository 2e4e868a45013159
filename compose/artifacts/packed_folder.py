"""Packed linear layers of a model folder as integers, from GPTQ's tensors or gateskip's.

    weight[i, j] = scale[i, j / group] * (code[i, j] - zero[i, j / group])

Read straight from the files, one layer at a time, without building a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import GRID_METHOD, require_model
from compose.artifacts.intake import weight_files
from compose.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GPTQ_METHOD = "gptq"
"""`quant_method` of folders in the GPTQ format."""
METHODS = (GPTQ_METHOD, GRID_METHOD)
"""`quant_method` of folders whose weights are integers that this module reads."""
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
GRID = ("codes", "scale", "minimum", "exponent")
"""Ends of the names of a packed layer's tensors; the first one has the codes."""

WORD = 32  # bits of an int32 that codes are packed in


@dataclass(frozen=True)
class IntegerLayer:
    """One packed layer [n, k]."""

    bits: int
    codes: Tensor
    """uint8 [n, k], 0 to 2**bits - 1."""
    scale: Tensor
    """[n, k / group], in the type of the file."""
    zeros: Tensor | None
    """uint8 [n, k / group]: the code of the value 0; None where it is 2**(bits - 1)."""

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def weight(self) -> Tensor:
        """The weights, float32 [n, k]."""
        codes = self.codes.float().unflatten(1, (-1, self.group))
        zeros = 2 ** (self.bits - 1) if self.zeros is None else self.zeros.float().unsqueeze(2)
        whole: Tensor = ((codes - zeros) * self.scale.float().unsqueeze(2)).flatten(1)
        return whole


class PackedFolder:
    """The tensors of a folder whose weights are packed as GPTQ or as gateskip's grids.

    Raises:
        ArtifactError: the folder has other weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, require_model(folder)
        self.stated: dict[str, Any] = self.config.get("quantization_config") or {}
        self.method = str(self.stated.get("quant_method") or "")
        if self.method not in METHODS:
            raise ArtifactError(
                f"the weights in {folder} are {self.method or 'not packed'}; they must be packed by"
                " int4, int8, gptq or autoround",
                fix="put one of these stages at the end of the chain",
            )
        self._files, self._tensor = tensor_files(folder), tensors_of(folder)
        self._parts = GPTQ if self.method == GPTQ_METHOD else GRID
        ends = f".{self._parts[0]}"
        names = [name.removesuffix(ends) for name in self._files if name.endswith(ends)]
        self.embeddings = [name for name in names if name.endswith("embed_tokens")]
        """Packed input embeddings."""
        self.layers = [name for name in names if name not in self.embeddings]
        """Packed linear layers."""

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by its name in the files; None where the files have none."""
        return self._tensor(name) if name in self._files else None

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor that is not part of a packed layer."""
        packed = {f"{layer}.{part}" for layer in self.layers for part in self._parts}
        packed |= {f"{layer}.{part}" for layer in self.embeddings for part in self._parts}
        for name in self._files:
            if name not in packed:
                yield name, self._tensor(name)

    def layer(self, name: str) -> IntegerLayer:
        """A packed layer as integers.

        Raises:
            ArtifactError: its groups have real minima, or their columns are not adjacent.
        """
        parts = [self.tensor(f"{name}.{part}") for part in self._parts]
        if self.method == GPTQ_METHOD:
            return self._from_gptq(name, *parts)
        return self._from_grid(name, *parts)

    def _from_gptq(
        self, name: str, packed: Any, packed_zeros: Any, scales: Any, groups: Any
    ) -> IntegerLayer:
        """qweight [k * bits / 32, n], qzeros [k / group, n * bits / 32], scales [k / group, n]."""
        import torch

        inputs = len(groups)
        bits = packed.shape[0] * WORD // inputs
        if not torch.equal(groups.long(), torch.arange(inputs) // (inputs // len(scales))):
            raise ArtifactError(
                f"the groups of {name} have columns that are not adjacent (act_order)",
                fix="make the folder with act_order: false",
            )
        codes = unpacked(packed.T, bits)[:, :inputs]
        zeros = unpacked(packed_zeros, bits)[:, : scales.shape[1]].T.int()
        if self.stated.get("checkpoint_format", self.stated.get("format", "gptq")) == "gptq":
            zeros = zeros + 1  # the older format stores them one lower
        if int(zeros.max()) >= 2**bits:
            raise ArtifactError(
                f"zero points of {name} exceed its {bits} bits: the config of {self.folder} states"
                " the wrong format"
            )
        middle = bool((zeros == 2 ** (bits - 1)).all())
        zeros = zeros.to(torch.uint8)
        return IntegerLayer(bits, codes, scales.T.contiguous(), None if middle else zeros)

    def _from_grid(
        self, name: str, packed: Any, scale: Any, minimum: Any, exponent: Any
    ) -> IntegerLayer:
        """codes [n, k * bits / 8] as a stream of bits, scale [n, k / group]."""
        if minimum is not None:
            raise ArtifactError(
                f"{self.folder} has a real minimum for each group (offset: real), but the format"
                " has only integer zero points",
                fix="make the folder with offset: integer, or write it with `gateskip export FOLDER"
                " --format gguf`, whose blocks have real minima",
            )
        from gateskip.quantization.grid_linear import read

        of_layer = (self.stated.get("layers") or {}).get(name, {})
        embedding = self.stated.get("embedding") or {}
        head = self.stated.get("head") or embedding
        outer = head if name.endswith("lm_head") else embedding if name in self.embeddings else {}
        bits = int({**self.stated, **of_layer, **outer}["bits"])
        grid = read(packed, scale, None, exponent, bits)
        kept = scale.dtype if exponent is None else torch.bfloat16  # which holds the floats exactly
        return IntegerLayer(bits, grid.codes, grid.scale.to(kept), None)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 words [n, w] -> the codes in them, uint8 [n, w * 32 / bits]: a row is a stream of bits,
    lowest first."""
    import torch

    from gateskip.quantization.grid import unpack_bits

    return unpack_bits(words.contiguous().view(torch.uint8), bits)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, k] -> int32 words [n, k * bits / 32], the last one filled up with zeros."""
    import torch

    from gateskip.quantization.grid import pack_bits

    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % WORD))
    words = pack_bits(padded, bits).view(torch.int32)
    return words[:, : math.ceil(codes.shape[1] * bits / WORD)].contiguous()


def tensors_of(folder: Path) -> Callable[[str], Tensor]:
    """A function that returns a tensor of the folder by its name."""
    from safetensors import safe_open

    files = tensor_files(folder)

    def get(name: str) -> Tensor:
        with safe_open(files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return get


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that has it, without gates."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def load_as_stored(folder: Path, widen: bool = False) -> Any:
    """The folder's model, which computes in float32 while its mapped weights keep their stored
    type; `widen` converts the weights to float32, too."""
    from gateskip.quantization.as_stored import compute_in_float32
    from gateskip.quantization.folders import load_model

    if widen:
        return load_model(folder, "float32")
    return compute_in_float32(load_model(folder, stored_dtype(folder)))


def stored_dtype(folder: Path) -> torch.dtype:
    """The stored type of the folder's tensors, whatever its config states (`dtype_of`); float32
    where they differ or no safetensors file has them."""
    import torch
    from safetensors import safe_open

    dtypes = set()
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    small = {"BF16": torch.bfloat16, "F16": torch.float16}
    return small.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32
