"""`gateskip export`: a cell of a run, or a model folder, in the format that another tool reads."""

from __future__ import annotations

import contextlib
from pathlib import Path

from compose.contract import CompressedTensorsJob, GgufJob
from compose.errors import UserError, context, suggest
from compose.numbers import bytes_text, metric_text
from compose.outputs.export import export_cell, stored_baseline, stored_cell
from compose.outputs.run_folder import RunFolder, file_name
from compose.processes.executors import make_executor
from compose.processes.worker_process import ask_once
from compose.results.io import load_results
from compose.terminal.show import compressed_text

HF, GGUF, COMPRESSED = "hf", "gguf", "compressed-tensors"
FORMATS = (HF, GGUF, COMPRESSED)


def require_format(output_format: str, kind: str | None, *, verify: bool) -> None:
    """Check that there is such a format, and that the other options are for it.

    Raises:
        UserError: there is none, or they are not.
    """
    if output_format not in FORMATS:
        raise UserError(
            f"there is no format {output_format!r}", fix=suggest(output_format, FORMATS)
        )
    if kind is not None and output_format != GGUF:
        raise UserError("--type is an option of GGUF files", fix=f"add --format {GGUF}")
    if verify and output_format != HF:
        raise UserError(
            "--verify is an option of hf folders",
            fix="leave --verify out: other formats are always read back as a check",
        )


def require_convertible(folder: Path, output_format: str, *, picks: bool) -> None:
    """Check that a model folder is to become something else, and that no cell of it is asked for.

    Raises:
        UserError: it is not, or one is.
    """
    if output_format == HF:
        fix = f"add --format {GGUF} or --format {COMPRESSED}"
        raise UserError(f"{folder} is a model folder already, as transformers reads it", fix=fix)
    if picks:
        fix = "leave out --cell, bounds and aims, or name the folder of a run"
        raise UserError(f"{folder} is a model folder, which has no cells to pick from", fix=fix)


def is_model(folder: Path) -> bool:
    """Whether it is a model folder."""
    return (folder / "config.json").is_file()


def export_cell_as(
    run_dir: Path, name: str, to: Path, output_format: str, kind: str | None, *, verify: bool
) -> str:
    """Export a cell of a run in a format, and say in one line how that went.

    Raises as `export_cell` and `convert`.
    """
    run = RunFolder.existing(run_dir)
    with run.locked():
        if output_format == HF:
            with contextlib.closing(make_executor("local", None)) as executor:
                export_cell(run, name, to, executor, compare_tokens=verify)
            same = ": the same logits and tokens as its source" if verify else ""
            return f"{name} exported to {to}{same}"
        results = load_results(run.results_file)
        planned, source = stored_cell(run, results.cell(name))
        dense = stored_baseline(run, results)
        with context(cell=name):
            place = place_of(to, output_format, name)
            text = convert(source, place, output_format, kind, name, dense)
    if planned["decode"] is None:
        return text
    use = planned["decode"]["use"]
    return f"{text}\nonly the weights are exported: in gateskip, {name} also uses the stage {use}"


def place_of(to: Path, output_format: str, name: str) -> Path:
    """Where a model of this name is written: a GGUF file has its own name inside a folder.

    >>> place_of(Path("out"), "gguf", "int4"), place_of(Path("a.gguf"), "gguf", "int4")
    (PosixPath('out/int4.gguf'), PosixPath('a.gguf'))
    """
    if output_format == GGUF and to.suffix != ".gguf":
        return to / f"{file_name(name)}.gguf"
    return to


def convert(
    folder: Path,
    to: Path,
    output_format: str,
    kind: str | None,
    name: str | None = None,
    dense: Path | None = None,
) -> str:
    """Write a model folder as a GGUF file or for vLLM, and say in a line or two what was written.

    A GGUF file also holds the `name` of its model, that of the folder by default. `dense` is the
    folder of the model before rounding, where it is known.

    Raises:
        ArtifactError: the folder cannot be written in this format.
        StepError: what was written does not read back as it should.
    """
    folder, target = folder.absolute(), to.absolute()
    if output_format == COMPRESSED:
        return compressed_text(to, ask_once(CompressedTensorsJob(folder, target, dense)))
    written = ask_once(GgufJob(folder, target, kind, name))
    size, kl = bytes_text(written["bytes"]), metric_text("kl", written["kl"])
    said = f"{to}: {size}, {written['kind']}, loads back"
    return f"{said}; KL from the predictions of the model folder: {kl}"
