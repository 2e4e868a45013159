"""A model as the structures that the compiled kernels read: the particulars of a family as data.

Weights are the torch modules' own memory, float32, bfloat16 or packed. Only norms, gates, and rows
of fused weights that are neither contiguous nor whole tiles are copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.gates.base import Gates
from gateskip.gates.learned import ScalarGates
from gateskip.gates.shortcuts import STORED
from gateskip.kernels import abi
from gateskip.kernels.abi import BLOCK, ROWS_PER_TILE, Activation, Kind, Matrix, NormKind
from gateskip.model.draft_network import DraftNetwork
from gateskip.model.families import (
    Branch,
    Family,
    UnsupportedModel,
    embedding_scale,
    family_of,
    final_norm,
    find_branches,
    rope_at,
)
from gateskip.model.gating import ANCHORS
from gateskip.model.projections import (
    AttentionShape,
    Part,
    Rows,
    attention_parts,
    attention_shape,
    mlp_parts,
    rotates,
)
from gateskip.quantization.grid_linear import SharedHead
from gateskip.quantization.head import ROWS, RoundedHead, to_bytes
from gateskip.quantization.packed_embedding import PackedEmbedding
from gateskip.quantization.packed_linear import ZERO_POINT, DenseLinear, PackedLinear
from gateskip.quantization.rounding import round_to_grid
from gateskip.quantization.tiles import pack_codes, tiles
from gateskip.runtime.huge_pages import collapse

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
}
"""Names in configs -> activations."""
DENSE_KINDS = {torch.float32: Kind.FP32, torch.bfloat16: Kind.BF16}
CHANNELS = 8  # what divides hidden states and heads


@dataclass(frozen=True)
class TokenHead:
    """The head that ranks tokens: the LM head, or its replacement in drafts."""

    matrix: Matrix
    tokens: Tensor | None = None
    """int32 [rows of the matrix]: the token of each row; None where the rows are all tokens."""
    rerank: Matrix | None = None
    """A full LM head, which chooses among the best tokens."""

    @property
    def padded(self) -> int:
        """Rows, rounded up to a multiple of 8."""
        rows: int = self.matrix.n
        return rows + -rows % 8

    def of_all(self, probabilities: Tensor, vocabulary: int) -> Tensor:
        """Probabilities [rows] as those of all tokens [V]."""
        if self.tokens is None:
            return probabilities
        return torch.zeros(vocabulary).index_copy_(0, self.tokens.long(), probabilities)


class Buffers:
    """Memory by name and type, as large as the largest request so far; reused, because the system
    clears new memory page by page."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of a shape; the next one of the same name and type uses the same memory."""
        size, held = math.prod(shape), self._held.get((name, dtype))
        if held is None or len(held) < size:
            with torch.inference_mode(False):
                held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)


class Descriptors:
    """The structures of a model and its gates, and the tensors to which they point.

    `rounded` asks for activations of 8 bits where weights are packed; afterwards it says whether
    there are any.
    """

    def __init__(self, model: Any, gates: Gates | None, rounded: bool) -> None:
        """Raises UnsupportedModel for models that the kernels cannot run."""
        if gates is not None and (type(gates) is not ScalarGates or gates.scales):
            raise UnsupportedModel("only scalar gates that do not scale run natively")
        self._held: list[Any] = []
        self._fused: dict[PackedLinear, Matrix] = {}
        self.around: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        """A branch's shortcut for many rows: down [H, r] and up [r, H] in float16, bias [H]."""
        packed = any(isinstance(part, PackedLinear | SharedHead) for part in model.modules())
        self.rounded = rounded and packed
        self.rounded |= isinstance(model.get_output_embeddings(), RoundedHead)
        self.family = family_of(model)
        self.activation = _activation(model.config, self.family)
        self.rotary_dims = _rotary_dims(model)
        """Number of rotated channels of a head, by the key of a rope table, in the tables'
        order."""
        self.model = self._model(model, gates)
        self.head = self._head(model.get_output_embeddings())
        self.embedding = self._embedding(model)
        collapse(self._held)

    def tensors(self) -> list[Tensor]:
        """The tensors to which the structures point."""
        return list(self._held)

    # -- the model ------------------------------------------------------------------------------

    def _model(self, model: Any, gates: Gates | None) -> abi.Model:
        branches = find_branches(model)
        shapes = [attention_shape(model, b) for b in branches if b.kind == "attention"]
        hidden, shape = model.config.hidden_size, shapes[0]
        for name, width in (("hidden_size", hidden), ("head_dim", shape.head_dim)):
            if width % CHANNELS:
                raise UnsupportedModel(f"{name} {width} is not a multiple of {CHANNELS}")
        pairs = zip(branches[::2], branches[1::2], shapes, strict=True)
        layers = (abi.Layer * len(shapes))(*(self._layer(*pair, gates) for pair in pairs))
        return abi.Model(
            len(shapes),
            hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            max(layer.up.n for layer in layers),
            ANCHORS,
            max(max(x.short_attention.rank, x.short_mlp.rank) for x in layers),
            self._norm(final_norm(model), self.family),
            layers,
        )

    def _layer(
        self, attention: Branch, mlp: Branch, shape: AttentionShape, gates: Gates | None
    ) -> abi.Layer:
        module: Any = attention.module
        heads = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        norms = (attention.norm_in, mlp.norm_in, attention.norm_out, mlp.norm_out, *heads)
        weights: list[Any] = [None, None]
        biases = [0.0, 0.0]
        indices = (attention.index, mlp.index)
        if gates is not None:
            weights = [self._floats(gates.weight[i]) for i in indices]  # type: ignore[index]
            biases = [float(gates.bias[i].detach()) for i in indices]  # type: ignore[index]
        rope = list(self.rotary_dims).index(attention.rope) if rotates(attention) else -1
        return abi.Layer(
            *(self._part(part) for part in (*attention_parts(attention), *mlp_parts(mlp))),
            *(self._norm(norm, attention.family) for norm in norms),
            *weights,
            *(self._shortcut(gates, i) for i in indices),
            *biases,
            shape.scaling,
            shape.softcap or 0.0,
            shape.window or 0,
            rope,
            self.rotary_dims[attention.rope],
            self.activation,
            int(mlp.parallel),
        )

    def _norm(self, norm: Any, family: Family) -> abi.Norm:
        if norm is None:
            return abi.Norm()
        how, bias = family.norm, getattr(norm, "bias", None)
        kind = NormKind.RMS_NORM_FP32 if how.weight_in_fp32 else NormKind.RMS_NORM
        kind = NormKind.LAYER_NORM if how.centered else kind
        weight = self._floats(norm.weight.detach().float() + how.offset)
        epsilon = getattr(norm, "variance_epsilon", None)
        epsilon = float(norm.eps if epsilon is None else epsilon)
        biased = None if bias is None else self._floats(bias)
        return abi.Norm(weight, biased, kind, norm.weight.shape[-1], epsilon)

    def _shortcut(self, gates: Gates | None, branch: int) -> abi.Shortcut:
        """A branch's shortcut, its rank filled up with zeros to a multiple of 8."""
        if gates is None or gates.shortcuts is None:
            return abi.Shortcut()
        down, up, bias = gates.shortcuts.of(branch)
        padding = -len(down) % 8
        down = nn.functional.pad(down, (0, 0, 0, padding)).to(STORED)
        up, bias = nn.functional.pad(up, (0, padding)).to(STORED), bias.float()
        self.around[branch] = (down.T.contiguous(), up.T.contiguous(), bias)
        return abi.Shortcut(self._at(down), self._at(up), self._at(bias), len(down))

    def network(self, network: DraftNetwork) -> abi.DraftNetwork:
        """A draft network, its matrices in 8 bits where their columns are whole blocks."""
        norms = (network.norm_state, network.norm_token, network.norm_mlp, network.norm_final)
        linears = (network.fuse, network.gate, network.up, network.down)
        return abi.DraftNetwork(
            *(
                abi.Norm(self._floats(n.weight), None, NormKind.RMS_NORM_FP32, len(n.weight), n.eps)
                for n in norms
            ),
            *(self.integers(part.weight, torch.ones(part.in_features), 8) for part in linears),
        )

    def integers(self, weight: Tensor, squares: Tensor, bits: int) -> Matrix:
        """Weights [n, k] on a grid of `bits`, rounded by the mean squares [k] of their inputs; in
        float32 where their columns are not whole blocks."""
        n, k = weight.shape
        weight = weight.detach().float()
        if k % BLOCK:
            return Matrix(Kind.FP32, n, k, k, 0, n, n, self._at(weight))
        grid = round_to_grid(weight, squares, bits, BLOCK, in_steps=False)
        return self.packed(PackedLinear.of(grid), rounded=True)

    # -- matrices -------------------------------------------------------------------------------

    def _part(self, part: Part | None) -> Matrix:
        if part is None:
            return Matrix()
        if part.rows is None:
            return self._matrix(part.module)
        if isinstance(part.module, PackedLinear):
            return self._packed_part(part.module, part.rows)
        return self._dense(part.module, part.rows)

    def _matrix(self, module: Any) -> Matrix:
        return (
            self.packed(module, self.rounded)
            if isinstance(module, PackedLinear)
            else self._dense(module)
        )

    def _dense(self, module: Any, rows: Rows | None = None) -> Matrix:
        weight = getattr(module, "weight", None)
        dense = isinstance(module, nn.Linear | DenseLinear | SharedHead)
        if not dense or not isinstance(weight, Tensor):
            raise UnsupportedModel(f"{type(module).__name__} layers have no native kernel")
        if weight.dtype not in DENSE_KINDS or weight.device.type != "cpu":
            raise UnsupportedModel(
                f"{weight.dtype} weights on {weight.device.type} have no native kernel"
            )
        kind, bias, (n, k) = DENSE_KINDS[weight.dtype], module.bias, weight.shape
        place = (n, n)
        if rows is not None:
            n, place = rows.count, (rows.run, rows.stride)
            bias = None if bias is None else rows.of(bias)
            if rows.run % ROWS_PER_TILE and rows.run != rows.count:
                weight, place = rows.of(weight), (n, n)
            else:
                weight = weight[rows.first :]
        biased = None if bias is None else self._floats(bias)
        return Matrix(kind, n, k, k, 0, *place, self._at(weight), bias=biased)

    def packed(self, module: PackedLinear, rounded: bool) -> Matrix:
        """A packed layer; `rounded` multiplies with activations of 8 bits."""
        n, k = module.out_features, module.in_features
        *tables, zero = module.rounded_parts() if rounded else module.float_parts()
        kind = Kind.packed(module.bits, module.book is not None, rounded)
        whole = (self._maybe(part) for part in (module.codes, *tables, module.bias))
        return Matrix(kind, n, k, module.group, zero, n, n, *whole)

    def _packed_part(self, module: PackedLinear, rows: Rows) -> Matrix:
        """Some rows of a packed layer, which are whole tiles of it."""
        if not rows.whole(ROWS_PER_TILE):
            raise UnsupportedModel(
                f"runs of {rows.run} rows of a packed fused projection are not whole tiles of"
                f" {ROWS_PER_TILE}"
            )
        if module not in self._fused:
            self._fused[module] = self.packed(module, self.rounded)
        part = self._fused[module].part(rows.first, rows.count, rows.run, rows.stride)
        if module.bias is not None:
            part.bias = self._at(rows.of(module.bias))
        return part

    def _head(self, module: Any) -> Matrix:
        """The LM head: unchanged where it is packed or on a grid; in 8 bits where the layers are
        packed, since it would cost more than they do."""
        grid = module.grid() if isinstance(module, SharedHead) else None
        if grid is not None and not grid.group % BLOCK:
            return self.packed(PackedLinear.of(grid), self.rounded)
        packed = isinstance(module, PackedLinear)
        if packed or not self.rounded or module.weight.shape[1] % BLOCK:
            return self._matrix(module)
        n, k = module.weight.shape
        codes, scales = zip(*map(_head_bytes, module.weight.split(ROWS)), strict=True)
        whole = (self._at(torch.cat(codes)), self._at(torch.cat(scales)))
        bias = self._maybe(module.bias)
        return Matrix(Kind.INT8_A8, n, k, BLOCK, ZERO_POINT, n, n, *whole, bias=bias)

    def _embedding(self, model: Any) -> abi.Embedding:
        """The embedding: rows of a table in the model's type, or of a packed one."""
        module, scale = model.get_input_embeddings(), embedding_scale(model)
        if isinstance(module, PackedEmbedding):
            table, parts = module.table.exact_matrix()
            self._held += [part for part in parts if isinstance(part, Tensor)]
            return abi.Embedding(table, int(module.dtype == torch.bfloat16), scale)
        (n, k), kind = module.weight.shape, DENSE_KINDS[module.weight.dtype]
        table = Matrix(kind, n, k, k, 0, n, n, self._at(module.weight))
        return abi.Embedding(table, int(kind == Kind.BF16), scale)

    # -- addresses ------------------------------------------------------------------------------

    def _floats(self, tensor: Tensor) -> int:
        return self._at(tensor.float())

    def _maybe(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._at(tensor)

    def _at(self, tensor: Tensor) -> int:
        """The address of a tensor, which is kept alive from now on."""
        whole = tensor.detach().contiguous()
        self._held.append(whole)
        return whole.data_ptr()


def _activation(config: Any, family: Family) -> Activation:
    name = getattr(config, family.activation)
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"the activation {name} has no native kernel")
    return ACTIVATIONS[name]


def _rotary_dims(model: Any) -> dict[str, int]:
    rope = rope_at(model, torch.zeros(1, 1, dtype=torch.long), torch.float32)
    return {key: cos.shape[-1] for key, (cos, _) in rope.items()}


def _head_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of an LM head, whole tiles or the last ones, packed in 8 bits."""
    codes, scale = to_bytes(rows)
    return pack_codes(codes + ZERO_POINT, 8), tiles(scale).bfloat16()
