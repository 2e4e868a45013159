"""`python -m reports.documents.publish RUN_FOLDER [NAME]`: publish a run beside the code.

reports/published/NAME/ gets `results.json` without line ends, `report.md`, and of the pictures
those that a document shows, `KEY-dark.png` for a dark page. `gateskip report` and `gateskip pick`
read it as they read a run.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from compose.errors import ComposeError
from compose.results.io import FILE_NAME, load_results
from compose.results.schema import Results
from compose.store import write_text
from reports import plots
from reports.documents.markers import PUBLISHED, ROOT
from reports.facts import PICTURES
from reports.load import Report
from reports.render import to_markdown, write

DARK = "-dark"
"""What the name of a picture for a dark page ends with."""


def publish(run: Path, name: str, root: Path = ROOT) -> Path:
    """Publish the results of a run's folder under this name; the folder that it made.

    Raises:
        UserError: the results cannot be read.
    """
    results, folder = compact(load_results(run)), root / PUBLISHED / name
    report, pictures = Report(results), folder / PICTURES
    shown = {file.stem for file in linked_pictures(root) if file.parent == pictures.resolve()}
    drawn = plots.pictures(report) if shown else {}
    drawn = {key: picture for key, picture in drawn.items() if key in shown}
    dark = plots.dark_pngs(report, [stem.removesuffix(DARK) for stem in shown if DARK in stem])
    shutil.rmtree(pictures, ignore_errors=True)
    for old in folder.glob("report.*"):
        old.unlink()
    text = json.dumps(results.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))
    write_text(folder / FILE_NAME, text + "\n")
    write_text(folder / "report.md", to_markdown(report, drawn))
    for key, picture in drawn.items():
        write(pictures / f"{key}.png", picture.png)
    for key, png in dark.items():
        write(pictures / f"{key}{DARK}.png", png)
    return folder


def compact(results: Results) -> Results:
    """The results without the repeats of speeds of which tables show median, quartiles and ratio.

    Kept are the repeats of decoding and prefill at the main shape: a picture shows the first, and a
    table pairs the second between any two cells.
    """
    data = results.model_dump(mode="json")
    for cell in data["cells"]:
        speed = cell.get("speed") or {}
        _without_repeats(speed.get("ttft_s"))
        for shapes in ("by_batch", "by_context", "by_category"):
            for numbers in (speed.get(shapes) or {}).values():
                for measured in numbers.values():
                    _without_repeats(measured)
    return Results.model_validate(data)


def linked_pictures(root: Path = ROOT) -> set[Path]:
    """The pictures of published runs that README.md and docs/ show."""
    pages = (root / "README.md", *(root / "docs").rglob("*.md"))
    return {
        (page.parent / link).resolve()
        for page in pages
        if page.is_file()
        for link in re.findall(r"""(?:\]\(|src(?:set)?=")([^)"]+\.png)""", page.read_text("utf-8"))
        if PUBLISHED.as_posix() in link
    }


def _without_repeats(measured: Any) -> None:
    if isinstance(measured, dict) and measured.get("quartiles"):
        measured.pop("repeats", None)


def main(arguments: list[str]) -> int:
    """Publish a run's folder, under its own name without another; an exit code."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    run = Path(arguments[0])
    try:
        folder = publish(run, arguments[-1] if len(arguments) == 2 else run.resolve().name)
    except ComposeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(folder.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
