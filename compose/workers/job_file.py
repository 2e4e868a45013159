"""Reading a job file: only from a folder that nobody else can write to.

A job says which folders are read and filled. Whoever can change it works with our rights.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from compose.errors import UserError


def read_job(file: Path) -> Any:
    """The job in a file.

    Raises:
        UserError: the file, or its folder, is another user's, or others may write to it.
    """
    with file.open("rb") as opened:
        for what, facts in (
            (file.parent, os.stat(file.parent)),
            (file, os.fstat(opened.fileno())),
        ):
            why = _open_to_others(facts)
            if why is not None and not (what is file and _closed(file.parent)):
                raise UserError(
                    f"{what} is {why}, so what it asks for is not done",
                    fix="remove the run's folder `jobs`; it is made again, for you alone",
                )
        return json.loads(opened.read())


def _open_to_others(facts: os.stat_result) -> str | None:
    """Why others than this user could have written a file or folder; None where they could not."""
    if facts.st_uid not in (os.geteuid(), 0):
        return "another user's"
    if stat.S_IMODE(facts.st_mode) & 0o022:
        return "open to other users to write to"
    return None


def _closed(folder: Path) -> bool:
    """Whether nobody else gets into the folder, whatever the modes of the files in it."""
    facts = os.stat(folder)
    return facts.st_uid == os.geteuid() and not stat.S_IMODE(facts.st_mode) & 0o077
