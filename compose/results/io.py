"""Reading and writing `results.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compose.errors import UserError, shortened
from compose.results.schema import SCHEMA_VERSION, Results
from compose.store import write_json

FILE_NAME = "results.json"


def load_results(path: str | Path) -> Results:
    """Read `results.json`, given the file or the run's folder.

    Raises:
        UserError: it is not there, is not JSON, or is not a result this version can read.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or str(error)
        fix = "give a run's folder or its results.json"
        raise UserError(f"cannot read the results: {why}", fix=fix, file=file) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not JSON: {shortened(str(error))}", file=file) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        raise UserError(
            f"schema version {version} is {'newer' if newer else 'older'} than {SCHEMA_VERSION}, "
            "the one this version reads",
            fix="upgrade gateskip-compose" if newer else "run the pipeline again: its steps stay",
            file=file,
        )
    try:
        return Results.model_validate(data)
    except ValidationError as error:
        raise UserError(_first_mistake(data, error), file=file) from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"this is not the result of a run: {error}", file=file) from error


def save_results(results: Results, path: str | Path) -> None:
    """Write `results.json` in one move: a reader meets the old file or the new one, whole."""
    write_json(Path(path), results.model_dump(mode="json"))


def _first_mistake(data: Any, error: ValidationError) -> str:
    mistakes = error.errors(include_url=False, include_input=False)
    loc = mistakes[0]["loc"]
    place = ""
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    message = f"{place or 'the file'}: {mistakes[0]['msg']}"
    more = len(mistakes) - 1
    return message if not more else f"{message} (and {more} more)"
