"""Models and data by name: an alias, a path, or a hub id -> files on this machine.

`table` lists the aliases; `fetch` brings files here once and checks them; `models`, `texts` (with
`rows` and `corpora`) and `tasks` turn them into the values that the rest of the package reads.
Importing this loads no torch.
"""

from __future__ import annotations

from compose.assets.contamination import contamination
from compose.assets.fetch import default_cache, hub_reachable
from compose.assets.models.resolve import (
    ModelAsset,
    is_fetched,
    is_local,
    model_config,
    model_pin,
    resolve_model,
)
from compose.assets.names import require_task_name, require_text_name, task_file, text_file
from compose.assets.presence import (
    Presence,
    first_presence,
    model_presence,
    task_presence,
    text_presence,
)
from compose.assets.rows import TextData
from compose.assets.table import MODELS, SELF_WRITTEN, TASKS, TEXTS
from compose.assets.tasks import TaskData, load_task
from compose.assets.texts import data_pin, first_available, load_texts, token_blocks

__all__ = [
    "MODELS",
    "SELF_WRITTEN",
    "TASKS",
    "TEXTS",
    "ModelAsset",
    "Presence",
    "TaskData",
    "TextData",
    "contamination",
    "data_pin",
    "default_cache",
    "first_available",
    "first_presence",
    "hub_reachable",
    "is_fetched",
    "is_local",
    "load_task",
    "load_texts",
    "model_config",
    "model_pin",
    "model_presence",
    "require_task_name",
    "require_text_name",
    "resolve_model",
    "task_file",
    "task_presence",
    "text_file",
    "text_presence",
    "token_blocks",
]
