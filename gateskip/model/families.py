"""The differences between architectures: one table row for each architecture, data only.

Everything else in the package works with a `Branch`: a residual update `h' = h +
norm_out(module(norm_in(h)))` that each token can enter or skip. The passes in torch
(projections.py, reference.py) and the descriptors of the compiled kernels (runtime/descriptors.py)
read the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

BranchKind = Literal["attention", "mlp"]
Rope = dict[str, tuple[Tensor, Tensor]]
"""Key of a branch (`Branch.rope`) -> cos and sin; the key is "" where all layers rotate alike."""


class UnsupportedModel(ValueError):
    """The model's architecture has no row in `FAMILIES`."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """How a norm differs from dividing by a row's root mean square."""

    centered: bool = False
    """Whether the mean is subtracted first, and a bias added last: LayerNorm."""
    offset: float = 0.0
    """A number that is added to a stored weight: Gemma stores w - 1."""
    weight_in_fp32: bool = False
    """Whether rows are multiplied by the weight before they are rounded to the model's type;
    otherwise after."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute names of a branch's parts in one decoder layer, and the differences between
    parts."""

    attention: str = "self_attn"
    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    final_norm: str = "norm"
    norm: Norm = Norm()
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Queries, keys and values: three linear layers, or one with all of them."""
    qkv_by_head: bool = False
    """For one fused layer: whether each head's queries, keys and values follow each other in its
    rows. Otherwise all queries come first, then all keys."""
    output: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """An MLP's gate and up projection: two linear layers, or one, the gate's rows first."""
    gated: bool = True
    """Whether an MLP has such a gate; without one, `gate_up` is the layer before the activation."""
    down: str = "down_proj"
    activation: str = "hidden_act"
    """The field of the config with its name."""
    head_dim: str = "head_dim"
    """The attention module's field with the width of a head."""
    one_window: bool = False
    """Whether all layers attend to `config.sliding_window`; otherwise a layer has its own window,
    if any."""
    rope_by_layer_type: bool = False
    """Whether layers of different types (sliding, full) rotate differently."""
    may_be_parallel: bool = False
    """Whether `config.use_parallel_residual` decides that the MLP reads the same input as
    attention."""


PRE_NORM = Family()
GEMMA: dict[str, Any] = {
    "attention_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
    "norm": Norm(offset=1.0, weight_in_fp32=True),
    "activation": "hidden_activation",
}

FAMILIES: dict[str, Family] = {
    "llama": PRE_NORM,
    "mistral": Family(one_window=True),
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "smollm3": PRE_NORM,
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",), one_window=True),
    "gemma2": Family(**GEMMA),
    "gemma3_text": Family(**GEMMA, rope_by_layer_type=True),
    "olmo2": Family(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
        norm=Norm(weight_in_fp32=True),
    ),
    "gpt_neox": Family(
        attention="attention",
        final_norm="final_layer_norm",
        norm=Norm(centered=True),
        qkv=("query_key_value",),
        qkv_by_head=True,
        output="dense",
        gate_up=("dense_h_to_4h",),
        gated=False,
        down="dense_4h_to_h",
        head_dim="head_size",
        may_be_parallel=True,
    ),
}


@dataclass(frozen=True)
class Branch:
    """One residual update. `index` counts attention and MLP branches in the order they run."""

    index: int
    layer: int
    kind: BranchKind
    module: nn.Module
    family: Family
    norm_in: nn.Module | None
    norm_out: nn.Module | None
    rope: str = ""
    """The entry of a `Rope` by which its attention rotates."""
    parallel: bool = False
    """Whether it reads the same stream as its layer's attention, before attention's output is
    added."""

    def enter(self, hidden: Tensor) -> Tensor:
        """The branch's normed view of the residual stream, which its gate also reads."""
        return hidden if self.norm_in is None else self.norm_in(hidden)

    def leave(self, output: Tensor) -> Tensor:
        """The term that is added to the residual stream: `output` after the post-norm, if there is
        one."""
        return output if self.norm_out is None else self.norm_out(output)


def find_branches(model: Any) -> list[Branch]:
    """Branches of a causal LM in execution order: attention 0, MLP 0, attention 1, ...

    Raises `UnsupportedModel` for an architecture that has no row.
    """
    return list(_walk(model, family_of(model)))


def family_of(model: Any) -> Family:
    """A causal LM's row in the table. Raises `UnsupportedModel` where there is none."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} is not supported; supported: {supported}"
        )
    return family


def _walk(model: Any, family: Family) -> Iterator[Branch]:
    config = model.config
    parallel = family.may_be_parallel and config.use_parallel_residual
    for number, layer in enumerate(backbone(model).layers):
        yield Branch(
            2 * number,
            number,
            "attention",
            getattr(layer, family.attention),
            family,
            _named(layer, family.attention_in),
            _named(layer, family.attention_out),
            config.layer_types[number] if family.rope_by_layer_type else "",
        )
        yield Branch(
            2 * number + 1,
            number,
            "mlp",
            layer.mlp,
            family,
            _named(layer, family.mlp_in),
            _named(layer, family.mlp_out),
            parallel=parallel,
        )


def _named(layer: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else getattr(layer, name)


# -- what stands around the branches ----------------------------------------------------------


def backbone(model: Any) -> Any:
    """The decoder below the LM head: its layers, embedding, final norm and rotary table."""
    return getattr(model, model.base_model_prefix)


def device_of(model: Any) -> torch.device:
    """The device of the model's embedding, where token ids are needed."""
    embedding = model.get_input_embeddings()
    held: Tensor = next(chain(embedding.parameters(), embedding.buffers()))
    return held.device


def to_device(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on a device; the host does not wait for the copy."""
    tensor = torch.as_tensor(values, device="cpu")
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory would block
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> list[Any]:
    """The numbers of a tensor. On a device other than the CPU the host waits for them: decoding
    asks here alone, for the tokens of a step or round, and for counts when a call ends."""
    numbers: list[Any] = tensor.tolist()
    return numbers


def to_cpu(tensor: Tensor) -> Tensor:
    """The same for a tensor that is used as one."""
    return tensor.cpu()


def final_norm(model: Any) -> Any:
    """The norm between the last layer and the LM head."""
    family = FAMILIES.get(model.config.model_type, PRE_NORM)
    return getattr(backbone(model), family.final_norm)


def embed(model: Any, input_ids: Tensor) -> Tensor:
    """Token ids [...] -> the residual stream [..., H] before the first layer."""
    embedded: Tensor = model.get_input_embeddings()(input_ids)
    return embedded


def embedding_scale(model: Any) -> float:
    """Factor by which `embed` multiplies a row of the embedding's table, rounded to the table's
    type."""
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return 1.0
    dtype = embedding.dtype if hasattr(embedding, "dtype") else embedding.weight.dtype
    return float(torch.as_tensor(scale).to(dtype))


def head(model: Any, hidden: Tensor) -> Tensor:
    """Final hidden states [..., H] (already normed) -> logits [..., V]."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = logit_cap(model)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def logit_cap(model: Any) -> float | None:
    """The bound of logits above and below 0 in `head`; None for no cap."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def rope_at(model: Any, positions: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin for integer positions [B, S], two of [B, S, D] per kind of layer, in `dtype`.

    D is smaller than a head where only a part of it is rotated.
    """
    like = torch.empty(0, dtype=dtype, device=positions.device)
    rotary = backbone(model).rotary_emb
    if family_of(model).rope_by_layer_type:
        kinds = sorted(set(model.config.layer_types))
        return {kind: _cast(rotary(like, positions, kind), dtype) for kind in kinds}
    return {"": _cast(rotary(like, positions), dtype)}


def _cast(rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rope[0].to(dtype), rope[1].to(dtype)
