"""Continuations scored by a cell's own decoder, beside a loop over single texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compose.bench.quality.continuations import (
    BranchingModel,
    fold_prefixes,
    score_continuations,
    share_contexts,
)
from compose.bench.quality.scored import Scored
from compose.bench.quality.text import (
    head_chunks,
    load_blocks,
    load_head,
    score_blocks,
    score_reference,
)
from compose.errors import StepError
from gateskip.decoding.decoder import Decoder
from gateskip.gates.learned import ScalarGates
from gateskip.quantization.folders import load_model
from gateskip.runtime.skipping import SkippingModel

LENGTHS = [3, 9, 5, 9, 1]


@pytest.fixture(scope="module")
def decoder(make_tiny: Callable[..., Path]) -> Decoder:
    """At a budget of 0.5 the third layer's attention is closed, and half of the last MLP."""
    model = load_model(make_tiny("llama"), "float32")
    gates = ScalarGates(8, 64).requires_grad_(False)
    gates.weight.normal_(generator=torch.Generator().manual_seed(0))
    gates.bias.zero_()
    grid = {0.5: [-math.inf] * 4 + [math.inf] + [-math.inf] * 2 + [0.0]}
    return Decoder(SkippingModel(model, gates), None, grid)


def ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (length,), generator=generator).tolist()


CONTEXTS = [ids(length, length) for length in LENGTHS]
PAIRS = [
    *((CONTEXTS[0], ids(2, 20)), (CONTEXTS[1], ids(4, 21)), (CONTEXTS[0], ids(1, 22))),
    *((CONTEXTS[2], ids(3, 23)), (CONTEXTS[1], ids(1, 24)), (CONTEXTS[0], ids(5, 25))),
    *((CONTEXTS[4], ids(1, 26)), (CONTEXTS[4], ids(1, 27))),
]


def alone(decoder: Decoder, thresholds: Any, context: list[int], ending: list[int]) -> Any:
    """Log-probability of an ending and whether greedy decoding writes it, from one whole pass."""
    skipping = decoder.skipping
    text = torch.tensor([context + ending])
    states = skipping.forward(text, skipping.new_cache(1, text.shape[1]), [0], thresholds)
    logits = skipping.scores(states)[0, len(context) - 1 : -1].log_softmax(-1)
    own = torch.tensor(ending)
    return float(logits.gather(1, own[:, None]).sum()), bool((logits.argmax(-1) == own).all())


def test_contexts_that_are_shared() -> None:
    """Of eight pairs, seven share three contexts of 9, 3 and 1 tokens: the longest first."""
    assert share_contexts(PAIRS, 100) == [[1, 4], [0, 2, 5], [6, 7]]
    assert share_contexts(PAIRS, 8) == [[0, 2, 5], [6, 7]], "9 + 4 and 9 + 1 do not fit"
    assert share_contexts(PAIRS, 7) == [[0, 2], [6, 7]]
    assert share_contexts([([], [5]), ([], [6])], 9) == []


@pytest.mark.parametrize("budget", [None, 0.5])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_shared_contexts_change_no_score(
    decoder: Decoder, budget: float | None, batch: int
) -> None:
    model = Scored(decoder, budget)
    assert isinstance(model, BranchingModel)
    told: list[tuple[int, int, str]] = []
    found = score_continuations(
        model,
        PAIRS,
        batch_size=batch,
        max_length=64,
        progress=lambda *each: told.append(each),
    )
    thresholds = None if budget is None else decoder.grid[budget]
    for (score, greedy), (context, ending) in zip(found, PAIRS, strict=True):
        wanted, as_greedy = alone(decoder, thresholds, context, ending)
        assert score == pytest.approx(wanted, abs=1e-4) and greedy == as_greedy
    assert told[-1] == (8, 8, "scoring answers")
    assert [each[0] for each in told] == sorted(each[0] for each in told)


def test_budgets_change_the_scores(decoder: Decoder) -> None:
    plain, skipping = (
        score_continuations(Scored(decoder, b), PAIRS, batch_size=4, max_length=64)
        for b in (None, 0.5)
    )
    changed = [a[0] != b[0] for a, b in zip(plain, skipping, strict=True)]
    assert changed == [True] * 6 + [False] * 2, "the first token of a text enters everything"


def test_what_greedy_decoding_writes_is_known_as_such(decoder: Decoder) -> None:
    for budget in (None, 0.5):
        model = Scored(decoder, budget)
        written = model.generate(CONTEXTS[:2], 3, ())
        assert [len(tokens) for tokens in written] == [3, 3]
        pairs = [
            pair
            for context, tokens in zip(CONTEXTS, written, strict=False)
            for pair in ((context, tokens), (context, [*tokens[:2], (tokens[2] + 1) % 512]))
        ]
        found = score_continuations(model, pairs, batch_size=4, max_length=64)
        assert [greedy for _, greedy in found] == [True, False, True, False]
        stopped = model.generate(CONTEXTS[:1], 3, [written[0][1]])
        assert stopped == [written[0][:2]]


def test_padding_is_not_read(decoder: Decoder) -> None:
    """Rows of 3, 9 and 5 tokens in one batch have the states that each has alone."""
    model = Scored(decoder, 0.5)
    rows = CONTEXTS[:3]
    padded = torch.tensor([row + [7] * (9 - len(row)) for row in rows])
    together = model.hidden(padded, torch.tensor([3, 9, 5]))
    for row, own in zip(rows, together, strict=True):
        single = model.hidden(torch.tensor([row]), None)[0]
        torch.testing.assert_close(own[: len(row)], single, atol=1e-5, rtol=1e-4)
    assert model.device.type == "cpu" and model.head(together).shape == (3, 9, 512)


def test_endings_may_be_empty(decoder: Decoder) -> None:
    """Of endings of one token only their first state is asked for: the context's last."""
    after, within = Scored(decoder, None).branch(CONTEXTS[:2], [[], [], []], [0, 1, 1])
    assert after.shape == (2, 64) and within.shape == (3, 0, 64)
    single = Scored(decoder, None).hidden(torch.tensor([CONTEXTS[1]]), None)[0, -1]
    torch.testing.assert_close(after[1], single, atol=1e-5, rtol=1e-4)


def test_inputs_that_begin_others_are_folded() -> None:
    rows, row_of = fold_prefixes([[1, 2], [1, 2, 3], [4], [1], [4]])
    assert rows == [[4], [1, 2, 3]] and row_of == [1, 1, 0, 1, 0]


def test_chunks_cover_all() -> None:
    assert list(head_chunks(600)) == [slice(0, 256), slice(256, 512), slice(512, 600)]
    assert list(head_chunks(256)) == [slice(0, 256)] and list(head_chunks(0)) == []


def test_batches_of_blocks_change_no_score(decoder: Decoder) -> None:
    """Five blocks by twos, against the states of the model at full compute."""
    blocks = torch.tensor([ids(12, 40 + number) for number in range(5)])
    plain, skipping = Scored(decoder, None), Scored(decoder, 0.5)
    own, stored = score_reference(plain, blocks, batch_size=2)
    one = score_blocks(skipping, blocks, (stored["hidden"], plain.head))
    two = score_blocks(skipping, blocks, (stored["hidden"], plain.head), batch_size=2)
    assert own.perplexity == pytest.approx(score_blocks(plain, blocks).perplexity, rel=1e-5)
    assert two.kl == pytest.approx(one.kl, rel=1e-3) and one.kl is not None and one.kl > 1e-3
    assert one.perplexity > own.perplexity / 2 > 1
    assert two.agreement == one.agreement and two.perplexity == pytest.approx(one.perplexity)
    with pytest.raises(StepError, match=r"(?s)^the reference was made from other text.+--again"):
        load_blocks(stored, blocks.flip(0))


def head_folder(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_head_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the states (1, 2) and (0, 1) under weights of 3 tokens, of each kind of folder."""
    monkeypatch.setattr("compose.bench.quality.text.HEAD_ROWS", 2)  # tokens are taken in two parts
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    head = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    both = {"lm_head.weight": head, "model.embed_tokens.weight": embedding}
    states = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    tied = torch.tensor([[1.0, 2.0, 6.0], [0.0, 1.0, 2.0]])
    own = torch.tensor([[3.0, 6.0, 3.0], [0.0, 3.0, 1.0]])
    alone = [{name: weight} for name, weight in both.items()]
    for number, (weights, config, wanted) in enumerate(
        [
            (both, {"tie_word_embeddings": True}, tied),
            (both, {"tie_word_embeddings": False}, own),
            (both, {}, own),
            (alone[0], {"tie_word_embeddings": True}, own),
            (alone[1], {"tie_word_embeddings": False}, tied),
            (both, {"logit_scale": 4.0, "logits_scaling": 2.0}, 2 * own),
            (both, {"final_logit_softcapping": 5.0}, 5 * torch.tanh(own / 5)),
        ]
    ):
        folder = head_folder(tmp_path / str(number), weights, **config)
        torch.testing.assert_close(load_head(folder)(states), wanted)
        torch.testing.assert_close(load_head(folder)(states[None]), wanted[None])
    bare = head_folder(tmp_path / "bare", {"x": head})
    message = f"{bare} has none of the weights lm_head.weight, model.embed_tokens.weight"
    with pytest.raises(StepError) as caught:
        load_head(bare)
    assert str(caught.value) == message


@pytest.mark.parametrize("budget", [None, 0.5])
def test_padding_is_no_work(decoder: Decoder, budget: float | None) -> None:
    """Compute saved is a share of what was read: 17 tokens, of contexts 12, of endings 6."""
    model, usage = Scored(decoder, budget), decoder.skipping.usage
    usage.clear()
    ids_of_three = torch.tensor([row + [7] * (9 - len(row)) for row in CONTEXTS[:3]])
    model.hidden(ids_of_three, torch.tensor([3, 9, 5]))
    assert (usage.seen, usage.context) == (17, 6 + 45 + 15)
    usage.clear()
    model.branch(CONTEXTS[:2], [ids(1, 1), ids(4, 2), ids(1, 3)], [0, 1, 1])
    assert (usage.seen, usage.context) == (12 + 6, 6 + 45 + 4 + (10 + 11 + 12 + 13) + 10)
    usage.clear()
    _, within = model.branch(CONTEXTS[:2], [ids(1, 1), ids(1, 2)], [0, 1])
    assert within.shape == (2, 1, 64) and usage.seen == 12 + 2


@pytest.mark.parametrize("budget", [None, 0.5])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (1, 1, 1)])
def test_answers_are_predicted_as_one_whole_pass_predicts_them(
    decoder: Decoder, budget: float | None, sizes: tuple[int, ...]
) -> None:
    """Of prompts of 3, 9 and 5 tokens and answers of several lengths; padding is no work."""
    model, usage = Scored(decoder, budget), decoder.skipping.usage
    answers = [ids(size, 60 + number) for number, size in enumerate(sizes)]
    usage.clear()
    found = model.answer_logits(CONTEXTS[:3], answers)
    assert usage.seen == 17 + sum(sizes) - 3
    thresholds = None if budget is None else decoder.grid[budget]
    for logits, context, answer in zip(found, CONTEXTS[:3], answers, strict=True):
        assert logits.shape == (len(answer), 512)
        own = torch.tensor(answer)
        score = float(logits.log_softmax(-1).gather(1, own[:, None]).sum())
        wanted, _ = alone(decoder, thresholds, context, answer)
        assert score == pytest.approx(wanted, abs=1e-4)
