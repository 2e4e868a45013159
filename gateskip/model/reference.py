"""The whole model as one differentiable pass, with a mask on every branch.

This is the reference: it computes every branch and multiplies by 0 or 1. Training needs its
gradients, calibration its gate logits, and tests compare the backends of runtime/ with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gateskip.model.families import Branch, device_of, embed, final_norm, find_branches, rope_at
from gateskip.model.gating import ANCHORS, TokenGates
from gateskip.model.projections import (
    AttentionShape,
    attention_shape,
    project_keys_values,
    project_out,
    project_queries,
)

# (branch, gate logits [B, S]) -> mask [B, S], 1 where the branch is entered
MaskRule = Callable[[Branch, Tensor], Tensor]
# called with (branch, branch input [B, S, H], branch output [B, S, H])
Observer = Callable[[Branch, Tensor, Tensor], None]


def masked_forward(
    model: Any,
    input_ids: Tensor,
    gates: TokenGates | None = None,
    mask: MaskRule | None = None,
    kv_rule: str = "project",
    observe: Observer | None = None,
    watch: Callable[[Tensor], None] | None = None,
    checkpointing: bool = False,
    start: tuple[int, Tensor] | None = None,
    stop: int | None = None,
) -> Tensor:
    """Final normed hidden states [B, S, H] of unpadded rows input_ids [B, S].

    Without gates and mask this is the dense model. `kv_rule` gives the keys and values of a skipped
    token: its own projections (`project`) or those of the layer below (`copy`). Gates read the
    branch's input without passing gradients into it, as published. `watch` is called with every
    branch's gate [B, S, 1 or H]. `checkpointing` runs each branch again in the backward pass
    instead of keeping its activations. `start` is the first branch to run, which begins a layer,
    and the residual stream [B, S, H] before it. `stop` is the first branch that does not run: the
    residual stream before it is returned.
    """
    run = _recomputed if checkpointing and torch.is_grad_enabled() else _at_once
    input_ids = input_ids.to(device_of(model))  # text waits in memory until its turn
    first, hidden = (0, embed(model, input_ids)) if start is None else start
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    rope = rope_at(model, positions, hidden.dtype)
    below: tuple[Tensor, Tensor] | None = None
    source = hidden
    with nullcontext() if gates is None else gates.opened():
        for branch in find_branches(model)[first:stop]:
            source = source if branch.parallel else hidden
            x = branch.enter(source)
            keep, scale = None, None
            if gates is not None:
                # Thresholds compare logits, so they are computed in float32
                with torch.autocast(x.device.type, enabled=False):
                    keep = mask and anchored(mask(branch, gates.logit(branch.index, x.detach())))
                    if gates.scales or watch is not None:
                        scale = gates.gate(branch.index, x.detach()).to(x.dtype)
                if watch is not None and scale is not None:
                    watch(scale)
                scale = scale if gates.scales else None
            before = gates is not None and gates.place == "before"
            entered = x * scale if before and scale is not None else x
            if branch.kind == "attention":
                at = rope[branch.rope]
                output, below = run(_attention, model, branch, entered, at, keep, kv_rule, below)
            else:
                output = run(branch.module, entered)
            output = branch.leave(output)
            if scale is not None and not before:
                output = output * scale
            if observe is not None:
                observe(branch, x, output)
            hidden = hidden + (output if keep is None else _mixed(gates, branch, x, output, keep))
    return final_norm(model)(hidden) if stop is None else hidden


def _mixed(
    gates: TokenGates | None, branch: Branch, x: Tensor, output: Tensor, keep: Tensor
) -> Tensor:
    """The branch's output [B, S, H] where `keep` [B, S] is 1, the shortcut's where it is 0."""
    entered = keep.unsqueeze(-1).to(output)
    if gates is None or gates.shortcuts is None:
        return output * entered
    instead: Tensor = gates.shortcuts(branch.index, x)
    return instead + (output - instead) * entered


def _at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)


def anchored(keep: Tensor) -> Tensor:
    """A mask [B, S] under which the first tokens enter."""
    return torch.cat((torch.ones_like(keep[:, :ANCHORS]), keep[:, ANCHORS:]), dim=1)


def _attention(
    model: Any,
    branch: Branch,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    keep: Tensor | None,
    kv_rule: str,
    below: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    keys, values = project_keys_values(branch, x, rope)  # [B, S, kv_heads, D]
    if kv_rule == "copy" and keep is not None and below is not None:
        projected = keep[..., None, None].to(keys)
        keys = keys * projected + below[0] * (1 - projected)
        values = values * projected + below[1] * (1 - projected)
    queries = project_queries(branch, x, rope)
    mixed = attend(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attention_shape(model, branch),
        None,
    )
    return project_out(branch, mixed.transpose(1, 2).flatten(-2)), (keys, values)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape, visible: Tensor | None
) -> Tensor:
    """Softmax attention. queries [B, heads, Q, D], keys, values [B, kv_heads, T, D] -> as queries.

    `visible` [B or 1, 1, Q, T] is True where a query attends to a slot; None means causal from the
    first slot, which requires Q = T.
    """
    if visible is None and (shape.softcap is not None or shape.window is not None):
        slots = torch.arange(keys.shape[2], device=keys.device)
        visible = causal(slots.unsqueeze(0), slots, shape.window)
    if shape.softcap is None:
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=visible,
            is_causal=visible is None,
            scale=shape.scaling,
            enable_gqa=True,
        )
    return _softcapped(queries, keys, values, shape, visible)


def _softcapped(
    queries: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape, visible: Tensor | None
) -> Tensor:
    groups = shape.heads // shape.kv_heads
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    assert shape.softcap is not None
    scores = queries @ keys.transpose(-1, -2) * shape.scaling
    scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(queries.dtype) @ values


def causal(queries: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """The slots that a query sees. query positions [B, Q], slots [T] -> bool [B, 1, Q, T].

    A cache slot's number is its token's position, so padding needs no mask of its own.
    """
    visible = slots <= queries.unsqueeze(-1)
    if window is not None:
        visible &= slots > queries.unsqueeze(-1) - window
    return visible.unsqueeze(1)
