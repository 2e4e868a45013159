"""The command: exit codes, one message a mistake, and that it stays light until work begins."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli import ADVANCED, FIRST, OLD, app
from compose.errors import StepError, UserError
from compose.language.schema import Pipeline
from compose.planning.planner import make_plan
from compose.planning.prepare import load_plan
from compose.results.io import save_results
from compose.results.schema import CellResult, Results
from compose.store import write_json
from compose.terminal.commands.group import options_of
from compose.terminal.commands.pipelines import settings_of_run
from compose.terminal.doctor import Finding
from compose.terminal.renamed import RENAMED

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
schema: 1
name: small
model: {source: smollm2-135m-instruct}
stages:
  drop: {use: drop-layers, count: 1}
  gates: {use: gate, steps: 0}
  skip: {use: skip}
matrix:
  prune: [none, drop]
  gate: [none, gates]
  decode: [none, skip]
"""


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(GOOD)
    return path


# --- validate, plan, schema ---------------------------------------------------------------------


def test_a_valid_file_is_counted(file: Path) -> None:
    code, out, _ = call("validate", file)
    assert code == 0
    assert "4 steps, 6 cells, 2 left out" in out


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (("gates: {use: gate, steps: 0}", "gates: {use: gate, stepz: 0}"), 6, "did you mean"),
        (("steps: 0", "steps: many"), 6, "steps"),
        (("use: drop-layers", "use: dorp-layers"), 5, "drop-layers"),
        (("matrix:", "pipelines: {late: [skip, gates]}\nmatrix:"), 8, "decode-needs-gates"),
        (("schema: 1", "schema: [1"), None, ""),
    ],
    ids=["misspelt-key", "wrong-type", "unknown-stage", "impossible-order", "no-yaml"],
)
def test_a_mistake_is_one_message_with_its_line(
    file: Path, change: tuple[str, str], place: int | None, words: str
) -> None:
    file.write_text(GOOD.replace(*change))
    code, out, err = call("validate", file)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith(f"error: {file}:{'' if place is None else place}")
    assert re.search(rf"{re.escape(str(file))}:\d+:\d+: ", err)
    assert words in err


def test_a_page_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "page.html"):
        code, _, err = call("insight", tmp_path / "absent", "--text", "a", "--html", place)
        assert code == 2 and f"{place} cannot be written" in err


def test_the_default_matrix_says_what_it_stands_for(file: Path, tmp_path: Path) -> None:
    text = "name: small\nmodel: {source: smollm2-135m-instruct}\nmatrix: default\n"
    file.write_text(text + "stages: {int8: {use: int8, embedding: null}}\n")
    code, out, _ = call("validate", file)
    assert code == 0
    head, *lines = out.split(": valid: ")[1].splitlines()[1:]
    assert head.startswith("matrix: default combines these stages")
    assert [line.partition("  #")[0].split(maxsplit=1) for line in lines] == [
        ["gate", "gates: {use: gate, prompt_budgets: [0.9, 0.8, 0.68]}"],
        ["quantize", "int8: {use: int8, embedding: null}"],
        ["quantize", "int4: {use: int4}"],
        ["decode", "read80: {use: skip, budget: 1.0, prompt_budget: 0.8}"],
        ["decode", "spec: {use: speculate}"],
    ]
    _, out, _ = call("plan", file, "--out", tmp_path / "runs")
    assert out.startswith(head)
    file.write_text(GOOD)
    assert "matrix:" not in call("validate", file)[1]


def test_new_names_the_next_two_commands(tmp_path: Path) -> None:
    file = tmp_path / "my first.yaml"
    code, out, _ = call("new", file, "--model", "gemma-3-270m")
    assert code == 0
    assert out.splitlines() == [
        f"{file} is written. Next:",
        f"  gateskip plan '{file}'",
        f"  gateskip run '{file}'",
    ]
    assert call("validate", file)[0] == 0
    code, _, err = call("new", file, "--model", "gemma-3-270m")
    assert code == 2 and "exists already" in err


def test_a_model_in_place_of_a_file_is_answered_with_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text("{}")
    (tmp_path / "q.gguf").touch()
    models = {
        "smollm2-135m-instruct": ("smollm2-135m-instruct", "a model"),
        "my model": ("'my model'", "a model folder"),
        "q.gguf": ("q", "a GGUF file"),
        "owner/name": ("name", "perhaps a model of the hub"),
    }
    for model, (stem, kind) in models.items():
        new = f"'{stem[1:-1]}.yaml'" if stem.startswith("'") else f"{stem}.yaml"
        to = f"'exports/{stem[1:-1]}'" if stem.startswith("'") else f"exports/{stem}"
        quoted = f"'{model}'" if " " in model else model
        for command in ("run", "plan", "validate", "search"):
            code, out, err = call(command, model)
            assert (code, out) == (2, "")
            assert f"{model} is {kind}, but `gateskip {command}` takes a pipeline file" in err
            assert f"    gateskip compress {quoted} --to {to}\n" in err
            assert f"    gateskip new {new} --model {quoted}\n" in err
    for words in (("pick", "owner/name"), ("export", "q.gguf", "--to", "x")):
        code, _, err = call(*words)
        assert code == 2 and f"but `gateskip {words[0]}` takes the folder of a run" in err
    code, _, err = call("smollm2-135m-instruct")
    assert code == 2 and "gateskip new smollm2-135m-instruct.yaml --model" in err
    (tmp_path / "smollm2-135m-instruct").write_text(GOOD)
    assert call("validate", "smollm2-135m-instruct")[0] == 0, "a file of this name is the pipeline"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rnu", "did you mean `gateskip run`?"),
        ("validte", "did you mean `gateskip validate`?"),
        ("stage", "did you mean `gateskip stages`?"),
        ("insi", "did you mean `gateskip insight`?"),
        ("help", "did you mean `gateskip --help`?"),
        ("compare", "did you mean `gateskip report`?"),
        ("convert", "did you mean `gateskip export`?"),
        ("first.yaml", "gateskip run first.yaml"),
        ("xyzzy", "`gateskip --help` lists all commands"),
    ],
)
def test_an_unknown_command_is_answered_with_the_one_that_was_meant(typed: str, meant: str) -> None:
    code, out, err = call(typed)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith(f"  fix: {meant}\n")


def test_an_option_of_another_command_names_that_command(file: Path) -> None:
    for typed in ("--minutes", "--budget-minutes"):
        code, _, err = call("run", file, typed, "1")
        assert code == 2
        assert err.endswith("  fix: it is an option of `gateskip search`\n")


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    for command in ("validate", "plan", "run"):
        code, _, err = call(command, tmp_path / "absent.yaml")
        assert code == 2
        assert "no such file" in err


def test_a_plan_shows_steps_cells_state_and_rules(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = call("plan", file, "--out", tmp_path / "runs")
    assert code == 0
    for word in ("drop+gates+skip", "to run", "decode-needs-gates", "4 steps, 6 cells"):
        assert word in out
    assert "cached" not in out
    plan = load_plan(file, tmp_path)
    entry = tmp_path / "runs" / "store" / plan.steps[0].key
    write_json(entry / "manifest.json", {"key": plan.steps[0].key, "files": {}})
    code, out, _ = call("plan", file, "--out", tmp_path / "runs", "--json")
    shown = json.loads(out)
    assert [step["cached"] for step in shown["steps"]] == [True, False, False, False]
    assert shown["baseline"] == "dense"
    assert {left["rule"] for left in shown["left_out"]} == {"decode-needs-gates"}


def test_the_schema_is_json_schema(file: Path) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert {"model", "stages", "matrix"} <= set(json.loads(out)["properties"])


LIGHT = """
import sys
from typer.testing import CliRunner
from compose.cli import app
for arguments in {commands!r}:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
heavy = [name for name in ("torch", "transformers", "lm_eval", "ray") if name in sys.modules]
assert not heavy, heavy
"""


def test_commands_that_need_no_weights_load_no_torch(file: Path, finished: Path) -> None:
    commands = [
        *(["validate", str(file)], ["plan", str(file)], ["schema"], ["--help"]),
        *(["pick", str(finished)], ["report", str(finished)], ["--version"]),
    ]
    subprocess.run(
        [sys.executable, "-c", LIGHT.format(commands=commands)],
        check=True,
        cwd=file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# --- report, pick, export -----------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run's folder with three measured cells and a failed one."""

    def cell(name: str, rate: float, ratio: float, size: int) -> CellResult:
        perplexity = {"dataset": "wikitext2", "value": 10 * ratio, "ratio_to_baseline": ratio}
        return CellResult.model_validate(
            {
                "name": name,
                "chain": () if name == "dense" else tuple(name.split("+")),
                "status": "ok",
                "size": {"disk_bytes": size},
                "speed": {"decode_tokens_per_s": {"median": rate, "repeats": (rate,)}},
                "quality": {"perplexity": perplexity},
            }
        )

    failed = CellResult(name="gptq", chain=("gptq",), status="failed", reason="no compiler")
    cells = (cell("dense", 10, 1, 500), cell("nf4", 20, 1.2, 100), cell("drop", 30, 2, 400))
    run = tmp_path / "runs" / "small"
    pipeline = Pipeline.model_validate(
        {"schema": 1, "name": "small", "model": {"source": "smollm2-135m-instruct"}}
    )
    write_json(run / "plan.json", make_plan(pipeline).to_json())
    save_results(Results(run="small", cells=(*cells, failed)), run / "results.json")
    return run


def test_pick_finds_the_best_under_constraints(finished: Path) -> None:
    picked = {
        name: json.loads(call("pick", finished, "--json", *options)[1])["cell"]["name"]
        for name, options in {
            "fastest": (),
            "good": ("--at-most-perplexity-ratio", "1.5", "--by-estimate"),
            "small": ("--minimize", "size"),
            "fits": ("--at-most-mb", "0.0003", "--maximize", "decode"),
            "just fits": ("--at-most-mb", "0.0004"),
        }.items()
    }
    assert picked == {
        **{"fastest": "drop", "good": "nf4", "small": "nf4", "fits": "nf4"},
        "just fits": "drop",
    }
    old = {
        "good": ("--max-perplexity-ratio", "1.5", "--by-estimate"),
        "small": ("--maximize", "size"),
        "fits": ("--max-bytes=0.3kB", "--maximize", "decode"),
        "just fits": ("--max-bytes", "400"),
    }
    for name, options in old.items():
        _, out, _ = call("pick", finished, "--json", *options)
        assert json.loads(out)["cell"]["name"] == picked[name], "an old spelling"
    code, out, _ = call("pick", finished)
    assert code == 0
    assert "drop" in out


def test_a_bound_of_quality_without_evidence_is_refused(finished: Path) -> None:
    code, _, err = call("pick", finished, "--at-most-perplexity-ratio", "1.5")
    assert code == 2
    assert "no evidence for perplexity ratio (at most) <= 1.500" in err
    assert "--by-estimate" in err


def test_pick_names_the_constraint_that_left_nothing(finished: Path) -> None:
    code, _, err = call("pick", finished, "--max-bytes", "5")
    assert code == 2
    assert "nf4" in err
    assert "loosen --at-most-mb" in err
    assert "Traceback" not in err
    for wrong in (
        ("--max-bytes", "much"),
        ("--maximize", "sped"),
        ("--minimize", "decode"),
    ):
        code, _, err = call("pick", finished, *wrong)
        assert code == 2
        assert wrong[1] in err
    code, _, err = call("pick", finished, "--at-most-mb", "much")
    assert code == 2 and "'--at-most-mb'" in err and "valid number" in err
    code, _, err = call("pick", finished, "--maximize", "decode", "--minimize", "size")
    assert code == 2 and "two aims" in err


def test_a_report_is_drawn_again(finished: Path) -> None:
    code, out, _ = call("report", finished)
    assert code == 0
    assert (finished / "report.html").is_file()
    assert (finished / "report.md").is_file()
    assert "report.html" in out


def _kept(folder: Path, decode: float) -> Path:
    """A folder with results in which a cell decodes so many times as fast as the baseline."""
    folder.mkdir()
    ratio = {"value": decode, "low": decode * 0.99, "high": decode * 1.01, "n": 5}
    speed = {"decode_tokens_per_s": {"median": 10 * decode}, "decode_ratio": ratio}
    cells = [
        {"name": "dense", "chain": [], "status": "ok"},
        {"name": "nf4", "chain": ["nf4"], "status": "ok", "speed": speed},
    ]
    data = {"schema_version": 3, "run": folder.name, "cells": cells}
    (folder / "results.json").write_text(json.dumps(data))
    return folder


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    before, after = _kept(tmp_path / "before", 2.0), _kept(tmp_path / "after", 1.0)
    code, out, _ = call("report", before, after)
    assert code == 0
    assert "worse: nf4, decode" in out
    for kind in ("html", "md", "json"):
        assert (after / f"comparison.{kind}").is_file()
        assert not (before / f"comparison.{kind}").exists()
    code, _, _ = call("report", before, after, "--fail-on-regression")
    assert code == 1
    code, out, _ = call("report", after, before, "--fail-on-regression")
    assert code == 0
    assert "1 better" in out


def test_one_run_has_nothing_to_regress_from(tmp_path: Path) -> None:
    code, _, err = call("report", _kept(tmp_path / "run", 2.0), "--fail-on-regression")
    assert code == 2
    assert "--fail-on-regression needs at least two runs" in err


@pytest.mark.parametrize("command", ["report", "pick", "export"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    more = ("--to", tmp_path / "x") if command == "export" else ()
    code, _, err = call(command, tmp_path, *more)
    assert code == 2
    assert "not the folder of a run" in err


def test_exports_that_cannot_be_made_are_refused(finished: Path, tmp_path: Path) -> None:
    code, _, err = call("export", finished, "--cell", "gptq", "--to", tmp_path / "x")
    assert code == 2
    assert "no compiler" in err
    code, _, err = call("export", finished, "--cell", "gpt", "--to", tmp_path / "x")
    assert code == 2
    assert "did you mean 'gptq'" in err
    code, _, err = call("export", finished, "--cell", "dense", "--to", tmp_path / "x")
    assert code == 2
    assert "no longer in the store" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx"], "there is no format 'onnx'"),
        (["--format", "ggfu"], "did you mean 'gguf'?"),
        (["--type", "q8_0"], "--type is an option of GGUF files"),
        (["--format", "gguf", "--verify"], "--verify is an option of hf folders"),
        (["--format", "gguf", "--cell", "gptq"], "no compiler"),
        (["--format", "compressed-tensors", "--cell", "dense"], "no longer in the store"),
    ],
)
def test_formats_that_cannot_be_written_are_refused(
    finished: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = call("export", finished, "--to", tmp_path / "x", *words)
    assert code == 2 and message in err
    assert not (tmp_path / "x").exists()


def test_a_model_folder_has_no_cells_and_is_in_the_format_of_transformers(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny("llama")
    code, _, err = call("export", folder, "--to", tmp_path / "x")
    assert code == 2 and "is a model folder already" in err and "--format gguf" in err
    for words in (["--cell", "int4"], ["--at-most-mb", "5"], ["--no-require-lossless"]):
        code, _, err = call("export", folder, "--to", tmp_path / "x", "--format", "gguf", *words)
        assert code == 2 and "has no cells to pick from" in err
    assert not (tmp_path / "x").exists()


def _stored(finished: Path, cell: str, folder: Path, decode: dict[str, str]) -> None:
    """Put a model folder into the store as the weights of a cell of the run."""
    key = "0123456789abcdef"
    row = {"name": cell, "weights": key, "decode": decode}
    write_json(finished / "plan.json", {"cells": [row]})
    entry = finished.parent / "store" / key
    shutil.copytree(folder, entry / "model")
    files = {f"model/{file.name}": file.stat().st_size for file in (entry / "model").iterdir()}
    write_json(entry / "manifest.json", {"key": key, "files": files})


@pytest.mark.slow
def test_a_cell_and_a_folder_become_the_same_gguf_file(
    finished: Path, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "nf4"
    shutil.copytree(make_tiny("llama"), folder)
    _stored(finished, "nf4", folder, {"use": "speculate"})
    words = ["--format", "gguf", "--type", "q8_0", "--to", tmp_path / "out"]
    code, out, err = call("export", finished, "--cell", "nf4", *words)
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'out' / 'nf4.gguf'}: ") and "loads back" in out
    assert out.endswith(
        "only the weights are exported: in gateskip, nf4 also uses the stage speculate\n"
    )
    words[-1] = tmp_path / "b.gguf"
    code, out, err = call("export", folder, *words)
    assert code == 0 and "the weights alone" not in out, err
    code, _, err = call("gguf", folder, "--to", tmp_path / "c.gguf", "--type", "q8_0")
    assert code == 0, err
    first, *others = [tmp_path / name for name in ("out/nf4.gguf", "b.gguf", "c.gguf")]
    assert all(other.read_bytes() == first.read_bytes() for other in others), "name included"


# --- Silence -------------------------------------------------------------------------------------


def silent(*arguments: str | Path) -> str:
    """What a program prints on stdout; the test fails where it prints on stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_importing_prints_nothing() -> None:
    assert silent("-c", "import gateskip") == ""
    whole = "import gateskip; gateskip.load; import gateskip.quantization.hf_quantizer"
    assert silent("-c", whole) == "", "with all that transformers imports"


def test_a_command_prints_nothing_of_other_libraries(file: Path) -> None:
    assert "valid" in silent("-m", "compose", "validate", file)


@pytest.mark.slow
def test_an_answer_comes_without_notices_of_libraries(make_tiny: Callable[..., Path]) -> None:
    silent("-m", "compose", "generate", make_tiny("llama"), "Hi", "--max-new-tokens", "2")


# --- The rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("yours", fix="do this"), 2), (StepError("broken"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_become_exit_codes(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("compose.terminal.live.run_shown.run", fail)
    found, out, err = call("run", file)
    assert found == code
    assert json.loads(out)["exit_code"] == code, "the last line is for machines"
    assert "Traceback" not in err
    assert err.startswith("interrupted" if code == 130 else "error: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "a.json"),
            "error: a.json: No space left on device",
        ),
        (PermissionError(13, "Permission denied"), "error: Permission denied"),
        (KeyError("x"), "error: KeyError: 'x'\n  fix: this is a bug in gateskip"),
        (RecursionError("deep"), "error: RecursionError: deep"),
    ],
)
def test_no_traceback_without_debug(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("compose.terminal.live.run_shown.run", fail)
    code, _, err = call("run", file)
    assert code == 1 and err.startswith(words)
    assert "Traceback" not in err
    code, _, err = call("--debug", "run", file)
    assert code == 1 and "Traceback" in err and words in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "FILE", "--agian"],
            "gateskip run: No such option: --agian\n  fix: did you mean --again?",
        ),
        (
            ["run", "FILE", "--minutez", "5"],
            "gateskip run: No such option: --minutez\n"
            "  fix: did you mean `gateskip search --minutes`?",
        ),
        (
            ["run", "FILE", "--xyzzy"],
            "gateskip run: No such option: --xyzzy\n"
            "  fix: `gateskip run --help` explains its arguments",
        ),
        (["--verson"], "gateskip: No such option: --verson\n  fix: did you mean --version?"),
        (
            ["cache", "prune", "--dry"],
            "gateskip cache prune: No such option: --dry\n  fix: did you mean --dry-run?",
        ),
        (
            ["export", "FILE"],
            "gateskip export: Missing option '--to'.\n"
            "  fix: `gateskip export --help` explains its arguments",
        ),
    ],
)
def test_wrong_arguments_are_one_message_with_its_fix(
    file: Path, words: list[str], message: str
) -> None:
    code, out, err = call(*(str(file) if word == "FILE" else word for word in words))
    assert (code, out) == (2, "")
    assert err == f"error: {message}\n"


def test_a_result_names_no_folder_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["gateskip", "run", "pipelines/a.yaml", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", words)
    assert (
        settings_of_run(tmp_path, again=False).command == "gateskip run pipelines/a.yaml --out runs"
    )


def test_an_unknown_executor_or_cell_is_the_users_mistake(file: Path, tmp_path: Path) -> None:
    code, _, err = call("run", file, "--executor", "locl")
    assert code == 2
    assert "did you mean 'local'" in err
    code, _, err = call("run", file, "--out", tmp_path, "--only", "gatez")
    assert code == 2
    assert "no cell is named 'gatez'" in err


def test_doctor_shows_what_is_missing_and_how_to_put_it_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    findings = [Finding("python", "ok", "3.12"), Finding("gptqmodel", "missing", "no", "pip it")]
    monkeypatch.setattr("compose.terminal.doctor.examine", lambda: findings)
    code, out, _ = call("doctor")
    assert code == 1
    assert "3.12" in out
    assert "fix: pip it" in out
    monkeypatch.setattr("compose.terminal.doctor.examine", lambda: findings[:1])
    assert call("doctor")[0] == 0


@pytest.mark.slow
def test_doctor_shows_why_there_are_no_compiled_kernels() -> None:
    from compose.terminal.doctor import _accelerator, _kernels

    finding = _kernels({"kernels": {"error": "g++: error: unknown flag"}})
    assert finding.status == "note" and finding.detail == "g++: error: unknown flag"
    assert "gathered" in str(finding.fix)
    assert "GPTQ weights run on the CPU" in str(_accelerator({"gpu": "A card"}).fix)


@pytest.mark.slow
def test_doctor_looks_at_this_machine() -> None:
    """Its worker imports gptqmodel and bitsandbytes, in a quarter of a minute."""
    code, out, err = call("doctor")
    for name in ("python", "threads", "memory", "disk", "compiler", "torch", "GPU", "cache"):
        assert name in out
    for name in ("bitsandbytes", "gptqmodel", "hub", "smollm2-135m-instruct"):
        assert name in out
    assert err == ""
    assert code in (0, 1)


def test_the_options_of_every_command_are_frozen() -> None:
    """Scripts rely on them: a change here is a change for users."""
    import typer.main

    command = typer.main.get_command(app)
    options = {
        name: sorted(option for each in sub.params for option in each.opts)
        for name, sub in command.commands.items()  # type: ignore[attr-defined]
    }
    wanted = [
        *("--at-most-mb", "--at-most-kl", "--at-most-perplexity-ratio", "--at-most-memory-mb"),
        *("--by-estimate", "--maximize", "--min-retained", "--minimize", "--require-lossless"),
    ]
    drawn = ["--temperature", "--top-k", "--top-p", "--seed", "--stop"]
    spoken = [*drawn[:-1], "--budget", "--draft-model", "--max-new-tokens", "--speculate"]
    asked = ["--device", "--draft-model", "--keep-blocks", "--stats", "folder", "prompt"]
    assert options == {
        "compress": sorted(
            [
                *("--at-most-kl", "--at-most-mb", "--best", "--bits", "--compressed-tensors"),
                *("--drafts", "--gguf", "--out", "--quick", "--quiet", "--to", "--workers"),
                "model",
            ]
        ),
        "new": ["--model", "file"],
        "validate": ["file"],
        "plan": ["--estimate", "--json", "--out", "file"],
        "run": [
            *(
                "--again",
                "--executor",
                "--json-lines",
                "--mirror",
                "--only",
                "--out",
                "--quiet",
                "--retry-failed",
            ),
            *("--tensorboard", "--workers", "file"),
        ],
        "search": [
            *("--at-most-kl", "--at-most-mb", "--at-most-perplexity-ratio"),
            *("--executor", "--json-lines", "--maximize", "--min-retained", "--minimize"),
            "--minutes",
            *("--out", "--quiet", "--workers", "file"),
        ],
        "report": ["--fail-on-regression", "run_dirs"],
        "pick": sorted([*wanted, "--json", "run_dir"]),
        "export": sorted([*wanted, "--cell", "--format", "--to", "--type", "--verify", "source"]),
        "gguf": ["--to", "--type", "folder"],
        "compressed-tensors": ["--to", "folder"],
        "chat": sorted([*spoken, "--device", "--keep-blocks", "folder"]),
        "generate": sorted([*drawn, "--budget", "--max-new-tokens", "--speculate", *asked]),
        "bench": [
            *("--against", "--allow-code", "--batch", "--device", "--draft-model"),
            *("--json-lines", "--keep-blocks", "--limit", "--min-seconds"),
            *("--name", "--new-tokens", "--one-process", "--out", "--prompt-tokens"),
            *("--prompts", "--quality"),
            "--questions",
            *("--quiet", "--repeats"),
            *("--system", "--task", "--temperature", "--text", "--threads", "--tokens"),
            *("--top-p", "folders"),
        ],
        "serve": [
            *("--api-key", "--budget", "--cache-mb", "--host", "--keep-blocks"),
            *("--max-body-kb", "--max-context", "--max-queue", "--max-rows", "--name"),
            *("--port", "--prefix-dir", "--replicas", "--speculate", "folder"),
        ],
        "tune-draft": [
            "--limit",
            "--new-tokens",
            "--prompts",
            *("--quiet", "--repeats", "--write", "folder"),
        ],
        "insight": ["--budget", "--html", "--json", "--text", "folder"],
        "cache": [],
        "doctor": [],
        "stages": ["--rules", "name"],
        "schema": [],
    }
    assert {
        name: sorted(option for each in sub.params for option in each.opts)
        for name, sub in command.commands["cache"].commands.items()  # type: ignore[attr-defined]
    } == {"list": ["--json", "--out"], "prune": ["--dry-run", "--out"], "verify": ["--out"]}
    assert sorted(option for each in command.params for option in each.opts) == [
        "--debug",
        "--install-completion",
        "--show-completion",
        "--version",
    ]


def test_old_spellings_stand_for_options_that_exist() -> None:
    import typer.main

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: options_of(command) for name, command in commands.items()}
    new = {option for option, _ in RENAMED.values()}
    assert new <= {option for takes in options.values() for option in takes}
    assert not any(old in takes for old in RENAMED for takes in options.values())
    assert RENAMED["--context"][0] in options["bench"]
    assert RENAMED["--budget-minutes"][0] in options["search"]


def helps() -> dict[str, str]:
    """What `--help` prints, of the program and of every command."""
    listed = [[], *([name] for name in {**FIRST, **ADVANCED, **OLD}), ["cache"]]
    listed += [["cache", name] for name in ("list", "prune", "verify")]
    return {" ".join(words): call(*words, "--help")[1] for words in listed}


def test_help_names_values_by_nouns_and_flags_without_a_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    for name, text in helps().items():
        types = re.findall(r"<[A-Za-z][\w\[\] ]*>|BOOLEAN|INTEGER|FLOAT", text)
        assert not types, (name, types)
        for line in text.splitlines():
            if re.match(r"│ \*? *--", line):  # an option: it ends its one sentence
                assert re.search(r"\w", line.partition("  ")[2]), (name, line)


def test_help_lists_the_first_commands_and_the_others_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    _, out, _ = call("--help")
    first, _, advanced = out.partition("Commands ─")[2].partition("Advanced ─")
    assert re.findall(r"^│ ([\w-]+)", first, re.MULTILINE) == list(FIRST)
    assert re.findall(r"^│ ([\w-]+)", advanced, re.MULTILINE) == [*ADVANCED, "cache"]
    for old in OLD:
        assert call(old, "--help")[0] == 0


def test_completion_offers_commands_options_and_words() -> None:
    def completed(line: str, word: int) -> list[str]:
        variables = {"_GATESKIP_COMPLETE": "complete_bash", "COMP_WORDS": line}
        done = subprocess.run(
            [sys.executable, "-c", "from compose.cli import app; app(prog_name='gateskip')"],
            env={**os.environ, **variables, "COMP_CWORD": str(word), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert "export" in completed("gateskip ex", 1)
    assert "--minutes" in completed("gateskip search --mi", 2)
    assert completed("gateskip export a --format g", 4) == ["gguf"]
    assert completed("gateskip stages prune-w", 2) == ["prune-width"]


# --- stages --------------------------------------------------------------------------------------


def test_stages_are_listed_with_a_line_each() -> None:
    from compose.stages.registry import STAGES

    code, out, _ = call("stages")
    lines = out.partition("\n\n")[0].splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == list(STAGES)
    assert all(len(line.split()) > 2 for line in lines)


def test_a_stage_is_explained_by_its_schema() -> None:
    code, out, _ = call("stages", "int4")
    assert code == 0
    assert (
        "  group_size: 32, 64 or 128, default 32\n      Number of weights that share a scale" in out
    )
    assert "  embedding: 4, 6 or 8, or null, default 8\n" in out
    assert "  allocate.among: list of 2, 3, 4, 6 or 8, default [2, 3, 4, 8]\n" in out
    assert "  ratio: number, above 0, below 1, required\n" in call("stages", "prune-width")[1]
    assert "  train.steps: integer, at least 0" in call("stages", "gate")[1]
    code, _, err = call("stages", "int5")
    assert code == 2 and "did you mean 'int" in err


def test_every_stage_is_explained_in_full() -> None:
    from compose.stages.registry import STAGES

    for use, stage in STAGES.items():
        _, out, _ = call("stages", use)
        for name in set(stage.model_fields) - {"use"}:
            told = rf"^  (\w+\.)?{name}: \S.*\n(    \S.*\n)*      \S"
            assert re.search(told, out, re.MULTILINE), (use, name)
        assert "any value" not in out, use


def test_the_rules_of_composition_stay_reachable() -> None:
    from compose.planning.composition import as_markdown

    assert call("stages", "--rules")[1] == f"{as_markdown()}\n"


def test_generate_refuses_what_is_no_model(tmp_path: Path) -> None:
    code, _, err = call("generate", tmp_path / "absent", "Hello?")
    assert code == 2
    assert "no folder" in err
    assert "Traceback" not in err


def test_gguf_refuses_what_it_cannot_write(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = call("gguf", make_tiny("mistral"), "--to", tmp_path / "a.gguf")
    assert code == 2
    assert "only these are supported: llama" in err
    assert "Traceback" not in err
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.slow
def test_gguf_writes_a_file(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    code, out, _ = call("gguf", make_tiny("llama"), "--to", file, "--type", "q8_0")
    assert code == 0
    assert file.is_file()
    assert "loads back" in out


@pytest.mark.slow
def test_generate_answers_from_a_folder(make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny("llama")
    code, _, err = call("generate", folder, "What now?", "--max-new-tokens", "8", "--stats")
    assert code == 0
    assert "8 tokens" in err and "tokens/s" in err
    code, _, err = call("generate", folder, "What now?", "--budget", "0.5")
    assert code == 2
    assert "no gates" in err
