"""Role `fetch`: downloads the data and models of a plan, and makes environments of other engines.

Everything is tried, so that one message lists all missing parts. Environments come last: they take
minutes, and are made only if everything else is available.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from compose.assets import TASKS, first_available, load_task, resolve_model
from compose.assets.tasks import fetch_lm_eval_tasks
from compose.bench.peers.environment import python_of
from compose.bench.peers.table import parse_peer
from compose.contract import FetchJob
from compose.errors import ComposeError
from compose.units import Progress

Lacking = list[tuple[str, str | None]]
"""Name of a missing part, and its fix."""


def fetch(job: FetchJob, progress: Progress) -> Lacking:
    """Fetch all that the job names; return the missing parts, each with its fix."""
    lacking = _refused(_inputs(job, progress))
    return lacking or _refused(_environments(job, progress))


def _refused(works: Iterator[Callable[[], object]]) -> Lacking:
    lacking: Lacking = []
    for work in works:
        try:
            work()
        except ComposeError as error:
            lacking.append((error.text(), error.fix))
    return lacking


def _inputs(job: FetchJob, progress: Progress) -> Iterator[Callable[[], object]]:
    """What brings each text, each task and the model."""
    for sources in job.texts:
        progress(0, 1, f"text {sources[0]}")
        yield partial(first_available, sources, None, job.cache, progress)
    others = [name for name in job.tasks if name not in TASKS]
    for name in job.tasks:
        progress(0, 1, f"task {name}")
        if name in TASKS:
            yield partial(load_task, name, job.cache, progress)
    if others:
        yield partial(fetch_lm_eval_tasks, others)
    if job.model is not None:
        progress(0, 1, f"model {job.model}")
        keep = job.keep_blocks
        yield partial(resolve_model, job.model, job.cache, progress, keep_blocks=keep)
    for source in job.draft_models:
        progress(0, 1, f"draft model {source}")
        yield partial(resolve_model, source, job.cache, progress)


def _environments(job: FetchJob, progress: Progress) -> Iterator[Callable[[], object]]:
    """What makes each engine's environment."""
    engines = {(engine := parse_peer(peer).engine).name: engine for peer in job.peers}
    for engine in engines.values():
        yield partial(python_of, engine, job.cache, progress)
