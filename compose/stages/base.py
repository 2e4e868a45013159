"""What every stage is: light parameters, the rules on where it may stand, and a job to run.

A stage is a frozen value. Planning asks it two questions that need no weights: may it stand here
(`check`), and what does it make of the model's shape (`reshape`). Running it is `run`, the only
place that imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compose.errors import PlanError, RuleBroken

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["prune", "heal", "gate", "quantize", "head", "decode"]
Split = Literal["train", "calibration"]

RULES: dict[str, str] = {
    "decode-needs-gates": "what is skipped is decided by gates, so a gate stage must come before.",
    "draft-of-packed": "a quantized model has no wide weights to draft a 4-bit copy of.",
    "original-is-gone": "a backbone that learned beside the gates is the original no more.",
    "head-last": "the LM head is packed when all other weights are finished.",
    "decode-last": "a decode stage only sets how the model is run; no weight stage may follow it.",
    "two-decoders": "a model is decoded in one way: one decode stage a chain.",
    "two-gates": "a model carries one set of gates: one gate stage a chain.",
    "two-quantizers": "a model carries one quantization config: one quantizer a chain.",
    "prune-after-quantize": "packed weights cannot be cut: prune before quantizing.",
    "heal-after-quantize": "packed weights learn by `backbone: scales` alone: else heal first.",
    "scales-are-packing": "scales belong to packed weights: quantize first, in another way.",
    "gate-after-quantize": "packed weights cannot be trained beside the gates: gate first.",
    "prune-after-gate": "thresholds hold for the branches they were calibrated on: prune first.",
    "heal-after-gate": "thresholds hold for the weights they were calibrated on: heal first.",
    "group-divides": "a quantization group must divide the inputs of every linear layer.",
    "whole-tiles": "kernels for packed weights take them in tiles of one size.",
    "branches-need-gates": "which branches tokens do without is what gates learn: gate first.",
    "budget-calibrated": "gates can be asked only at budgets that they are calibrated for.",
    "layout-known": "weights are cut by their names, which differ from family to family.",
    "heads-fit": "every KV group must keep as many heads, in a number that the config takes.",
    "head-is-tied": "an LM head that shares the embedding's weights cannot be packed.",
    "head-packed-twice": "an LM head is packed once, by its quantizer or by pack-head.",
    "width-fits": "a pruned width must be a multiple of round_to, above zero, and narrower.",
    "hidden-fits": "what is left of the hidden size must fit its rounding and the number of heads.",
    "layers-fit": "dropped layers must exist, and at least one layer must stay.",
    "exclude": "the pipeline file excludes this combination.",
}
"""Why a stage may not stand where it stands, or a cell is left out: name and sentence."""

FORBIDDEN: dict[tuple[Role, Role], str] = {
    ("decode", "decode"): "two-decoders",
    ("gate", "gate"): "two-gates",
    ("quantize", "quantize"): "two-quantizers",
    ("prune", "quantize"): "prune-after-quantize",
    ("heal", "quantize"): "heal-after-quantize",
    ("gate", "quantize"): "gate-after-quantize",
    ("prune", "gate"): "prune-after-gate",
    ("heal", "gate"): "heal-after-gate",
    ("head", "head"): "head-last",
    ("prune", "head"): "head-last",
    ("heal", "head"): "head-last",
    ("gate", "head"): "head-last",
    ("quantize", "head"): "head-last",
    ("head", "decode"): "decode-last",
    ("prune", "decode"): "decode-last",
    ("heal", "decode"): "decode-last",
    ("gate", "decode"): "decode-last",
    ("quantize", "decode"): "decode-last",
}
"""(a stage's role, the role of one before it) -> the rule that this breaks."""


PLACES = ("device_map",)
"""Parameters that say where a stage works, not what it makes."""

TRAINED = {"frozen": 4.0, "lora": 9.0, "scales": 9.0, "full": 20.0}
"""Bytes a weight of the model in a fine-tune, by what learns, in float32: itself, and where
anything of it learns a teacher, gradients and AdamW's two moments."""

LIBRARIES = 0.8e9  # bytes of a process that has torch and transformers, and works on some text


class DataSpec(BaseModel):
    """Which texts a stage learns from or is calibrated on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field(default="calibration-text", min_length=1)
    """An alias, a hub data set id, or a path (from the YAML file) to .txt, .jsonl, .json or .xz."""

    limit: int = Field(default=128, ge=1)
    """How many rows of text are taken, in a fixed order."""

    length: int = Field(default=512, ge=8)
    """Tokens in one block."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model, as its config.json states them."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool
    quantized: str | None = None
    """The quantizer that made the weights (`bitsandbytes`, `gptq`, ...), or None."""
    long_rope: bool = False
    """Whether each rotary frequency has a factor of its own, as in the long-context Phi3."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json (its `text_config`, where it has one).

        Raises:
            PlanError: the config names no size that a decoder of the Llama family has.
        """
        text: Mapping[str, Any] = config.get("text_config") or config
        wanted = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        absent = [key for key in wanted if not isinstance(text.get(key), int)]
        if absent:
            kind = text.get("model_type", "unknown")
            raise PlanError(
                f"the config of this model (type {kind!r}) does not state {', '.join(absent)}",
                fix="take a decoder-only model of the Llama family",
            )
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        quantization = config.get("quantization_config") or text.get("quantization_config")
        return cls(
            model_type=str(text.get("model_type", "unknown")),
            hidden_size=hidden,
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            vocab_size=text["vocab_size"],
            tie_embeddings=bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            quantized=quantization.get("quant_method", "unknown") if quantization else None,
            long_rope="short_factor" in rope,
        )

    @property
    def weights(self) -> int:
        """How many weights the model has, norms and biases left out."""
        heads = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = heads + 3 * self.hidden_size * self.intermediate_size
        outer = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return outer + self.num_layers * layer

    def linear_in_features(self) -> dict[str, int]:
        """Input width of each kind of linear layer in a decoder layer; the LM head is not one."""
        return {
            "q_proj": self.hidden_size,
            "k_proj": self.hidden_size,
            "v_proj": self.hidden_size,
            "o_proj": self.num_heads * self.head_dim,
            "gate_proj": self.hidden_size,
            "up_proj": self.hidden_size,
            "down_proj": self.intermediate_size,
        }


@dataclass(frozen=True)
class StageJob:
    """All that a weight stage is given to run."""

    source: Path
    """The model folder it starts from; only read."""
    target: Path
    """An empty folder, to be filled with the resulting Hugging Face folder."""
    seed: int
    dtype: str
    """`float32`, `bfloat16` or `float16`: the type of what is not quantized."""
    train: DataSpec | None
    calibration: DataSpec | None
    dense: Path
    """The folder of the untouched source model: the teacher."""
    progress: Callable[[int, int, str], None]
    """Called with (done, total, note) as the work goes on."""
    work: Path
    """Scratch that survives a kill, for checkpoints in the middle of a stage."""
    asset_cache: Path
    """Where downloaded models and data are kept."""

    def blocks(
        self, split: Split, tokenizer: Any, length: int | None = None, limit: int | None = None
    ) -> Tensor:
        """Token blocks [N, length] of a split; its own length and row limit where none is given."""
        from compose.assets import SELF_WRITTEN, load_texts, token_blocks

        spec = self.train if split == "train" else self.calibration
        assert spec is not None, f"a stage names {split} in reads_data to be given it"
        if spec.source == SELF_WRITTEN:
            from compose.stages.own_text import written_once

            count, length = min(limit or spec.limit, spec.limit), length or spec.length
            return written_once(
                self.dense,
                self.work / f"self-written-{split}-{count}-{length}.safetensors",
                count,
                length,
                2 * self.seed + (split == "train"),
                lambda done, total: self.progress(done, total, f"writing {split} text"),
            )
        texts = load_texts(spec.source, spec.limit, self.asset_cache)
        return token_blocks(texts, tokenizer, length or spec.length, limit or spec.limit)


class Stage(BaseModel):
    """One step of a chain. Subclasses add parameters; equal values are the same step."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    acts: ClassVar[Literal["weights", "decode"]] = "weights"
    """Whether the stage makes a new model folder or only sets how a folder is decoded."""

    role: ClassVar[Role]
    """What the stage is to the order rules."""

    version: ClassVar[int] = 1
    """Raised whenever the same parameters begin to give another result; part of the step's key."""

    reads_data: ClassVar[tuple[Split, ...]] = ()
    """The entries of `data` that `run` reads; they are then part of the step's key."""

    use: str
    """Which stage this is: a key of `compose.stages.registry.STAGES`."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Refuse a place in a chain: after the stages `before`, on a model of `shape`.

        Rules that need sizes are passed over when `shape` is None.

        Raises:
            RuleBroken: with the name of a rule in `RULES`.
        """
        for role, use in _standing(shape, before):
            rule = FORBIDDEN.get((self.role, role))
            if rule is not None and not self.tolerates(rule):
                raise RuleBroken(rule, f"{self.use} cannot come after {use}: {RULES[rule]}")

    def tolerates(self, rule: str) -> bool:
        """Whether these parameters make the order rule `rule` void; no rule is, by default."""
        return False

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The shape of the model that the stage makes of one of `shape`."""
        return shape

    def held(self) -> float:
        """Bytes that `run` holds at its peak for each weight of the model it starts from: by
        default the model in float32 and as much again."""
        return 8.0

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """Bytes that `run` holds beside the model's own, on text in blocks of `length` tokens."""
        return 0.0

    def memory(self, shape: ModelShape, length: int = 512) -> int:
        """About how much memory the stage's process holds at its peak, in bytes.

        `length` is that of the pipeline's training text, for stages that have none of their own.
        """
        return round(LIBRARIES + self.held() * shape.weights + self.worked_on(shape, length))

    def files(self) -> dict[str, Path]:
        """Files that the parameters name: parameter -> path. Their content is part of the key."""
        return {}

    def identity(self, file_sha256: Mapping[str, str]) -> dict[str, Any]:
        """What decides the stage's result, as plain JSON: the hash of a file stands for its path.

        `file_sha256` maps each parameter in `files()` to the hash of that file's content.
        """
        values = self.model_dump(mode="json")
        use = values.pop("use")
        for place in PLACES:
            values.pop(place, None)
        named = {name: {"sha256": file_sha256[name]} for name in self.files()}
        return {"use": use, "version": self.version, "params": values | named}

    def run(self, job: StageJob) -> dict[str, Any]:
        """Read `job.source`, fill `job.target`, and return the stage's record for compose.json.

        Only weight stages run; a decode stage leaves the folder as it is.
        """
        raise TypeError(f"{self.use} makes no model folder, so there is nothing to run")


def training_bytes(shape: ModelShape, tokens: int, seen: int = 0) -> float:
    """About what a step on `tokens` keeps for its backward pass, in bytes: the floats of each token
    in each layer, and its shares of attention to `seen` tokens where these are laid out."""
    inside = 16 * shape.hidden_size + 6 * shape.intermediate_size + 3 * shape.num_heads * seen
    return 4.0 * tokens * shape.num_layers * inside


def _standing(shape: ModelShape | None, before: tuple[Stage, ...]) -> list[tuple[Role, str]]:
    """Role and name of what was done to the model so far, also before the chain began."""
    done: list[tuple[Role, str]] = [(stage.role, stage.use) for stage in before]
    quantized_in_chain = any(role == "quantize" for role, _ in done)
    if shape is not None and shape.quantized and not quantized_in_chain:
        done.insert(0, ("quantize", f"{shape.quantized} (the source model is quantized)"))
    return done
