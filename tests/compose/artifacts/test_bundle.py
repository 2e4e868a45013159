"""What an export carries decodes as we do, in a process where we cannot be imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_gated
from without_packages import run_without

import gateskip
from compose.artifacts.bundle import ROOTS, sources, write_bundle
from compose.errors import ArtifactError

HIDDEN = ("gateskip", "compose", "reports", "bitsandbytes", "peft", "lm_eval")
SCRIPT = """
import torch
from transformers import AutoModelForCausalLM
folder, prompts, asked = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
for settings in asked:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16,
                              do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
        found.append(text[0, len(prompt):].tolist())
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, as far as decoding looks at it."""
    target = tmp_path_factory.mktemp("bundle") / "shipped"
    decode = {"mode": "skip", "budget": 0.8}
    save_gated(tiny_llama, target, (0.8, 0.5), shortcuts=True, decode=decode)
    write_bundle(target)
    return target


@pytest.mark.slow
def test_it_decodes_as_we_do(folder: Path, tmp_path: Path) -> None:
    prompts = [[5, 9, 200, 31], [17, 4, 66]]
    asked: list[dict[str, Any]] = [
        {},
        {"mode": "plain"},
        {"mode": "skip", "budget": 0.5},
        {"mode": "speculate", "draft_budget": 0.5, "draft_length": 3, "draft_weights": "own"},
    ]
    done = run_without(HIDDEN, SCRIPT, [str(folder), prompts, asked], tmp_path)
    decoder = gateskip.load(folder, backend="gathered")
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    for settings, found in zip(asked, theirs, strict=True):
        own: dict[str, Any] = settings or decoder.defaults
        assert found == [decoder.generate([p], 16, **own).tokens[0] for p in prompts]
    assert theirs[0] != theirs[1], "skipping at 0.8 changes the text of this model"
    assert theirs[1] == theirs[3]


def test_dotted_names_become_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of packages, imported from or imported themselves, stand side by side."""
    from compose.artifacts import bundle

    package = tmp_path / "gateskip"
    (package / "runtime" / "kernels").mkdir(parents=True)
    (package / "runtime" / "cache.py").write_text(
        "from gateskip.runtime.kernels import abi as layout, build\n"
        "def f():\n    from gateskip.runtime.kernels.abi import (\n        Step,\n    )\n"
    )
    (package / "runtime" / "kernels" / "build.py").write_text("import os\n")
    (package / "runtime" / "kernels" / "abi.py").write_text("Step = 1\n")
    monkeypatch.setattr(bundle, "_package", lambda: package)
    monkeypatch.setattr(bundle, "ROOTS", ("runtime.cache",))
    carried = {bundle.flat_name(name): bundle._relative(text) for name, text in sources().items()}
    assert carried == {
        "gateskip_runtime_cache": (
            "from . import gateskip_runtime_kernels_abi as layout\n"
            "from . import gateskip_runtime_kernels_build as build\n"
            "def f():\n    from .gateskip_runtime_kernels_abi import (\n        Step,\n    )\n"
        ),
        "gateskip_runtime_kernels_build": "import os\n",
        "gateskip_runtime_kernels_abi": "Step = 1\n",
    }


def test_training_and_kernels_do_not_travel() -> None:
    carried = sources()
    assert set(ROOTS) <= set(carried)
    assert not {"training.gate_finetune", "calibration.insight", "training.objectives"} & set(
        carried
    )
    assert not any("import bitsandbytes" in text for text in carried.values())


def test_a_folder_without_gates_speculates(tiny_llama: Path, tmp_path: Path) -> None:
    """What an export of an ungated, drafting cell holds, as `generate` and `load` read it."""
    from compose.bench.generate import answer, decode_settings

    folder = tmp_path / "drafting"
    shutil.copytree(tiny_llama, folder)
    decode = {"mode": "speculate", "draft_budget": 1.0, "draft_weights": "nf4", "draft_length": 4}
    (folder / "gateskip.json").write_text(json.dumps({"decode": decode}))
    assert decode_settings(folder) == decode == gateskip.load(folder).defaults
    spoken = answer(folder, "Licensed under", max_new_tokens=12)
    assert spoken["stats"]["drafted"] > 0
    assert (
        spoken["text"]
        == answer(folder, "Licensed under", max_new_tokens=12, speculate=False)["text"]
    )


def test_any_folder_drafts_when_asked_to(tiny_llama: Path) -> None:
    from compose.bench.generate import decode_settings

    assert decode_settings(tiny_llama) == {"mode": "plain"}
    assert decode_settings(tiny_llama, speculate=True) == {"mode": "speculate"}
    with pytest.raises(ArtifactError, match="no gates, so it cannot skip"):
        decode_settings(tiny_llama, budget=0.8)
