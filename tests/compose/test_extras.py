"""The core decodes without any extra, and a library that is missing is named with its extra."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from compose.artifacts.bundle import write_bundle
from compose.errors import UserError
from compose.extras import EXTRAS, missing_extra, require
from gateskip.calibration.thresholds import calibrate
from gateskip.checkpoint import GateFile, grid_of, save_gates
from gateskip.gates.kinds import make_gates
from gateskip.quantization.folders import load_model

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
QUANTIZERS = ("accelerate", "bitsandbytes", "gptqmodel", "optimum")


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(HELPERS)))
    own = {"PYTHONPATH": paths, "HF_MODULES_CACHE": str(cwd / "modules"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _without(libraries: Iterable[str], code: str, cwd: Path) -> str:
    """All that `code` prints in a process that has every library but these."""
    done = _python("-c", f"from core_alone import hide\nhide({[*libraries]})\n{code}", cwd=cwd)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def gated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, as far as decoding looks at it."""
    target = tmp_path_factory.mktemp("core") / "shipped"
    shutil.copytree(tiny_llama, target)
    model = load_model(tiny_llama, "float32")
    generator = torch.Generator().manual_seed(2)
    gates = make_gates("scalar", 2 * model.config.num_hidden_layers, model.config.hidden_size)
    with torch.no_grad():
        for value in gates.parameters():
            value.normal_(generator=generator)
    blocks = torch.randint(3, 512, (6, 48), generator=generator)
    grid, kept = grid_of(calibrate(model, gates.requires_grad_(False), blocks, (0.8, 0.6)))
    save_gates(target, GateFile(gates, "project", grid, kept))
    write_bundle(target)
    return target


@pytest.mark.slow
def test_the_core_decodes_alone(gated: Path, tmp_path: Path) -> None:
    done = _python(str(HELPERS / "core_alone.py"), str(gated), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    hidden = set(done.stdout.split())
    assert {"accelerate", "bitsandbytes", "gptqmodel", "lm-eval", "matplotlib", "peft"} <= hidden
    assert not hidden & {"torch", "transformers", "safetensors", "tokenizers", "numpy", "regex"}


@pytest.mark.slow
def test_packed_weights_name_the_extra(tiny_llama: Path, tmp_path: Path) -> None:
    for method in ("bitsandbytes", "gptq"):
        shutil.copytree(tiny_llama, tmp_path / method)
        config = json.loads((tmp_path / method / "config.json").read_text("utf-8"))
        config["quantization_config"] = {"quant_method": method}
        (tmp_path / method / "config.json").write_text(json.dumps(config), "utf-8")
    told = _without(QUANTIZERS, LOAD, tmp_path)
    for method in ("bitsandbytes", "gptq"):
        assert f"loading {method} weights needs" in told
    assert told.count("pip install 'gateskip-compose[compress]'") == 2


LOAD = """
import gateskip
for folder in ("bitsandbytes", "gptq"):
    try:
        gateskip.load(folder)
    except Exception as error:
        print(error)
"""
RUN = """
import sys
sys.argv = ['gateskip', *{words!r}]
from compose.__main__ import main
main()
"""
ANSWER = """
from compose.workers.protocol import answer
def work():
    {work}
print(answer(work)["error"])
"""


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("compress", RUN.format(words=["validate", "any.yaml"])),
        ("compress", "import gateskip.training.loop"),
        ("eval", ANSWER.format(work="import compose.bench.quality.tasks")),
        ("report", "import compose.cli" + RUN.format(words=["report", "runs/any"])),
        ("ray", "from compose.processes.executors import make_executor as m; m('ray', 1)"),
        (
            "tensorboard",
            ANSWER.format(work="from compose.workers.scalars import _writer as w; w('x', 1)"),
        ),
    ],
    ids=["compress", "training", "eval", "report", "ray", "tensorboard"],
)
def test_each_extra_is_named(extra: str, code: str, tmp_path: Path) -> None:
    output = _without(EXTRAS[extra], code, tmp_path)
    assert f"pip install 'gateskip-compose[{extra}]'" in output, output


@pytest.mark.slow
def test_the_extra_of_the_server_is_enough_to_decode(tiny_llama: Path, tmp_path: Path) -> None:
    """Without the libraries of other extras, some of which need a compiler; also in workers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    code = f"from core_alone import hide_all_but\nhide_all_but({declared!r})\n"
    (tmp_path / "sitecustomize.py").write_text(code, "utf-8")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, HELPERS)))
    done = subprocess.run(
        [sys.executable, "-m", "compose", "generate", str(tiny_llama), "Hi", "--stats"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr


def test_the_command_says_one_sentence(tmp_path: Path) -> None:
    output = _without(EXTRAS["compress"], RUN.format(words=["--help"]), tmp_path).splitlines()
    assert output == [
        "error: No module named 'typer'",
        "  fix: pip install 'gateskip-compose[compress]'",
    ]


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_library_of_an_extra(extra: str) -> None:
    for name in EXTRAS[extra]:
        error = missing_extra(ModuleNotFoundError(f"No module named {name!r}", name=f"{name}.part"))
        assert error is not None and error.exit_code == 2
        assert error.fix == f"pip install 'gateskip-compose[{extra}]'"


def test_other_libraries_are_not_ours_to_name() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'other'", name="other")) is None
    assert missing_extra(ModuleNotFoundError("no name")) is None


def test_a_run_asks_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import compose.extras

    monkeypatch.setattr(compose.extras, "find_spec", lambda name: name != "matplotlib" or None)
    require("eval")
    with pytest.raises(UserError, match=r"matplotlib.*\n.*gateskip-compose\[report\]"):
        require("eval", "report")
