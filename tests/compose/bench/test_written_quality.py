"""Quality by outcomes and by what is written, each number against one that is worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import cell_job
from torch import Tensor
from transformers import AutoTokenizer

from compose.assets.table import TASKS
from compose.bench.cell import CellBench
from compose.bench.quality import own_answers, text
from compose.bench.quality.continuations import score_continuations
from compose.bench.quality.own_answers import DenseAnswers, score_answers
from compose.bench.quality.scored import Scored, text_compute
from compose.bench.quality.squad import f1, process_results
from compose.language.schema import Benchmark, Quality
from compose.results.quality import Quality as QualityResult
from compose.results.quality import common_prefix


class Table:
    """A model of three words whose next-word probabilities are written down, word by word."""

    device = torch.device("cpu")
    tokenizer: Any = None

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = torch.tensor(rows)

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        return torch.nn.functional.one_hot(input_ids, 3).float()

    def head(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.rows).log()


EVEN = [[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]
SURE = [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]
HALF = 0.25 * math.log(2)  # KL of (1/2, 1/4, 1/4) to (1/4, 1/2, 1/4): half log 2 less a quarter


def test_perplexity_kl_and_agreement_by_hand() -> None:
    """Block one asks for words 0 1 2 after 0 0 1, block two for 0 0 0 after 2 2 2."""
    blocks = torch.tensor([[0, 0, 1, 2], [2, 0, 0, 0]])
    dense, cell = Table(EVEN), Table(SURE)
    own, kept = text.score_reference(dense, blocks)
    two, four = math.log(2), math.log(4)
    assert own.block_nll == pytest.approx(((two + four + four) / 3, two))
    assert own.perplexity == pytest.approx(math.exp((2 * four + 4 * two) / 6))
    assert own.kl is None and own.block_kl == ()
    scores = text.score_blocks(cell, blocks, (kept["hidden"], dense.head))
    # After word 0 the cell has 1/4, 1/2, 1/4, else it is the dense model.
    assert scores.block_nll == pytest.approx(((four + two + four) / 3, (two + four + four) / 3))
    assert scores.block_kl == pytest.approx((2 * HALF / 4, 3 * HALF / 4))
    assert scores.kl == pytest.approx(5 * HALF / 8)
    # Of 0 0 0 and five times HALF the middle of eight is HALF, and so is the 90th percentile.
    assert scores.kl_median == pytest.approx(HALF) and scores.kl_p90 == pytest.approx(HALF)
    assert scores.agreement == 3 / 8
    assert scores.tokens == 6


def test_percentiles_interpolate() -> None:
    blocks = torch.tensor([[0, 1, 1, 1, 1]])  # KL: HALF, 0, 0, 0, 0
    dense = Table(EVEN)
    _, kept = text.score_reference(dense, blocks)
    scores = text.score_blocks(Table(SURE), blocks, (kept["hidden"], dense.head))
    assert scores.kl_median == pytest.approx(0, abs=1e-7)
    assert scores.kl_p90 == pytest.approx(0.6 * HALF)  # place 3.6 of 0 to 4


def test_a_bfloat16_head_multiplies_in_float32(make_tiny: Any, tmp_path: Path) -> None:
    """Logits of the same weights in bfloat16 products differ by a percent: a KL of their own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = hidden.float() @ model.get_input_embeddings().weight.float().T
    torch.testing.assert_close(text.load_head(tmp_path)(hidden), wanted)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([4], [1], 0),
        ([], [1], 0),
    ],
)
def test_common_prefix(first: list[int], second: list[int], shared: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == shared


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("23 years", "23", 2 / 3),  # one of two words, one of one
        ("The Grotto.", "grotto", 1),  # articles, case and signs do not count
        ("in a wax comb", "wax combs", 0.4),  # wax: one of three, one of two
        ("red red blue", "red", 0.5),  # a word counts as often as both have it
        ("", "the", 1),  # nothing is left of either
        ("", "red", 0),
        ("blue", "red", 0),
    ],
)
def test_f1_as_squad_counts(answer: str, wanted: str, score: float) -> None:
    assert f1(answer, wanted) == pytest.approx(score)
    assert f1(wanted, answer) == pytest.approx(score)


def test_the_best_of_the_given_answers_counts() -> None:
    doc = {"answers": {"text": ["Saint Bernadette Soubirous", "Bernadette"]}}
    assert process_results(doc, ["Bernadette!"]) == {"f1": 1.0, "exact_match": 1.0}
    assert process_results(doc, ["Saint Bernadette"]) == {"f1": 0.8, "exact_match": 0.0}


class Answering:
    """Answers every prompt alike; led through an answer, it has the same doubt everywhere."""

    def __init__(self, answer: list[int], probabilities: list[float]) -> None:
        self.answer, self.logits = answer, torch.tensor([probabilities]).log()

    def generate(self, prompts: list[list[int]], new_tokens: int, stops: Any) -> list[list[int]]:
        return [self.answer[:new_tokens] for _ in prompts]

    def answer_logits(self, prompts: Any, answers: list[list[int]]) -> list[Tensor]:
        return [self.logits.expand(len(answer), -1) for answer in answers]


def test_distance_on_the_dense_models_answers_by_hand() -> None:
    """Two answers of 1 and 3 tokens; the dense model is even on the first, sure on the second."""
    head = Table([EVEN[0], SURE[0], EVEN[0]]).head
    states = torch.eye(3)
    dense = DenseAnswers([[9], [8]], [[0], [0, 1, 2]], [states[:1], states[1:2].expand(3, -1)])
    words = SimpleNamespace(decode=lambda row, skip_special_tokens: f" {row} ")
    record = score_answers(Answering([0, 1, 1], EVEN[0]), dense, head, 4, [], words)
    assert record["answer_kl"] == pytest.approx([0, HALF], abs=1e-6)
    assert record["kl"] == pytest.approx(3 * HALF / 4), "the mean is over tokens"
    assert record["prefixes"] == [1, 2] and record["common_prefix"] == 1.5
    assert (record["answers"], record["tokens"], record["max_tokens"]) == (2, 4, 4)
    assert record["texts"] == ["[0, 1, 1]", "[0, 1, 1]"]
    dense_part = own_answers.dense_record(dense, 4, words)
    assert dense_part["texts"] == ["[0]", "[0, 1, 2]"]
    assert dense_part["prefixes"] == [1, 3] and dense_part["kl"] == 0
    again = DenseAnswers.of(dense.tensors(), dense.prompts)
    assert again.answers == dense.answers
    for mine, theirs in zip(again.hidden, dense.hidden, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_led_answers_have_the_logits_of_decoding(tiny_llama: Path) -> None:
    """A pass over a whole answer equals the steps in which it was written."""
    import gateskip

    decoder = gateskip.load(tiny_llama, "float32")
    model = Scored(decoder, None)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    answers = model.generate(prompts, 6, [])
    answers[1] = answers[1][:1]  # one that ended at once
    for prompt, answer, logits in zip(
        prompts, answers, model.answer_logits(prompts, answers), strict=True
    ):
        assert logits.argmax(-1).tolist() == answer, "greedy answers are the likeliest tokens"
        whole = torch.tensor([prompt + answer[:-1]])
        wanted = decoder.skipping.model(whole).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- a cell's record


def _bench(folder: Path, base: Path, scratch: Path, dtype: str = "float32") -> CellBench:
    (scratch / "own.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What does clause {n} grant?"}) + "\n" for n in range(3))
    )
    (scratch / "scored.txt").write_text("Each contributor grants you a licence. " * 300)
    settings = Benchmark().model_dump(mode="json")
    asked = {"source": str(scratch / "own.jsonl"), "prompts": 3, "new_tokens": 5}
    settings["quality"] |= {"perplexity": [str(scratch / "scored.txt")], "own_answers": asked}
    settings["quality"] |= {"perplexity_tokens": 1024}
    return CellBench(
        cell_job(
            folder,
            scratch,
            baseline_folder=base,
            benchmark=settings,
            dtype=dtype,
            learns_from=[(str(scratch / "scored.txt"), None)] if folder == base else (),
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_cell_is_compared_on_the_same_text_and_answers(
    dtype: str, make_tiny: Any, tmp_path: Path
) -> None:
    dense, other = make_tiny("llama"), make_tiny("llama", seed=1)
    base = _bench(dense, dense, tmp_path, dtype).quality(tmp_path / "reference")
    assert len(base["perplexity"]["block_nll"]) == 2
    mean = sum(base["perplexity"]["block_nll"]) / 2
    assert base["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-5)
    floor = base["noise_floor"]
    assert floor["dtype"] == {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    assert 0 < floor["kl"] < 0.01 and floor["greedy_agreement"] > 0.9
    assert floor["ratio"] == pytest.approx(1, abs=0.01)
    assert base["own_answers"]["prefixes"] and base["own_answers"]["max_tokens"] == 5
    assert base["contamination"]["own.jsonl"]["rows"] == 3
    assert base["contamination"]["scored.txt"]["contaminated"] == 1
    assert "kl_to_baseline" not in base

    same = _bench(dense, dense, tmp_path, dtype)
    same.job = _bench(other, dense, tmp_path, dtype).job  # another cell with the same weights
    same.decoder = _bench(dense, dense, tmp_path, dtype).decoder
    record = same.quality(tmp_path / "reference")
    # In bfloat16 a cell's own logits have ties, which the reference in float32 has not.
    alike = {"float32": 1.0, "bfloat16": 0.97}[dtype]
    assert record["kl_to_baseline"] < 1e-4 and record["greedy_agreement"] >= alike
    assert record["own_answers"]["kl"] < 1e-4
    assert record["own_answers"]["prefixes"] == base["own_answers"]["prefixes"]
    assert "noise_floor" not in record

    far = _bench(other, dense, tmp_path, dtype).quality(tmp_path / "reference")
    assert far["kl_to_baseline"] == pytest.approx(sum(far["block_kl"]) / 2, rel=1e-3)
    assert far["kl_median"] < far["kl_p90"]
    assert far["own_answers"]["kl"] > 1 and len(far["own_answers"]["answer_kl"]) == 3
    assert far["own_answers"]["common_prefix"] < base["own_answers"]["common_prefix"]
    QualityResult.model_validate({k: v for k, v in far.items() if k not in ("compute", "notes")})


# ---------------------------------------------------------------- what skipping spent


@pytest.fixture
def gated(make_tiny: Any) -> Any:
    """A decoder whose budget of 0.5 skips some of the last MLP, and its attention before it."""
    from gateskip.decoding.decoder import Decoder
    from gateskip.gates.learned import ScalarGates
    from gateskip.quantization.folders import load_model
    from gateskip.runtime.skipping import SkippingModel

    folder = make_tiny("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gates = ScalarGates(8, 64).requires_grad_(False)
    gates.weight.normal_(generator=torch.Generator().manual_seed(0))
    grid = {0.5: [-math.inf] * 6 + [math.inf, 0.0]}
    return Decoder(SkippingModel(load_model(folder, "float32"), gates), tokenizer, grid)


def test_the_words_before_the_last_are_asked_for_it(
    gated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written LAMBADA by its outcomes, and what its prompts and answers were computed at."""
    from compose.bench.quality import tasks

    story = [{"text": "it was the king said Ann"}, {"text": "so he ate a well-known apple"}]
    lines = "".join(
        json.dumps(
            {"context": r["text"].rpartition(" ")[0]}
            | {"continuation": r["text"].rpartition(" ")[2]}
        )
        + "\n"
        for r in story
    )
    (tmp_path / "lambada_openai_test.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    asked: list[str] = []

    class Writes(Scored):
        def generate(self, prompts: Any, new_tokens: int, stop_tokens: Any) -> Any:
            asked.extend(map(self.tokenizer.decode, prompts))
            super().generate(prompts, new_tokens, stop_tokens)
            words = [
                " Ann, who" if "king" in self.tokenizer.decode(p) else " pear" for p in prompts
            ]
            return [self.tokenizer(word).input_ids for word in words]

    spent: list[tuple[str, dict[str, int]]] = []
    model = Writes(gated, 0.5, prompt="full")

    def written(task: str) -> None:
        spent.append((task, {phase: usage.seen for phase, usage in model.used.items()}))

    scores = tasks.run_tasks(
        model, ["lambada_written"], batch_size=1, cache=tmp_path / "cache", written=written
    )
    found = scores["lambada_written"]
    assert sorted(asked) == ["it was the king said", "so he ate a well-known"]
    assert (found.kind, found.metric) == ("generative", "exact_match")
    assert found.outcomes == (1.0, 0.0)
    assert [task for task, _ in spent] == ["lambada_written"] * 2
    assert spent[1][1]["answer"] <= 2 * 8, "the last token of a prompt predicts the first of eight"


def test_what_was_spent_is_told_phase_by_phase(gated: Any) -> None:
    model = Scored(gated, 0.5, prompt="full")
    prompts = [[5, 6, 7, 8], [9, 10]]
    answers = model.generate(prompts, 6, [])
    model.answer_logits(prompts, answers)
    spent = text_compute(model.used, gated, lambda usage: gated.saved(usage, 0.5))
    assert spent is not None and spent["prompt"] == {"tokens": 8, "kept": 1.0, "saved_net": 0.0}
    assert spent["answer"]["tokens"] == 24 and spent["answer"]["kept"] < 0.95
    assert spent["answer"]["kept"] < spent["kept"] < 1 and spent["tokens"] == 32
    assert text_compute({}, gated, lambda usage: gated.saved(usage, 0.5)) is None


@pytest.mark.parametrize("way", [{"prompt": "full"}, {"answer": "full"}])
def test_contexts_and_endings_are_phases(gated: Any, way: dict[str, Any]) -> None:
    """An ending that is ranked is computed as an answer is, its context as a prompt but for the
    last token, which predicts the ending's first: in the context's pass where answers are full."""
    model, usage = Scored(gated, 0.5, **way), gated.skipping.usage
    usage.clear()
    score_continuations(model, [([5, 6, 7], [8, 9, 10])], batch_size=2, max_length=64)
    assert usage.seen == 5 and usage.ungated == 2
    assert "prompt" in way or min(usage.kept) >= 4  # the first token, the last, and the ending's
    usage.clear()
    model.hidden(torch.tensor([[5, 6, 7]]), None)
    assert usage.ungated == 0, "running text is read at the budget"


# ---------------------------------------------------------------- what is asked


def test_no_mean_goes_without_a_written_task() -> None:
    assert Quality(tasks=("arc_easy",)).tasks == ("arc_easy", "arithmetic")
    assert Quality(tasks=("squad", "piqa")).tasks == ("squad", "piqa")
    assert Quality().tasks == ()
    assert Quality().own_answers is not None
    assert {name for name, task in TASKS.items() if task.writes} == {
        *("arithmetic", "squad", "lambada_written", "gsm8k_chat", "humaneval")
    }
