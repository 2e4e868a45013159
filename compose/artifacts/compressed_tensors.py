"""A packed model folder in the format of compressed-tensors, which vLLM and transformers read.

The tensors (`pack-quantized`: W4A16 and W8A16) hold the same codes and scales, so no weight is
rounded again. For a layer NAME with weights [n, k] in groups of g:

    NAME.weight_packed      int32 [n, k * bits / 32], codes along the row, lowest bits first
    NAME.weight_scale       [n, k / g]
    NAME.weight_zero_point  int32 [n * bits / 32, k / g], packed down the column; asymmetric only
    NAME.weight_shape       int64 [2]

The format has no packed embedding and LM head; they are written as floats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import COMPANIONS, dtype_of, is_gated, place_file, probe_ids
from compose.artifacts.intake import weight_files
from compose.artifacts.packed_folder import (
    IntegerLayer,
    PackedFolder,
    packed,
    tensor_files,
    tensors_of,
    unpacked,
)
from compose.artifacts.predictions import fill, kl_of_logits, unfilled
from compose.artifacts.shards import save_shards
from compose.artifacts.zero_points import kl_by_offset
from compose.errors import ArtifactError, StepError
from compose.store import new_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

BITS = (4, 8)
"""Bits that readers have kernels for."""
SHARD = 4 << 30  # bytes of tensors in one file
WHOLE_ROW = -1
OUTER = ("embed_tokens", "lm_head")

Scheme = tuple[int, int, bool]
"""Bits, weights in a group (-1: a whole row), and whether the grid is symmetric around zero."""


def write_compressed(folder: Path, target: Path, dense: Path | None = None) -> dict[str, Any]:
    """Write the packed model in `folder` to the new folder `target`, and read it back.

    `dense` is the folder of the model that was rounded: with it, the price of integer zero points
    is measured (`zero_points`), where some layers have them.

    Returns `schemes` (by vLLM's names: W4A16 ...), `layers`, `floats` (layers that were packed and
    are now floats), `rounded_scales` (whether a reader in the folder's float type rounds the
    scales), `kl` (from the predictions of `folder` to those of the weights that a reader gets, on a
    short text, in float32), `bytes`, and `zero_points` (the result of `kl_by_offset`, or None).

    Raises:
        ArtifactError: the folder cannot be written in this format, or `target` exists.
        StepError: the tensors that were read back differ from those that were written.
    """
    if target.exists():
        raise ArtifactError(f"{target} exists, and is not replaced", fix="name another folder")
    source = PackedFolder(folder)
    _refuse_gates(folder)
    inner = [name for name in source.layers if not name.endswith(OUTER)]
    floats = [*source.embeddings, *(name for name in source.layers if name not in inner)]
    schemes = _schemes(source, inner)
    with new_folder(target) as unfinished:
        save_shards(unfinished, _tensors(source, inner, floats, schemes), SHARD)
        rounded = _read_back(unfinished, source, inner, schemes)
        kl = _kl(unfinished, source, inner, schemes)
        ignored = _dense_linears(unfinished)
        config = {**source.config, "quantization_config": _config(schemes, ignored)}
        write_json(unfinished / "config.json", config)
        for pattern in COMPANIONS:
            for path in sorted(folder.glob(pattern)):
                place_file(path, unfinished / path.name, link=False)
        size = sum(path.stat().st_size for path in unfinished.glob("*.safetensors"))
    return {
        "schemes": sorted({f"W{bits}A16" for bits, _, _ in schemes.values()}),
        "layers": len(inner),
        "floats": floats,
        "rounded_scales": rounded,
        "kl": kl,
        "bytes": size,
        "zero_points": _price(dense, source, schemes),
    }


def _price(
    dense: Path | None, source: PackedFolder, schemes: dict[str, Scheme]
) -> dict[str, float] | None:
    """What integer zero points cost; None where there are none, or the weights are not known."""
    layers = {
        name: (bits, source.layer(name).group)
        for name, (bits, _, symmetric) in schemes.items()
        if not symmetric
    }
    return kl_by_offset(dense, layers) if dense is not None and layers else None


def _refuse_gates(folder: Path) -> None:
    if is_gated(folder):
        raise ArtifactError(
            f"{folder} has gates, which readers of compressed-tensors cannot run",
            fix="name the folder of a chain without gates",
        )


def _schemes(source: PackedFolder, names: list[str]) -> dict[str, Scheme]:
    """The scheme of each layer. All are symmetric or none is, because readers fuse q, k and v."""
    schemes = {}
    for name in names:
        layer = source.layer(name)
        if layer.bits not in BITS:
            raise ArtifactError(
                f"{name} has {layer.bits} bits, and readers of compressed-tensors have kernels for"
                f" {' and '.join(map(str, BITS))}",
                fix="make the folder with 4 or 8 bits only",
            )
        group = WHOLE_ROW if source.stated.get("group_size") == WHOLE_ROW else layer.group
        schemes[name] = (layer.bits, group, layer.zeros is None)
    symmetric = all(is_symmetric for _, _, is_symmetric in schemes.values())
    return {name: (bits, group, symmetric) for name, (bits, group, _) in schemes.items()}


def _tensors(
    source: PackedFolder, names: list[str], floats: list[str], schemes: dict[str, Scheme]
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the folder to be written."""
    import torch

    dtype = getattr(torch, dtype_of(source.folder))
    for name in names:
        layer = source.layer(name)
        yield f"{name}.weight_packed", packed(layer.codes, layer.bits)
        exact = not _rounds(layer.scale, dtype)
        yield f"{name}.weight_scale", layer.scale.to(dtype) if exact else layer.scale
        if not schemes[name][2]:
            zeros = packed(_zeros(layer).T, layer.bits).T.contiguous()
            yield f"{name}.weight_zero_point", zeros
        yield f"{name}.weight_shape", torch.tensor(layer.codes.shape)
    for name in floats:
        yield f"{name}.weight", source.layer(name).weight().to(dtype)
    yield from source.others()


def _zeros(layer: IntegerLayer) -> Tensor:
    """Zero points [n, k / group]; those of a symmetric layer are filled in."""
    import torch

    if layer.zeros is not None:
        return layer.zeros
    return torch.full(layer.scale.shape, 2 ** (layer.bits - 1), dtype=torch.uint8)


def _read_back(
    folder: Path, source: PackedFolder, names: list[str], schemes: dict[str, Scheme]
) -> bool:
    """Compare codes and zero points with the source's; returns whether the float type rounds
    scales.

    Raises:
        StepError: they differ.
    """
    import torch

    written, rounded = tensors_of(folder), False
    dtype = getattr(torch, dtype_of(source.folder))
    for name in names:
        layer = source.layer(name)
        codes, zeros = _integers(written, name, schemes[name])
        same = torch.equal(codes, layer.codes)
        if zeros is not None:
            same &= torch.equal(zeros, _zeros(layer))
        if not same:
            raise StepError(f"the codes of {name} differ from those that were written")
        rounded |= _rounds(layer.scale, dtype)
    return rounded


def _integers(
    written: Callable[[str], Tensor], name: str, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Codes [n, k] of a written layer, and its zero points [n, k / group]; None where its scheme is
    symmetric."""
    bits, _, symmetric = scheme
    rows, columns = written(f"{name}.weight_shape").tolist()
    codes = unpacked(written(f"{name}.weight_packed"), bits)[:, :columns]
    if symmetric:
        return codes, None
    return codes, unpacked(written(f"{name}.weight_zero_point").T, bits).T[:rows]


def _kl(folder: Path, source: PackedFolder, names: list[str], schemes: dict[str, Scheme]) -> float:
    """KL from the predictions of the source's weights to those of the written ones."""
    import torch

    model, weights, _ = unfilled(source.folder)
    ids = probe_ids(source.folder)
    layers = ((name, source.layer(name).weight()) for name in (*source.layers, *source.embeddings))
    with torch.inference_mode():
        fill(weights, ((f"{name}.weight", weight) for name, weight in layers))
        fill(weights, source.others())
        logits = model(ids).logits
        fill(weights, _as_read(folder, names, schemes, getattr(torch, dtype_of(source.folder))))
        return kl_of_logits(logits, model(ids).logits)


def _as_read(
    folder: Path, names: list[str], schemes: dict[str, Scheme], dtype: Any
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight of a written folder, with scales in the float type `dtype`, as
    a reader takes them."""
    written = tensors_of(folder)
    for name in names:
        codes, zeros = _integers(written, name, schemes[name])
        scale = written(f"{name}.weight_scale").to(dtype)
        yield f"{name}.weight", IntegerLayer(schemes[name][0], codes, scale, zeros).weight()
    for name in tensor_files(folder):
        if name.removesuffix(".weight") not in names:
            yield name, written(name)


def _rounds(scale: Tensor, dtype: Any) -> bool:
    """Whether a float type rounds some of the scales."""
    return not bool((scale.to(dtype).double() == scale.double()).all())


def _dense_linears(folder: Path) -> list[str]:
    """Names of the layers that are not packed: those with a matrix of floats. The list may name an
    embedding, which is not a linear layer; readers ignore it."""
    from safetensors import safe_open

    names = {"lm_head"}  # also where it shares the embedding's weights, and is in no file
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2:
                    names.add(name.removesuffix(".weight"))
    return sorted(names)


def _config(schemes: dict[str, Scheme], dense: list[str]) -> dict[str, Any]:
    """`quantization_config`: a group for each scheme, of all linear layers or by their names."""
    groups: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        groups[scheme].append(name)
    one = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if one else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    **_strategy(group),
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, ((bits, group, symmetric), names) in enumerate(groups.items())
        },
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def _strategy(group: int) -> dict[str, Any]:
    if group == WHOLE_ROW:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": group}
