"""The stages `int8`, `int6`, `int4`, `int3` and `int2`: weights on integer grids in groups.

Ranges are searched by the error of the layer's output. Each rounding error is compensated in the
weights that are not rounded yet (gateskip/rounding/compensate.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compose.artifacts.folder import GRID_METHOD
from compose.errors import RuleBroken, UserError
from compose.stages.base import (
    AS_STORED,
    UNPACKED,
    ModelShape,
    Role,
    Split,
    Stage,
    StageJob,
    StoredBits,
)
from compose.stages.gate_transfer import carry_gates
from compose.stages.quantize.grid_folder import (
    Stored,
    as_gptq,
    bytes_beside,
    gptq_config,
    stored_table_bits,
    write_grids,
)
from compose.stages.quantize.linears import (
    Bits,
    linear_names,
    matching,
    value_projections,
)
from compose.store import read_json, write_json
from gateskip.quantization.offsets import SYMMETRIC_FROM, Offset, bits_beside

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.quantization.grid import Grid
    from gateskip.rounding.allocation import Costs
    from gateskip.rounding.compensate import Rounding
    from gateskip.rounding.layer_files import Rounded
    from gateskip.rounding.layerwise import Choose

MOMENTS = 5 * 4  # bytes for each number of second moments: them, their order, and their factor
WORKED = 6 * 4  # bytes for each weight of the linear layers that are rounded together
TRIED = 500  # tokens whose pass takes as long as a trial of all layers, at 1.5B
GRADIENTS_OF = 2048  # tokens whose gradients are taken; logits exist for 256 at a time
EMBEDDING_ROWS = 8192  # rounded at a time
TableBits = Literal[4, 6, 8] | None
GroupSize = Literal[32, 64, 128]


class Allocate(BaseModel):
    """Size limit under which a number of bits is chosen for each layer. Set either `size_mb` or
    `bits_per_weight`, not both."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    size_mb: float | None = Field(default=None, gt=0)
    """Maximum size of all files of the model folder together, in megabytes (10**6 bytes)."""

    bits_per_weight: float | None = Field(default=None, gt=0)
    """Maximum mean number of bits per weight of the linear layers in decoder layers, including
    scales and offsets."""

    among: tuple[Bits, ...] = (2, 3, 4, 8)
    """Numbers of bits per weight that a layer can get."""

    by: Literal["measured", "gradients"] = "measured"
    """How the loss of quality (KL) of each number of bits is determined for each layer: measured
    with one pass for each choice (`measured`), or estimated from gradients on 2048 calibration
    tokens (`gradients`). `by: gradients` takes about a tenth of the time of `by: measured`, holds
    no model in float32, and is less exact. `by: measured` also measures the KL of the final choice
    of bits."""

    blocks: int = Field(default=2, ge=1)
    """Number of blocks of calibration text on which KL is measured."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.size_mb is None) == (self.bits_per_weight is None):
            raise ValueError("allocate needs either size_mb or bits_per_weight")
        return self


class Integers(Stage):
    """Round linear layers to integers with a scale, and a minimum, for every group of weights."""

    version: ClassVar[int] = 9
    role: ClassVar[Role] = "quantize"
    bits: ClassVar[Bits]
    """Bits of one weight."""

    group_size: GroupSize = 32
    """Number of weights that share a scale. The group size must divide the number of inputs of
    every linear layer."""

    compensate: bool = True
    """Whether the weights of a layer that are not yet rounded are adjusted to compensate for
    rounding errors, with calibration text. With `compensate: false`, each weight is rounded to the
    nearest value, which takes only seconds."""

    calibrate: bool = True
    """Whether weights are rounded more exactly where the inputs of a layer are large on calibration
    text. With `calibrate: false`, all inputs count the same and no text is read; this loses much
    quality in 4 bits and little in 8 bits. `compensate` and `allocate` need `calibrate: true`."""

    damp: float = Field(default=0.01, gt=0, lt=1)
    """Damping of the error compensation: `damp` times the mean second moment of a layer's inputs is
    added to the diagonal of their second-moment matrix."""

    skip: tuple[str, ...] = ()
    """Linear layers that are not quantized in any decoder layer, identified by the end of their
    names, such as `down_proj` or `self_attn.v_proj`."""

    mixed: dict[str, Bits] = Field(default_factory=dict)
    """Linear layers that get other numbers of bits, identified by the end of their names, such as
    `{down_proj: 8}` or `{layers.0.self_attn.v_proj: 8}`. Groups of 6-bit and 8-bit weights have a
    scale and no offset."""

    allocate: Allocate | None = None
    """Choose the number of bits and the group size for each layer under a size limit. The layers in
    which more bytes lower the KL most get more bits or smaller groups. Groups have `group_size`
    weights or more, up to 128. Layers that `mixed` names keep the bits that `mixed` sets."""

    embedding: TableBits = 8
    """Bits per weight of the embedding and of the LM head, in groups of 32 weights that share a
    scale. With `embedding: null`, neither the embedding nor the LM head is quantized."""

    untied_embedding: TableBits = None
    """Bits per weight of an embedding that the LM head does not share. Such an embedding is only
    looked up, so it needs fewer bits than the LM head. With `untied_embedding: null`, it gets as
    many bits as `embedding` says. `untied_embedding` has no effect in models whose LM head shares
    the embedding's weights (`tie_word_embeddings`)."""

    @model_validator(mode="before")
    @classmethod
    def _without_text_nothing_is_compensated(cls, data: Any) -> Any:
        alone = isinstance(data, dict) and data.get("calibrate") is False
        return {"compensate": False, **data} if alone else data

    @model_validator(mode="after")
    def _tables_together(self) -> Self:
        if self.embedding is None and self.untied_embedding is not None:
            raise ValueError(
                "untied_embedding needs embedding, the bits of the LM head: set embedding: 6 or 8"
            )
        return self

    @model_validator(mode="after")
    def _text_for_what_needs_it(self) -> Self:
        if not self.calibrate and (self.compensate or self.allocate):
            raise ValueError("compensate and allocate need calibrate: leave calibrate: false out")
        return self

    @property
    def reads_data(self) -> tuple[Split, ...]:  # type: ignore[override]
        """Calibration text, unless the weights alone decide."""
        return ("calibration",) if self.calibrate else ()

    def identity(self, file_sha256: Mapping[str, str]) -> dict[str, Any]:
        """As of every stage; newer settings are part of it only where they change something, so
        that keys stay."""
        identity = super().identity(file_sha256)
        newer = {"calibrate": True, "untied_embedding": None}
        for name in (name for name, before in newer.items() if getattr(self, name) == before):
            del identity["params"][name]
        if self.allocate is not None and not self._measures_kl():
            identity["gradients"] = "layer by layer"
        return identity

    def _measures_kl(self) -> bool:
        """Whether the whole model runs, rounded and unrounded: it is held in float32 for that."""
        return self.allocate is not None and self.allocate.by == "measured"

    def grid_offset(self, bits: int) -> Offset:
        """Kind of offset that groups of that many bits have beside their scale."""
        return "none" if bits >= SYMMETRIC_FROM else "real"

    def value_bits(self) -> Bits:
        """Bits of value projections, where neither `mixed` nor `allocate` sets them."""
        return self.bits

    def sets_value_bits(self) -> bool:
        """Whether value projections have a number of bits that `allocate` does not change."""
        return False

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `group-divides`: whole groups in every layer."""
        super().check(shape, before)
        if shape is None:
            return
        for name, width in shape.linear_in_features(self.skip).items():
            if width % self.group_size:
                raise RuleBroken(
                    "group-divides",
                    f"group_size {self.group_size} does not divide the {width} inputs of {name}",
                    fix="set group_size: 32, and round_to: 32 where it was pruned",
                )
        if self.embedding and shape.hidden_size % 32:
            raise RuleBroken(
                "whole-tiles",
                f"the embedding's rows have {shape.hidden_size} values, not a multiple of 32",
                fix="set embedding: null",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized=GRID_METHOD)

    def most_bits(self) -> int:
        """The most bits that any layer may get; 16 where some are not packed. More bits for value
        projections alone are not counted: a draft copy in as many bits as the other layers is no
        faster."""
        among = () if self.allocate is None else self.allocate.among
        return UNPACKED if self.skip else max(self.bits, *self.mixed.values(), *among, 0)

    def stored_bits(self, shape: ModelShape) -> StoredBits | None:
        """Codes, with a scale and an offset for each group; and the embedding's codes and
        scales."""
        if self.mixed or self.skip or (self.allocate and self.allocate.size_mb is not None):
            return None
        values = shape.value_share * (self._in_file(self.value_bits()) - self._in_file(self.bits))
        layers = self._in_file(self.bits) + values
        if self.allocate is not None and self.allocate.bits_per_weight is not None:
            layers = self.allocate.bits_per_weight
        if self.embedding is None:
            return StoredBits(layers)
        tables = self.table_bits(shape.tie_embeddings)
        return StoredBits(layers, sum(map(stored_table_bits, tables)) / len(tables))

    def table_bits(self, tied: bool) -> list[int]:
        """Bits of the table of a tied model, or of the embedding and of the LM head."""
        assert self.embedding is not None, "the tables are packed"
        return (
            [self.embedding] if tied else [self.untied_embedding or self.embedding, self.embedding]
        )

    def _in_file(self, bits: int) -> float:
        """Bits of a weight, with its share of the group's scale and offset."""
        return bits + bits_beside(bits, self.grid_offset(bits)) / self.group_size

    def held(self) -> float:
        """The mapped file, and the layers rounded so far; or the model in float32."""
        rounded = self._in_file(max(self.bits, 4)) / 8  # values and the embedding keep more bits
        return 8.0 if self._measures_kl() else AS_STORED + rounded

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The embedding in float32, or a layer with the widest second moments."""
        table = 4.0 * shape.vocab_size * shape.hidden_size
        inner, outer = shape.intermediate_size, shape.hidden_size
        up = MOMENTS * outer**2 + WORKED * 2 * inner * outer
        down = MOMENTS * inner**2 + WORKED * inner * outer
        layer = 4.0 * shape.layer_weights + max(up, down)
        return max(table, layer, self._gradients(shape))

    def costs_like(self) -> str:
        """All numbers of bits alike; steps that read no text, or measure KL, for themselves."""
        if not self.calibrate:
            return "integers without text"
        return "integers that measure KL" if self._measures_kl() else "integers"

    def searched(self, shape: ModelShape) -> float:
        """Nothing without text; with `allocate`, each layer is rounded in each way it may get."""
        if not self.calibrate:
            return 0.0
        groups = sum(size >= self.group_size for size in get_args(GroupSize))
        tried = 0 if self.allocate is None else len(self.allocate.among) * groups
        return super().searched(shape) + TRIED * tried

    def _gradients(self, shape: ModelShape) -> float:
        """Bytes for gradients in float32: the inputs of all layers; with them what one layer reads
        and writes, or the LM head and logits."""
        if self.allocate is None or self._measures_kl():
            return 0.0
        entered = GRADIENTS_OF * shape.num_layers * shape.hidden_size
        layer = 3 * GRADIENTS_OF * shape.tapped / shape.num_layers
        logits = shape.vocab_size * (shape.hidden_size + 4 * 256)
        return 4.0 * (entered + max(layer, logits))

    def run(self, job: StageJob) -> dict[str, Any]:
        """Round layer after layer, and save the folder."""
        from compose.artifacts.packed_folder import stored_dtype
        from gateskip.quantization.folders import load_model
        from gateskip.rounding.allocation import distribution, mean_kl

        blocks = self._blocks(job)
        tables = self._tables(job)  # first: a refusal comes before minutes of work
        grids = {n: self._stored(_rounded_rows(job, n, bits)) for n, bits in tables.items()}
        whole = self._measures_kl()
        model = load_model(job.source, "float32" if whole else stored_dtype(job.source))
        model, blocks = model.to(job.device), blocks.to(job.device)
        how, measured = self._settings(job), blocks[:0]
        record: dict[str, Any] = {"bits": self.bits, "blocks": len(blocks)}
        if self.allocate is not None:
            record["allocation"], how = self._allocated(job, model, blocks, how)
            record["layer_bits"] = {name: rounding.bits for name, rounding in how.items()}
            record["layer_groups"] = {name: rounding.group for name, rounding in how.items()}
            measured = blocks[: self.allocate.blocks if whole else 0]
        dense = distribution(model, measured) if len(measured) else None
        errors = {}
        for name, rounded in self._round(job, model, blocks, how.get, let_go=not whole):
            grids[name] = self._stored(rounded.grid)
            errors[name] = float(f"{rounded.error:.4g}")
        if dense is not None:
            record["allocation"]["kl"] = _short(mean_kl(dense, distribution(model, measured)))
        del model
        packed = {name: how[name] for name in errors}
        write_grids(job, grids, self._quantization(job, packed, list(tables.values())))
        carry_gates(job)
        return record | {"layer_errors": errors}

    def _blocks(self, job: StageJob) -> Tensor:
        """Token ids [N, S] of the calibration text; N is 0 where the weights alone decide."""
        import torch
        from transformers import AutoTokenizer

        from compose.stages.text.split_text import split_blocks

        if not self.calibrate:
            return torch.empty(0, 1, dtype=torch.long)
        return split_blocks(job, "calibration", AutoTokenizer.from_pretrained(job.source))

    def _round(
        self, job: StageJob, model: Any, blocks: Tensor, choose: Choose, *, let_go: bool
    ) -> Iterator[tuple[str, Rounded]]:
        """Every layer on its grid, by name, as soon as it is rounded."""
        from gateskip.rounding.layer_files import LayerFiles
        from gateskip.rounding.layerwise import round_layers
        from gateskip.rounding.weights_alone import round_weights_alone

        def progress(done: int, total: int) -> None:
            job.progress(done, total, f"rounding to {self.bits} bits")

        if not self.calibrate:
            return round_weights_alone(model, choose, progress, let_go)
        finished = LayerFiles(job.work / "layers")
        return round_layers(model, blocks, choose, self.compensate, progress, let_go, finished)

    def _stored(self, grid: Grid) -> Stored:
        """A grid's tensors in the folder's format."""
        from gateskip.quantization.grid_linear import stored

        return stored(grid)

    def _settings(self, job: StageJob) -> dict[str, Rounding]:
        """How each linear layer is rounded, by its name; layers that are not packed are absent."""
        linears, head = linear_names(job)
        inside = [name for name in linears if name not in head]
        bits: dict[str, Bits] = dict.fromkeys(inside, self.bits)
        bits |= dict.fromkeys(value_projections(inside), self.value_bits())
        for end, n_bits in self.mixed.items():
            bits |= dict.fromkeys(matching([end], inside, "mixed"), n_bits)
        for name in matching(self.skip, inside):
            del bits[name]
        return {name: self._rounding(n_bits) for name, n_bits in bits.items()}

    def _rounding(self, bits: Bits, group: int | None = None) -> Rounding:
        """Rounding to that many bits, in groups of `group_size` or as told."""
        from gateskip.rounding.compensate import Rounding

        return Rounding(bits, group or self.group_size, self.grid_offset(bits), self.damp)

    def _allocated(
        self, job: StageJob, model: Any, blocks: Tensor, how: dict[str, Rounding]
    ) -> tuple[dict[str, Any], dict[str, Rounding]]:
        """The record of the allocation, and how each layer is rounded under the size limit."""
        from gateskip.rounding.allocation import allocate

        assert self.allocate is not None, "the caller asked"
        fixed = {n for end in self.mixed for n in matching([end], list(how), "mixed")}
        if self.sets_value_bits():
            fixed |= set(value_projections(how))
        layers = dict(model.named_modules())
        free = {name: self._options(layers[name]) for name in how if name not in fixed}
        costs = self._costs(job, model, blocks, free)
        sizes = {
            name: {option: grid_bytes(layers[name], option) for option in options}
            for name, options in free.items()
        }
        limit = self._limit(job, layers, how, fixed)
        try:
            chosen = allocate(costs, sizes, limit)
        except ValueError as error:
            raise UserError(
                f"allocate finds no bits that fit: {error}",
                fix="raise size_mb or bits_per_weight, allow fewer bits in `among`, or pack the "
                "embedding in fewer bits",
            ) from error
        record = {
            "by": self.allocate.by,
            "predicted_kl": _short(sum(costs[name][option] for name, option in chosen.items())),
            "sensitivities": {
                name: {label: _short(cost) for label, cost in each.items()}
                for name, each in _by_label(costs).items()
            },
        }
        return record, {name: chosen.get(name, rounding) for name, rounding in how.items()}

    def _options(self, layer: Any) -> list[Rounding]:
        """Each number of bits, in each group size of at least `group_size` that fits the layer."""
        assert self.allocate is not None, "the caller asked"
        sizes = [size for size in get_args(GroupSize) if size >= self.group_size]
        groups = [size for size in sizes if layer.in_features % size == 0]
        return [self._rounding(bits, group) for bits in self.allocate.among for group in groups]

    def _costs(
        self, job: StageJob, model: Any, blocks: Tensor, options: dict[str, list[Rounding]]
    ) -> Costs:
        """The KL cost of each layer's options."""
        from compose.artifacts.packed_folder import load_as_stored
        from gateskip.rounding.allocation import measure_costs
        from gateskip.rounding.sensitivity import estimate_costs

        assert self.allocate is not None, "the caller asked"

        def of(name: str) -> list[Rounding]:
            return options.get(name, [])

        def progress(done: int, total: int) -> None:
            job.progress(done, total, "measuring the cost of bits")

        if self.allocate.by == "gradients":
            same = load_as_stored(job.source).to(job.device)
            return estimate_costs(same, blocks, of, job.seed, progress)
        file = job.work / "costs.json"
        known = {
            name: {option: costs[_label(option)] for option in of(name)}
            for name, costs in (read_json(file) or {}).items()
        }

        def keep(costs: Costs) -> None:
            write_json(file, _by_label(costs))

        some = blocks[: self.allocate.blocks]
        return measure_costs(model, some, of, progress, known, keep)

    def _limit(
        self, job: StageJob, layers: dict[str, Any], how: dict[str, Rounding], fixed: set[str]
    ) -> int:
        """Most bytes of the layers that bits are shared out over."""
        assert self.allocate is not None, "the caller asked"
        free = [name for name in how if name not in fixed]
        if self.allocate.bits_per_weight is not None:
            weights = sum(layers[name].weight.numel() for name in free)
            return int(self.allocate.bits_per_weight * weights / 8)
        assert self.allocate.size_mb is not None, "one of the two is given"
        beside = bytes_beside(job, set(how), self._tables(job))
        beside += sum(grid_bytes(layers[name], how[name]) for name in fixed)
        return int(self.allocate.size_mb * 1e6) - beside

    def _tables(self, job: StageJob) -> dict[str, int]:
        """Bits of the embedding, and of an LM head with its own weights, by name."""
        if self.embedding is None:
            return {}
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from compose.artifacts.packed_folder import tensor_files

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.source))
        names = {module: name for name, module in model.named_modules()}
        tables = [names[model.get_input_embeddings()]]
        tied = model.config.get_text_config().tie_word_embeddings
        if not tied:
            tables.append(names[model.get_output_embeddings()])
        stored = tensor_files(job.source)
        for name in tables:
            if f"{name}.weight" not in stored:
                raise UserError(
                    f"{name} has another name in this model's files, so that it cannot be packed",
                    fix="set embedding: null",
                )
        return dict(zip(tables, self.table_bits(tied), strict=True))

    def _quantization(
        self, job: StageJob, how: dict[str, Rounding], tables: Sequence[int]
    ) -> dict[str, Any]:
        """The folder's `quantization_config`; `tables` are the bits of the packed tables."""
        linears, head = linear_names(job)
        layers = {
            name: {"bits": rounding.bits, "group_size": rounding.group}
            for name, rounding in how.items()
            if (rounding.bits, rounding.group) != (self.bits, self.group_size)
        }
        return {
            "quant_method": GRID_METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "offset": self.grid_offset(min(self.bits, 4)),
            "steps": True,
            "layers": layers,
            "unpacked": [name for name in linears if name not in how and name not in head],
            "embedding": {"bits": tables[0], "group_size": 32} if tables else None,
            **({"head": {"bits": tables[-1], "group_size": 32}} if len(set(tables)) > 1 else {}),
        }


class Int8(Integers):
    """Round weights to 8-bit integers with a scale for each group of weights, as in GGUF's Q8_0."""

    bits: ClassVar[Bits] = 8

    use: Literal["int8"] = "int8"
    """The stage's name."""

    calibrate: bool = False
    """Whether weights are rounded more exactly where the inputs of a layer are large on calibration
    text. By default, no text is read: in 8 bits the loss of quality is small either way.
    `compensate` and `allocate` set `calibrate: true`."""

    compensate: bool = False
    """Whether the weights of a layer that are not yet rounded are adjusted to compensate for
    rounding errors, with calibration text. In 8 bits this lowers a small loss of quality a little,
    and takes minutes instead of seconds. `allocate` sets `compensate: true`."""

    @model_validator(mode="before")
    @classmethod
    def _text_where_it_is_asked_for(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not (data.get("compensate") or data.get("allocate")):
            return data
        return {"calibrate": True, "compensate": True, **data}


class Int6(Integers):
    """Round weights to 6-bit integers with a scale for each group of weights. A model in `int6`
    lies between `int8` and `int4` in size and in loss of quality. A GGUF file stores the 6-bit
    integers in blocks of 8 bits."""

    bits: ClassVar[Bits] = 6

    use: Literal["int6"] = "int6"
    """The stage's name."""

    embedding: TableBits = 6
    """Bits per weight of the embedding and of the LM head, in groups of 32 weights that share a
    scale. With `embedding: null`, neither the embedding nor the LM head is quantized."""


class WithOffset(Integers):
    """Base of `int4`, `int3` and `int2`: an offset for each group, and more bits for value
    projections."""

    version: ClassVar[int] = 10

    offset: Literal["real", "integer"] = "real"
    """Offset of each group of weights: a minimum as in GGUF's Q4_1 (`real`), or an integer zero
    point as in the GPTQ format (`integer`). `offset: integer` writes a folder in the GPTQ format,
    which gptqmodel, vLLM and transformers read. With `offset: integer`, all linear layers get the
    same number of bits, and the embedding and the LM head are not quantized."""

    values: Bits | None = 8
    """Bits per weight of the value projections (`v_proj`), which are 3 % of SmolLM2's weights and
    cause a quarter of the KL at 4 bits. With `values: null`, the value projections get the same
    number of bits as the other layers, or those that `allocate` chooses. If `allocate` is given and
    `values` is not, `values` is null. For layers that `mixed` or `skip` names, `values` has no
    effect. `values` has no effect in models that fuse queries, keys and values into one layer
    (phi3, gpt_neox)."""

    @model_validator(mode="after")
    def _fits_its_format(self) -> Self:
        stated = self.model_fields_set
        if "values" not in stated and (self.offset == "integer" or self.allocate is not None):
            object.__setattr__(self, "values", None)
        if self.offset == "integer" and (self.mixed or self.values or self.bits == 3):
            raise ValueError(
                "offset: integer is written as GPTQ, in 4 or 2 bits for all layers: "
                "leave mixed and values out, or set offset: real"
            )
        if self.offset == "integer" and "embedding" not in stated:
            object.__setattr__(self, "embedding", None)
        if self.offset == "integer" and self.embedding is not None:
            raise ValueError("GPTQ has no packed embedding: set embedding: null")
        return self

    def value_bits(self) -> Bits:
        """As set; when left out, the default of the stage."""
        return self.values or self.bits

    def sets_value_bits(self) -> bool:
        """As set."""
        return self.values is not None

    def identity(self, file_sha256: Mapping[str, str]) -> dict[str, Any]:
        """Steps of earlier versions, whose value projections `allocate` left out, are made anew."""
        identity = super().identity(file_sha256)
        if self.allocate is not None and self.values is None:
            identity["params"]["values"] = "allocated"
        return identity

    def grid_offset(self, bits: int) -> Offset:
        """As set; 6 bits and more need none."""
        return "none" if bits >= SYMMETRIC_FROM else self.offset

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="gptq" if self.offset == "integer" else GRID_METHOD)

    def _quantization(
        self, job: StageJob, how: dict[str, Rounding], tables: Sequence[int]
    ) -> dict[str, Any]:
        if self.offset == "real":
            return super()._quantization(job, how, tables)
        return gptq_config(self.bits, self.group_size)

    def _stored(self, grid: Grid) -> Stored:
        return super()._stored(grid) if self.offset == "real" else as_gptq(grid)


class Int4(WithOffset):
    """Round weights to 4-bit integers with a scale and an offset for each group of weights."""

    bits: ClassVar[Bits] = 4

    use: Literal["int4"] = "int4"
    """The stage's name."""


class Int3(WithOffset):
    """Round weights to 3-bit integers with a scale and an offset for each group of weights."""

    bits: ClassVar[Bits] = 3

    use: Literal["int3"] = "int3"
    """The stage's name."""


class Int2(WithOffset):
    """Round weights to 2-bit integers with a scale and an offset for each group of weights."""

    bits: ClassVar[Bits] = 2

    use: Literal["int2"] = "int2"
    """The stage's name."""


def grid_bytes(linear: Any, how: Rounding) -> int:
    """Bytes of a linear layer's grid in a file: codes, scales and offsets, and rows' exponents."""
    weights: int = linear.weight.numel()
    lines = weights // how.group * bits_beside(how.bits, how.offset) // 8
    rows: int = linear.out_features
    return weights * how.bits // 8 + lines + rows


def _label(how: Rounding) -> str:
    """Bits and group size, as in a record."""
    return f"{how.bits} in groups of {how.group}"


def _by_label(costs: Costs) -> dict[str, dict[str, float]]:
    """Costs with labels in place of options, as JSON holds them."""
    return {
        name: {_label(option): cost for option, cost in each.items()}
        for name, each in costs.items()
    }


def _short(number: float) -> float:
    """Three digits."""
    return float(f"{number:.3g}")


def _rounded_rows(job: StageJob, name: str, bits: int) -> Grid:
    """A table [rows, hidden] of the source on a symmetric grid; all columns have the same weight in
    the error."""
    import torch

    from compose.artifacts.packed_folder import tensors_of
    from gateskip.quantization.grid import joined
    from gateskip.quantization.rounding import round_to_grid

    table = tensors_of(job.source)(f"{name}.weight")
    squares = torch.ones(table.shape[1])
    parts = table.split(EMBEDDING_ROWS)
    return joined([round_to_grid(rows.float(), squares, bits, 32, "none") for rows in parts])
