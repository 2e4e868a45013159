"""Perplexity, distance and task scores, each against the plainest way of computing it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compose import assets
from compose.analysis.intervals import wilson
from compose.bench.quality import continuations, text
from compose.errors import StepError, UserError


class Plain:
    """A transformers model as a ScoredModel; it counts the tokens it is given."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device = torch.device("cpu")
        self.rows: list[int] = []
        self.head_tokens = 0

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        self.rows += [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths.tolist()
        found: Tensor = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return found

    def head(self, hidden: Tensor) -> Tensor:
        self.head_tokens += hidden.numel() // hidden.shape[-1]
        logits: Tensor = self.model.lm_head(hidden)
        if cap := getattr(self.model.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """Log-probabilities [S, V], all at once."""
        found: Tensor = self.model(torch.tensor([ids])).logits[0]
        return found.float().log_softmax(-1)


@pytest.fixture
def model(tiny_llama: Path) -> Plain:
    return Plain(tiny_llama)


def _blocks(count: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (count, length), generator=generator)


# ---------------------------------------------------------------- on text


def test_perplexity_is_the_models_own_loss(model: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "HEAD_CHUNK", 7)  # chunks that do not divide the length
    blocks = _blocks(3, 32)
    scores = text.score_blocks(model, blocks)
    with torch.inference_mode():
        loss = float(model.model(blocks, labels=blocks).loss)
    assert scores.tokens == 3 * 31
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_model_is_at_no_distance_from_itself(model: Plain, tmp_path: Path) -> None:
    blocks, path = _blocks(3, 20), tmp_path / "deep" / "reference.safetensors"
    own, kept = text.score_reference(model, blocks, batch_size=2)
    text.store(kept, path)
    assert own.perplexity == pytest.approx(text.score_blocks(model, blocks).perplexity, rel=1e-6)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    hidden = text.load_blocks(text.load_stored(path), blocks)
    assert hidden.shape == (3, 20, 64)
    scores = text.score_blocks(model, blocks, (hidden, model.head))
    assert scores.kl == pytest.approx(0, abs=1e-6) and scores.agreement == 1


def test_distance_to_another_model(model: Plain, make_tiny: Any, tmp_path: Path) -> None:
    blocks = _blocks(2, 20)
    dense = Plain(make_tiny("llama", seed=1))
    text.store(text.score_reference(dense, blocks)[1], tmp_path / "r")
    hidden = text.load_blocks(text.load_stored(tmp_path / "r"), blocks)
    reports: list[tuple[int, int, str]] = []
    scores = text.score_blocks(
        model, blocks, (hidden, dense.head), batch_size=2, progress=lambda *a: reports.append(a)
    )
    target = torch.stack([dense.logits(row) for row in blocks.tolist()])
    found = torch.stack([model.logits(row) for row in blocks.tolist()])
    wanted = torch.nn.functional.kl_div(found, target, log_target=True, reduction="none").sum(-1)
    assert scores.kl == pytest.approx(float(wanted.mean()), rel=1e-4)
    same = (target.argmax(-1) == found.argmax(-1)).float().mean()
    assert scores.agreement == pytest.approx(float(same))
    assert reports == [(2, 2, "scoring text")]


def test_a_reference_belongs_to_its_blocks(model: Plain, tmp_path: Path) -> None:
    blocks = _blocks(2, 20)
    text.store(text.score_reference(model, blocks)[1], tmp_path / "r")
    with pytest.raises(StepError, match="other text"):
        text.load_blocks(text.load_stored(tmp_path / "r"), _blocks(2, 20, seed=1))
    with pytest.raises(StepError, match="cannot read"):
        text.load_blocks(text.load_stored(tmp_path / "absent"), blocks)
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(StepError, match="cannot read"):
        text.load_blocks(text.load_stored(tmp_path / "broken"), blocks)
    hidden = text.load_blocks(text.load_stored(tmp_path / "r"), blocks)
    with pytest.raises(StepError, match=r"\[2, 20\] positions, but \[2, 10\]"):
        text.score_blocks(model, blocks[:, :10], (hidden, model.head))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_head_is_read_without_its_model(family: str, make_tiny: Any) -> None:
    folder = make_tiny(family)
    model = Plain(folder)
    ids = _blocks(1, 12)
    with torch.inference_mode():
        hidden = model.hidden(ids, None)
        wanted = model.model(ids).logits
    torch.testing.assert_close(text.load_head(folder)(hidden), wanted)


# ---------------------------------------------------------------- continuations


def _direct(model: Plain, context: list[int], ending: list[int]) -> tuple[float, bool]:
    rows = model.logits((context + ending)[:-1])[-len(ending) :]
    picked = rows.gather(1, torch.tensor(ending)[:, None])
    return float(picked.sum()), bool((rows.argmax(-1) == torch.tensor(ending)).all())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_continuations_one_by_one(
    model: Plain, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "HEAD_CHUNK", 5)
    words = _blocks(6, 12).tolist()
    pairs = [
        (words[0], words[1]),
        (words[0], words[1][:4]),  # begins the one above
        (words[0], [5]),
        (words[0], [6]),
        ([1], words[2]),
        (words[3] + words[4], words[5][:2]),
    ]
    greedy = model.logits(words[0])[-1].argmax().item()
    pairs.append((words[0], [int(greedy)]))
    found = continuations.score_continuations(model, pairs, batch_size=batch_size, max_length=512)
    for pair, (value, is_greedy) in zip(pairs, found, strict=True):
        wanted, wanted_greedy = _direct(model, *pair)
        assert value == pytest.approx(wanted, abs=1e-3)
        assert is_greedy == wanted_greedy
    assert found[-1][1] is True


def test_shared_beginnings_run_once(model: Plain) -> None:
    context = list(range(10, 40))
    pairs = [(context, [50, 51, 52]), (context, [50, 51]), (context, [60]), (context, [61])]
    continuations.score_continuations(model, pairs, batch_size=8, max_length=512)
    assert model.rows == [32]
    assert model.head_tokens == 3 + 2 + 1 + 1


def test_batches_are_of_like_lengths(model: Plain) -> None:
    pairs = [([number], list(range(20, 20 + length))) for number, length in enumerate((9, 2, 5, 3))]
    continuations.score_continuations(model, pairs, batch_size=2, max_length=512)
    assert model.rows == [9, 5, 3, 2]


def test_long_inputs_lose_their_beginning(model: Plain) -> None:
    context, ending = list(range(100, 150)), [7, 8, 9]
    (found,) = continuations.score_continuations(
        model, [(context, ending)], batch_size=1, max_length=10
    )
    assert found[0] == pytest.approx(_direct(model, context[-8:], ending)[0], abs=1e-3)


def test_folding() -> None:
    inputs = [[1, 2], [1, 2, 3], [2], [1], [1, 2]]
    rows, row_of = continuations.fold_prefixes(inputs)
    assert sorted(rows) == [[1, 2, 3], [2]]
    assert all(rows[row][: len(ids)] == ids for ids, row in zip(inputs, row_of, strict=True))


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0, 0, 0, 1)],
)
def test_wilson(share: float, n: int, low: float, high: float) -> None:
    assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def _questions(folder: Path, count: int = 8) -> None:
    words = ["licence", "notice", "patent", "work", "rights", "source", "terms", "duty"]
    rows = [
        {
            "id": str(number),
            "question": f"What grants {words[number % 8]}?",
            "choices": [f"the {word}" for word in (words[number % 8], "contributor", "the grant")],
            "answer": number % 3,
        }
        for number in range(count)
    ]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "arc_easy_test.jsonl").write_text(lines, encoding="utf-8")
    story = [{"context": f"the {word} of the {word}", "continuation": word} for word in words]
    lines = "\n".join(map(json.dumps, story))
    (folder / "lambada_openai_test.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local copies of two small tasks, and a folder for the cache."""
    _questions(tmp_path)
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    return tmp_path / "cache"


def test_tasks_score_as_lm_eval_does(model: Plain, questions: Path) -> None:
    """The same questions through lm-eval's own model class: equal answers, equal scores."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from compose.bench.quality import tasks

    scores = tasks.run_tasks(model, ["arc_easy", "lambada_openai"], limit=6, cache=questions)
    assert {name: (score.metric, score.n) for name, score in scores.items()} == {
        "arc_easy": ("acc_norm", 6),
        "lambada_openai": ("acc", 6),
    }
    assert scores["arc_easy"].data == "path:arc_easy_test.jsonl"
    for score in scores.values():
        assert len(score.outcomes) == 6 and score.kind == "likelihood"
        assert score.value == pytest.approx(sum(score.outcomes) / 6)
    low, high = scores["arc_easy"].ci95
    assert low < scores["arc_easy"].value < high or scores["arc_easy"].value in (0, 1)

    folder = questions / "definitions"
    folder.mkdir()
    tasks._define("arc_easy", folder, questions)
    samples = []
    for lm in (
        tasks.Scorer(model, batch_size=4),
        HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4, max_length=512),
    ):
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=["arc_easy"],
            bootstrap_iters=0,
            task_manager=tasks._manager(folder, ["arc_easy"]),
        )
        samples.append(found["samples"]["arc_easy"])
    for ours, theirs in zip(*samples, strict=True):
        assert ours["acc_norm"] == theirs["acc_norm"]
        for mine, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert float(mine[0]) == pytest.approx(float(other[0]), abs=1e-3)
            assert str(mine[1]) == str(other[1])


def test_outcomes_pair_only_where_the_same_was_asked(
    model: Plain, make_tiny: Any, questions: Path
) -> None:
    from compose.bench.quality import tasks

    asked = partial(tasks.run_tasks, tasks=["arc_easy"], cache=questions)
    one, other = asked(model, limit=4), asked(Plain(make_tiny("llama", seed=1)), limit=4)
    assert one["arc_easy"].questions == other["arc_easy"].questions
    assert one["arc_easy"].questions != asked(model, limit=3)["arc_easy"].questions


def test_the_metric_of_a_filtered_task() -> None:
    from compose.bench.quality import tasks

    gsm8k = {
        "alias": "gsm8k",
        "exact_match,flexible-extract": 0.5,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
    }
    assert tasks._metric_of("gsm8k", gsm8k) == ("exact_match", "flexible-extract")
    assert tasks._metric_of("x", {"acc,none": 0.5, "acc_norm,none": 0.25}) == ("acc_norm", "none")
    with pytest.raises(UserError, match="no accuracy, only perplexity"):
        tasks._metric_of("lambada", {"perplexity,none": 3.0})


def test_the_interval_of_scores_between_zero_and_one() -> None:
    from compose.bench.quality import tasks

    assert tasks.score_interval(0.5, [0, 1, 1, 0]) == wilson(0.5, 4)
    low, high = tasks.score_interval(0.5, [0.4, 0.6] * 50)
    assert 0.4 < low < 0.5 < high < 0.6


def test_rolling_is_the_sum_over_windows(model: Plain) -> None:
    from lm_eval.api.instance import Instance

    from compose.bench.quality import tasks

    scorer = tasks.Scorer(model, batch_size=2)
    sentences = "Each contributor grants you a licence. " * 3
    ids = [scorer.prefix_token_id, *scorer.tok_encode(sentences)]
    request = Instance("loglikelihood_rolling", {}, (sentences,), 0)
    (whole,) = scorer.loglikelihood_rolling([request])
    assert whole == pytest.approx(_direct(model, ids[:1], ids[1:])[0], abs=1e-2)
    scorer.max_length = 8
    (cut,) = scorer.loglikelihood_rolling([request])
    assert cut != pytest.approx(whole, abs=1e-2) and cut < 0


def test_tasks_that_are_not_offered(model: Plain, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from compose.bench.quality import tasks

    assert tasks.run_tasks(model, [], cache=tmp_path) == {}
    asked = Instance("generate_until", {}, ("q", {}), 0, metadata=("gsm8k", 0, 1))
    with pytest.raises(NotImplementedError, match="gsm8k: this model cannot generate"):
        tasks.Scorer(model, batch_size=1).generate_until([asked])


@pytest.mark.slow
def test_an_unknown_task(model: Plain, tmp_path: Path) -> None:
    from compose.bench.quality import tasks

    with pytest.raises(UserError, match="no task 'arc_eezy': did you mean 'arc_easy'"):
        tasks.run_tasks(model, ["arc_eezy"], cache=tmp_path)


@pytest.mark.real
def test_the_real_model_is_above_chance(smollm2: Path) -> None:
    from compose.bench.quality import tasks

    cache = assets.default_cache()
    model = Plain(smollm2)
    scores = tasks.run_tasks(model, ["arc_easy", "piqa"], limit=24, cache=cache)
    assert scores["arc_easy"].metric == scores["piqa"].metric == "acc_norm"
    assert scores["arc_easy"].value > 0.3 and scores["piqa"].value > 0.5
    heldout = assets.load_texts("heldout-text", cache=cache)
    found = text.score_blocks(model, assets.token_blocks(heldout, model.tokenizer, 256, 4))
    assert found.tokens == 1020 and 8 < found.perplexity < 60
