"""On the real dense model our scores are those of lm-eval's own model class and of transformers.

Twelve questions a task, in float32, through the decoder with which cells are measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compose.assets import default_cache, load_texts, token_blocks
from compose.bench.quality.scored import Scored
from compose.bench.quality.text import score_blocks

LIKELIHOOD = ("arc_easy", "piqa", "hellaswag", "winogrande", "lambada_openai")
WRITTEN = ("arithmetic", "squad")
QUESTIONS = 12


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Scored:
    import gateskip

    return Scored(gateskip.load(smollm2, "float32"), None)


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "questions"), [(LIKELIHOOD, QUESTIONS), (WRITTEN, 8)])
def test_scores_equal_lm_evals_own(
    tasks: tuple[str, ...], questions: int, ours: Scored, theirs: Any, tmp_path: Path
) -> None:
    """The outcome of every question, so the scores to the last digit."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from compose.bench.quality import tasks as module

    found = module.run_tasks(ours, tasks, limit=questions, cache=default_cache())
    for name in tasks:
        module._define(name, tmp_path, default_cache(), questions)
    wanted = lm_eval.simple_evaluate(
        model=HFLM(pretrained=theirs, tokenizer=ours.tokenizer, batch_size=4),
        tasks=list(tasks),
        limit=questions,
        bootstrap_iters=0,
        task_manager=module._manager(tmp_path, tasks),
    )
    for name in tasks:
        score = found[name]
        samples = sorted(wanted["samples"][name], key=lambda each: each["doc_id"])
        assert score.outcomes == tuple(round(float(each[score.metric]), 4) for each in samples)
        assert score.value == wanted["results"][name][f"{score.metric},none"]
        assert score.n == questions and score.questions == module._digest_of(samples)
        assert score.kind == ("generative" if tasks is WRITTEN else "likelihood")
        print(name, json.dumps({"ours": score.value, "theirs": score.value, "n": score.n}))


def test_perplexity_equals_a_plain_loop(ours: Scored, theirs: Any) -> None:
    heldout = load_texts("heldout-text", cache=default_cache())
    blocks = token_blocks(heldout, ours.tokenizer, 512, 2)
    losses = []
    with torch.inference_mode():
        for row in blocks:
            losses.append(float(theirs(row[None], labels=row[None]).loss))
    scores = score_blocks(ours, blocks)
    assert scores.block_nll == pytest.approx(losses, rel=1e-4)
    assert scores.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    print("perplexity", scores.perplexity)
