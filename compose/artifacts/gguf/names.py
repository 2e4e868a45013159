"""Tensors of a model under GGUF's names, in GGUF's order of rows.

transformers rotates channel i of a head [D] together with channel i + D / 2; llama.cpp's `llama`
rotates 2i with 2i + 1, so the rows of q and k are reordered. Whole rows move, so packed rows move
in the same way.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from compose.errors import ArtifactError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAIRED = ("llama",)
"""Architectures whose files keep channels that rotate together next to each other."""

SHIFTED_NORMS = ("gemma2", "gemma3")
"""Architectures whose files store norm weights plus one, as their models compute with them."""


def is_shifted(name: str, architecture: str) -> bool:
    """Whether the file stores this tensor plus one."""
    return architecture in SHIFTED_NORMS and name.endswith("norm.weight")


def gguf_name(name: str, architecture: str, layers: int) -> str:
    """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight

    Raises:
        ArtifactError: the tensor has no name there.
    """
    stored_name: str | None = _names(architecture, layers).get_name(
        name, try_suffixes=(".weight", ".bias")
    )
    if stored_name is None:
        raise ArtifactError(f"the tensor {name!r} has no name in GGUF")
    return stored_name


@functools.cache
def _names(architecture: str, layers: int) -> Any:
    """The gguf package's own table."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH[architecture.upper()], layers)


def paired(name: str, data: NDArray[Any], config: dict[str, Any]) -> NDArray[Any]:
    """Rows of q and k in llama.cpp's order, pairs side by side; other tensors unchanged."""
    heads = _rotated_heads(name, config)
    if heads is None:
        return data
    halves = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)


def unpaired(name: str, data: NDArray[Any], config: dict[str, Any]) -> NDArray[Any]:
    """Rows of q and k as transformers has them: the reverse of `paired`."""
    heads = _rotated_heads(name, config)
    if heads is None:
        return data
    pairs = data.reshape(heads, len(data) // heads // 2, 2, *data.shape[1:])
    return pairs.swapaxes(1, 2).reshape(data.shape)


def _rotated_heads(name: str, config: dict[str, Any]) -> int | None:
    """Number of heads whose rows the tensor has, where they are rotated."""
    heads: int = config["num_attention_heads"]
    if ".q_proj." in name:
        return heads
    return config.get("num_key_value_heads") or heads if ".k_proj." in name else None
