"""Stages in every order: what the planner allows runs, loads again and makes sense; the rest names
its rule. Chains that begin alike share what they begin with, as in a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import gateskip
from compose.artifacts.folder import copy_companions, is_gated, probe_ids, probe_logits
from compose.errors import RuleBroken
from compose.planning.composition import YES, as_markdown, verdict
from compose.stages.registry import RULES, STAGES, DataSpec, ModelShape, Stage, StageJob
from gateskip.quantization.folders import load_model

ROOT = Path(__file__).resolve().parents[2]
GATES = {"use": "gate", "steps": 1, "length": 24, "backbone": "frozen", "budgets": (0.8, 0.5)}
STEPS: dict[str, dict[str, Any]] = {
    "drop": {"use": "drop-layers", "count": 1},
    "narrow": {"use": "prune-width", "ratio": 0.4, "round_to": 64},
    "heads": {"use": "prune-heads", "count": 2},
    "hidden": {"use": "prune-hidden", "ratio": 0.4, "round_to": 32},
    "heal": {"use": "heal", "steps": 1, "length": 24, "backbone": "lora", "lora_rank": 2},
    "gates": GATES | {"calibration_blocks": 2, "shortcut": {"attention": 1, "mlp": 2}},
    "branches": {"use": "prune-branches", "budget": 0.5, "share": 0.95, "rise": 9.0},
    "nf4": {"use": "bnb", "format": "nf4"},
    "gptq4": {"use": "gptq", "bits": 4, "group_size": 32},
    "rescale": {"use": "heal", "steps": 1, "length": 24, "backbone": "scales"},
    "head8": {"use": "pack-head"},
    "drafts": {"use": "draft-network", "steps": 1, "batch": 2, "inner": 16, "vocabulary": 64},
}
AFTER = {"branches": "gates", "rescale": "nf4"}
"""What stages need before them."""
FAMILIES = ("qwen2", "qwen3", "mistral", "gemma2", "phi3")  # Llama takes the long walk
LONGEST = 3
NEARLY_ALIKE = {"heads", "hidden", "rescale", "drafts", "gptq4"}
"""To the planner they are narrow, narrow, what packed it, the last of a chain, and nf4."""
PRUNINGS = {"drop", "narrow"}
WORSE = 3.0  # times the tiny model's perplexity, that of chance, is no sense any more
RELOAD = """
import json, sys
sys.modules["gateskip"] = sys.modules["compose"] = None  # importing them fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
target, jobs = json.loads(sys.stdin.read())
found = {}
for folder, ids in jobs.items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    given = torch.tensor([ids])
    with torch.inference_mode():
        found[folder + " logits"] = model(given).logits.float()
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found[folder + " tokens"] = model.generate(given, max_new_tokens=8, **settings)
save_file({name: value.contiguous() for name, value in found.items()}, target)
"""


class Walk:
    """Runs chains from one model, each stage once for all chains that begin alike."""

    def __init__(self, source: Path, folder: Path, make_job: Callable[..., StageJob]) -> None:
        self.source, self.folder, self.job = source, folder, make_job
        config = json.loads((source / "config.json").read_text())
        self.shape = ModelShape.from_config(config)
        self.made: dict[tuple[str, ...], Path] = {(): source}
        text = folder / "text.txt"
        text.write_text((ROOT / "LICENSE").read_text().replace("\n", " "))
        self.spec = DataSpec(source=str(text), limit=16, length=24)

    def rule(self, chain: tuple[str, ...]) -> str | None:
        """The rule that a chain breaks, or None."""
        shape, before = self.shape, ()
        for name in chain:
            stage: Stage = STAGES[STEPS[name]["use"]].model_validate(STEPS[name])
            try:
                stage.check(shape, before)
            except RuleBroken as error:
                return error.rule
            shape, before = stage.reshape(shape), (*before, stage)
        return None

    def make(self, chain: tuple[str, ...]) -> Path:
        """The folder of an allowed chain."""
        if chain not in self.made:
            AcceleratorState._reset_state()
            source, name = self.make(chain[:-1]), chain[-1]
            target = self.folder / "-".join(chain)
            target.mkdir()
            stage: Stage = STAGES[STEPS[name]["use"]].model_validate(STEPS[name])
            texts = {"train": self.spec, "calibration": self.spec}
            stage.run(self.job(source, target, dense=self.source, **texts))
            copy_companions(source, target)
            self.made[chain] = target
        return self.made[chain]


def chains(first: str) -> Iterator[tuple[str, ...]]:
    """Chains of up to LONGEST stages that begin with one: all shorter ones, and the longest that
    `_differs` takes. With one of NEARLY_ALIKE they are shorter."""
    ends: list[tuple[str, ...]] = [(first,)]
    for chain in ends:
        yield chain
        if len(chain) < LONGEST - bool(NEARLY_ALIKE & set(chain)):
            longer = [(*chain, name) for name in STEPS]
            ends += [each for each in longer if len(each) < LONGEST or _differs(each)]


def _differs(chain: tuple[str, ...]) -> bool:
    """Whether a chain has no stage twice, and its prunings in the order of STEPS: chains of two
    have both."""
    pruned = [name for name in STEPS if name in chain and name in PRUNINGS]
    return len(set(chain)) == len(chain) and pruned == [n for n in chain if n in PRUNINGS]


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Of ids [1, S] under logits [1, S, V]."""
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())


def check_sense(folder: Path, worst: float) -> None:
    """Finite, better than `worst`, decoding as the full model does, and not one token for ever."""
    ids = probe_ids(folder)
    logits = probe_logits(folder)
    assert bool(logits.isfinite().all())
    assert perplexity(logits, ids) < worst
    assert float(logits.std(1).mean()) > 0, "the same whatever was read"
    decoder = gateskip.load(folder)
    plain = decoder.generate([ids[0].tolist()], 12).tokens
    if is_gated(folder):
        drafted = decoder.generate(
            [ids[0].tolist()],
            12,
            "speculate",
            draft_weights="own",
            draft_budget=0.8,
            draft_length=3,
        )
        assert drafted.tokens == plain


class Made:
    """The folders that all tests here made: one process, which takes seconds to start, loads all
    of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: list[Path] = []

    def place(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def check_reload(folders: list[Path], file: Path) -> None:
    """A process that cannot import us finds the same logits and tokens in all folders."""
    jobs = {str(folder): probe_ids(folder)[0].tolist() for folder in folders}
    order = json.dumps([str(file), jobs])
    subprocess.run([sys.executable, "-c", RELOAD], input=order, text=True, check=True)
    fresh = load_file(file)
    for folder in folders:
        ids = probe_ids(folder)
        logits, tokens = (fresh[f"{folder} {part}"] for part in ("logits", "tokens"))
        with torch.inference_mode():
            ours = load_model(folder)(tokens[:, :-1]).logits.float()
        read = ids.shape[1]
        near = {"atol": 1e-4, "rtol": 0.0}
        torch.testing.assert_close(logits, ours[:, :read], **near, msg=f"logits of {folder}")
        generated, predicted = tokens[0, read:, None], ours[0, read - 1 :]  # [8, 1], [8, V]
        best = predicted.amax(-1, keepdim=True)  # what it generated is what our process finds best
        assert float((best - predicted.gather(1, generated)).max()) < 1e-3, folder


@pytest.mark.slow
@pytest.mark.parametrize("first", STEPS)
def test_every_chain_runs_or_names_its_rule(
    first: str, make_tiny: Callable[..., Path], make_job: Callable[..., StageJob], made: Made
) -> None:
    walk = Walk(make_tiny("llama", head_dim=32), made.place(), make_job)  # kernels want 32 outputs
    worst = WORSE * perplexity(probe_logits(walk.source), probe_ids(walk.source))
    allowed = []
    for chain in chains(first):
        rule = walk.rule(chain)
        if rule is None:
            allowed.append(walk.make(chain))
            check_sense(allowed[-1], worst)
        else:
            assert rule in RULES
    made.models += allowed
    assert bool(allowed) == (first not in AFTER), "all others can stand first"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_takes_every_family(
    family: str, make_tiny: Callable[..., Path], make_job: Callable[..., StageJob], made: Made
) -> None:
    walk = Walk(make_tiny(family), made.place(), make_job)
    worst = WORSE * perplexity(probe_logits(walk.source), probe_ids(walk.source))
    for name in STEPS:
        chain = (AFTER[name], name) if name in AFTER else (name,)
        assert walk.rule(chain) is None, (family, chain)
        made.models.append(walk.make(chain))
        check_sense(made.models[-1], worst)


@pytest.mark.slow
def test_another_process_loads_what_these_tests_made(made: Made) -> None:
    assert made.models, "runs after the tests above, in their process"
    check_reload(made.models, made.folder / "fresh.safetensors")


def test_the_docs_have_the_planners_table() -> None:
    assert as_markdown() in (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")


def test_the_table_says_what_planning_does() -> None:
    assert verdict("prune-width", "gptq") == YES
    assert verdict("gptq", "prune-width") == "prune-after-quantize"
    assert verdict("gate", "gptq") == verdict("gptq", "gate") == YES
    assert verdict("skip", "speculate") == "two-decoders"
