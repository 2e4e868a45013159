"""Keys and values of prompts on disk, for a server that starts again and for other processes.

A prompt is cut into blocks of tokens, and a file has what a row has of one block. The file's name
is a hash of everything that decides these bits: the model and its arithmetic (identity.py), how
the prompt skips, and all tokens up to the end of the block.

A thread copies blocks out of the cache while the row goes on, and writes them. It drops a copy if
the row was given to another request meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from gateskip.decoding.decoder import Decoder
from gateskip.runtime.kv_cache import KVCache
from gateskip.serving.identity import identity_of
from gateskip.serving.prefix_files import PrefixFiles
from gateskip.serving.slot import Slot

log = logging.getLogger(__name__)
CLOSE_S = 5.0  # that blocks may take to be written at the end


class StoredPrefixes:
    """Blocks of `tokens` tokens of the rows of a cache, in files."""

    def __init__(self, decoder: Decoder, cache: KVCache, files: PrefixFiles, tokens: int) -> None:
        """Hashes the model's weights."""
        self._cache, self._files, self._tokens = cache, files, tokens
        self._identity = identity_of(decoder, cache)
        self._fits = tokens <= min(cache.slots)
        self._size = sum(map(_nbytes, cache.span(0, 0, tokens))) if self._fits else 0
        self._changed = threading.Condition()
        self._waiting: dict[int, tuple[Slot, int, Sequence[str]]] = {}  # by row
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="gateskip-prefixes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after what it still has to write, if that does not take long."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def names(self, prompt: Sequence[int], settings: Hashable) -> list[str]:
        """Names of the whole blocks of a prompt that is read by some settings."""
        name = hashlib.sha256(self._identity + f"{self._tokens} {settings!r}".encode()).digest()
        tokens, names = np.asarray(prompt, np.int64), list[str]()
        for end in range(self._tokens, len(prompt) + 1, self._tokens):
            name = hashlib.sha256(name + tokens[end - self._tokens : end].tobytes()).digest()
            names.append(name.hex())
        return names if self._fits else []

    def load(self, row: Slot, most: int, end: int) -> int:
        """About `most` tokens from files into a row, after those that it has, up to `end` at most;
        returns how many."""
        first = row.read
        while row.looks and row.read - first < most:
            row.looks = self._load_block(row, end)
        return row.read - first

    def _load_block(self, row: Slot, end: int) -> bool:
        """The block that has the row's next token, if there is one."""
        number, count = row.read // self._tokens, self._tokens
        begin = number * count
        if begin + count > min(end, *self._cache.slots) or number >= len(row.blocks):
            return False
        content = self._files.read(row.blocks[number], self._size)
        if content is None:
            return False
        self._cache.begin([row.number], [begin], [count])
        for part in self._cache.span(row.number, begin, count):
            stored, content = content[: _nbytes(part)], content[_nbytes(part) :]
            into = _bytes_of(part)
            into[...] = np.frombuffer(stored, np.uint8).reshape(into.shape)
        row.read = begin + count
        return True

    # -- in the background -----------------------------------------------------------------------

    def keep(self, row: Slot, positions: int) -> None:
        """Write the blocks that a row has read and no file has; it comes to have up to that many
        positions. Rows that can leave a layer's window are not kept: it overwrites the first
        blocks."""
        names = row.blocks[: row.read // self._tokens]
        if not names or positions > min(self._cache.slots):
            return
        with self._changed:
            self._waiting[row.number] = (row, row.taken, names)
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._write(*job)
            except OSError as error:
                log.warning("keys and values of a prompt are not kept on disk: %s", error)
            except Exception:
                log.exception("keys and values of a prompt are not kept on disk")

    def _next(self) -> tuple[Slot, int, Sequence[str]] | None:
        """The next row to write; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.pop(next(iter(self._waiting))) if self._waiting else None

    def _write(self, row: Slot, taken: int, names: Sequence[str]) -> None:
        def content(block: int) -> bytes | None:
            """The copy of a block; None where another request has the row."""
            if row.taken != taken:
                return None
            parts = self._cache.span(row.number, block * self._tokens, self._tokens)
            copy = b"".join(_bytes_of(part).tobytes() for part in parts)
            return copy if row.taken == taken else None

        self._files.store(names, self._size, content)


def _nbytes(part: Tensor) -> int:
    return part.numel() * part.element_size()


def _bytes_of(part: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The memory of a tensor whose last dimension is dense."""
    return part.view(torch.uint8).numpy()
