"""Answering a prompt from a model folder, with the time and the counts of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import is_gated, probe_ids, require_model
from compose.assets import load_texts
from compose.bench.text_stream import TextStream, silent
from compose.contract import Device
from compose.errors import ArtifactError, AssetError
from compose.store import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gateskip.decoding.decoder import Decoder, Mode


def decode_settings(
    folder: Path,
    *,
    budget: float | None = None,
    speculate: bool | None = None,
    draft_model: Path | None = None,
) -> dict[str, Any]:
    """Decode settings of a folder: its own, changed by those that the caller gives.

    `budget` is the share of multiply-adds of the answer, or of drafts when speculating. A
    `draft_model` drafts in place of the folder's own draft.

    Raises:
        ArtifactError: the folder has no model, or has no gates although skipping is requested; or a
            draft model is given, and told to skip, or not to draft.
    """
    require_model(folder)
    if draft_model is not None:
        require_model(draft_model)
        if budget is not None or speculate is False:
            other = "--no-speculate" if speculate is False else "--budget"
            raise ArtifactError(
                f"{other} and --draft-model contradict each other: a draft model drafts, and skips"
                " nothing",
                fix="leave one of them out",
            )
        speculate = True
    stored = (read_json(folder / "gateskip.json") or {}).get("decode") or {"mode": "plain"}
    kv_cache = {key: value for key, value in stored.items() if key == "kv_cache"}
    if not is_gated(folder):
        if budget is not None:
            raise ArtifactError(
                f"{folder} has no gates, so it cannot skip",
                fix="leave --budget out, or name a folder made with a gate stage",
            )
        if stored["mode"] == "skip" or stored.get("draft_budget", 1) < 1:
            stored = {"mode": "plain", **kv_cache}
    mode: Mode = stored["mode"]
    if speculate is not None:
        mode = "speculate" if speculate else "skip" if budget is not None else "plain"
    elif budget is not None and mode == "plain":
        mode = "skip"
    of_mode = {key: value for key, value in stored.items() if stored["mode"] == mode}
    settings: dict[str, Any] = {**kv_cache, **of_mode, "mode": mode}
    if budget is not None:
        settings["draft_budget" if mode == "speculate" else "budget"] = budget
    if draft_model is not None:
        settings |= {"draft_weights": "model", "draft_budget": 1.0}
    return settings


def answer(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    budget: float | None = None,
    speculate: bool | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    draft_model: Path | None = None,
    device: Device = "cpu",
    on_text: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Answer a prompt: the result of `answer_ids`.

    `sampling` has fields of gateskip.Sampler; without it the argmax token is taken. A folder with a
    chat template gets the prompt as a chat message. `on_text` is given the text piece by piece
    while it is written. Raises ArtifactError as `decode_settings`.
    """
    decoder, settings = open_decoder(
        folder, budget=budget, speculate=speculate, draft_model=draft_model, device=device
    )
    ids = prompt_ids(decoder.tokenizer, prompt)
    stream = TextStream(decoder.tokenizer, on_text)
    answered = answer_ids(
        decoder,
        settings,
        ids,
        stream.add,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
    )
    stream.finish(answered["text"])
    return answered


def open_decoder(
    folder: Path,
    *,
    budget: float | None = None,
    speculate: bool | None = None,
    draft_model: Path | None = None,
    device: Device = "cpu",
) -> tuple[Decoder, dict[str, Any]]:
    """A folder's decoder on a device, and its decode settings: see `decode_settings`.

    Raises ArtifactError as `decode_settings`, where the budget was not calibrated, where the draft
    model has another vocabulary, and where the folder cannot be decoded on the device.
    """
    import gateskip
    from gateskip.model.families import UnsupportedModel

    settings = decode_settings(folder, budget=budget, speculate=speculate, draft_model=draft_model)
    try:
        decoder = gateskip.load(folder, device=device)
    except UnsupportedModel as error:
        raise ArtifactError(f"{folder} cannot be decoded: {error}") from error
    if draft_model is not None:
        try:
            decoder.draft_by(gateskip.load(draft_model, device=device))
        except ValueError as error:
            raise ArtifactError(f"{draft_model} cannot draft for {folder}: {error}") from error
    share = settings.get("draft_budget", settings.get("budget"))
    if settings["mode"] != "plain" and share is not None:
        try:
            decoder.thresholds(share)
        except ValueError as error:
            raise ArtifactError(f"{folder} cannot be decoded at budget {share}: {error}") from error
    return decoder, settings


def prepare(decoder: Decoder, settings: Mapping[str, Any]) -> float:
    """Make or choose the draft for `settings`; returns the seconds that it took."""
    begun = time.perf_counter()
    if settings["mode"] == "speculate":
        budget = settings.get("draft_budget") or 1.0
        decoder.prepare_drafts(settings.get("draft_weights"), budget)
    return time.perf_counter() - begun


def answer_ids(
    decoder: Decoder,
    settings: Mapping[str, Any],
    ids: Sequence[int],
    on_token: Callable[[int], None],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> dict[str, Any]:
    """Answer token ids: {"text", "tokens", "seconds", "preparing_s", "settings", "stats", "kept"}.

    `seconds` is the time of the answer; `preparing_s` the time before it to make or choose the
    draft. `kept` is the share of the branches' multiply-adds that the answer computed; None without
    skipping. `on_token` is given each token.
    """
    import gateskip

    preparing_s = prepare(decoder, settings)
    started = time.perf_counter()
    generation = decoder.generate(
        [ids],
        max_new_tokens,
        sampler=gateskip.Sampler(**(sampling or {})),
        seed=seed,
        eos=stop_token_ids(decoder),
        stop=stop,
        on_token=lambda _, token: on_token(token),
        **settings,
    )
    seconds = time.perf_counter() - started
    tokens, used = generation.tokens[0], generation.usage.get("answer")
    skipped = settings["mode"] == "skip" and used is not None and used.seen
    return {
        "text": answer_text(decoder.tokenizer, tokens),
        "tokens": len(tokens),
        "seconds": seconds,
        "preparing_s": preparing_s,
        "settings": dict(settings),
        "stats": generation.stats.to_dict(),
        "kept": decoder.kept_of(used) if skipped and used is not None else None,
    }


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """An answer's tokens as text, without special tokens and without spaces at its ends."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def continue_probe(
    folder: Path, tokens: int, settings: Mapping[str, Any] | None = None
) -> list[int]:
    """The `tokens` argmax ids after the probe text, decoded by `settings`, or by the folder's own
    settings.

    The result does not depend on the clock: a draft length of `auto`, which is timed, becomes 4.
    """
    import gateskip

    given = dict(settings or {})
    decoder = gateskip.load(folder, draft_model=given.pop("draft_model", None))
    keywords = decoder.defaults if settings is None else given
    if keywords.get("draft_length", "auto") == "auto" and keywords.get("mode") == "speculate":
        keywords["draft_length"] = 4
    ids: list[int] = probe_ids(folder)[0].tolist()
    continuation: list[int] = decoder.generate([ids], tokens, **keywords).tokens[0]
    return continuation


def stop_token_ids(decoder: Decoder) -> list[int]:
    """Ids that end an answer: those of the tokenizer and of the generation config."""
    stated = decoder.skipping.model.generation_config.eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    return sorted({stop for stop in (*listed, decoder.tokenizer.eos_token_id) if stop is not None})


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of the prompt, as a user's message where the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer(prompt).input_ids)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
) -> list[int]:
    """Token ids of a conversation {"role", "content"}, up to the place where the model's answer
    begins; the template shows `tools` if it takes any."""
    chat = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(chat, add_special_tokens=False).input_ids
    return ids


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, source: str, count: int, cache: Path | None
) -> list[list[int]]:
    """The first `count` prompts of a text as token ids; see `prompt_ids`.

    Raises:
        AssetError: the text is not available, or has fewer prompts.
    """
    return [prompt_ids(tokenizer, text) for text in prompt_texts(source, count, cache)]


def prompt_texts(source: str, count: int, cache: Path | None) -> list[str]:
    """The first `count` prompts of a text.

    Raises:
        AssetError: the text is not available, or has fewer prompts.
    """
    data = load_texts(source, count, cache)
    texts = data.prompts or data.rows
    if len(texts) < count:
        raise AssetError(f"{source} has {len(texts)} prompts, but {count} are needed")
    return texts[:count]
