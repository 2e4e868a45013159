"""Prompts that a model in a stage answers, from the texts that the stage may read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compose.assets import SELF_WRITTEN, load_texts

if TYPE_CHECKING:
    from torch import Tensor

    from compose.contract import DataSpec, StageJob

GIVEN = 32  # tokens of a block that are a prompt, for a model without a chat template
ASKED = 48  # tokens of what a model asks in a user's place, at most


def prompts_to_answer(
    job: StageJob, model: Any, blocks: Tensor, count: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of `count` prompts, and the ids of end tokens.

    The prompts come from the calibration text or the training text, where one has any that fit into
    a block. Otherwise a chat model writes them as the user; for other models they are the
    beginnings of blocks [N, S].
    """
    from transformers import AutoTokenizer

    from gateskip.decoding.self_generate import ask, asked_ids

    tokenizer, length = AutoTokenizer.from_pretrained(job.source), blocks.shape[1]
    end = tokenizer.eos_token_id
    stops = [] if end is None else [end]
    for spec in (job.calibration, job.train):
        stated = [] if spec is None else _stated(spec, job)
        fitting = [ids for prompt in stated if len(ids := asked_ids(tokenizer, prompt)) <= length]
        if fitting:
            step = max(1, len(fitting) // count)  # from every part of a mix
            return fitting[::step][:count], stops
    if getattr(tokenizer, "chat_template", None):
        from gateskip.decoding.decoder import Decoder
        from gateskip.training.rollouts import runnable

        decoder = Decoder(runnable(model, None, "project"), tokenizer, {})
        return ask(decoder, count, ASKED, stops, job.seed), stops
    rows = blocks[:, : min(GIVEN, length // 2)].tolist()
    return rows[:count], stops


def _stated(spec: DataSpec, job: StageJob) -> list[str]:
    """All prompts of a split's sources, up to the limit of each."""
    prompts: list[str] = []
    for source in spec.weights:
        if source != SELF_WRITTEN:
            prompts += load_texts(source, spec.limit, job.asset_cache).prompts or ()
    return prompts
