"""One cell under measurement: a model folder, decoded in one way, in one process.

The runner asks for `load`, then `quality` or `lossless`, and `speed` once a round. Each answer is a
part of the cell's result as the design's skeleton names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gateskip
from compose.assets import TASKS, first_available, load_texts, overlaps, token_blocks
from compose.bench.text import (
    ScoredModel,
    load_head,
    load_reference,
    save_reference,
    score_blocks,
)
from compose.errors import AssetError, StepError
from compose.memory import peak_bytes, reset_peak
from gateskip.calibration.insight import look, summarize
from gateskip.decoding.decoder import Decoder, Generation, Mode, Stats
from gateskip.model.compute import Saving, Usage, Work
from gateskip.runtime.native import MOST_ROWS

BLOCK = 512  # tokens of a block on which perplexity is measured
WARM_TOKENS = 16  # decoded once at each batch size before anything is timed
ROUNDING_TOKENS = 129  # on which the engine's rounding is compared
INSIGHT_BLOCKS = 2  # of the perplexity's text, on which the gates are looked at
FORCED_DRAFT = 3
"""Draft length of the lossless check where the cell says `auto`: it must draft to count."""


@dataclass(frozen=True)
class CellJob:
    """All that a cell's process is told."""

    name: str
    folder: Path
    baseline_folder: Path
    decode: Mapping[str, Any] | None
    """Parameters of the decode stage, None for plain decoding."""
    benchmark: Mapping[str, Any]
    """The pipeline's benchmark section."""
    seed: int
    dtype: str
    asset_cache: Path
    reference: Path
    """Where the baseline's hidden states are, or are to be put."""
    threads: int | None
    learns_from: Sequence[tuple[str, int | None]] = ()
    """Of the baseline only: source and row limit of each text that a stage of the plan reads."""


class CellBench:
    """Measures the cell that `job` describes."""

    def __init__(self, job: CellJob) -> None:
        self.job = job
        self.settings = dict(job.decode or {"use": "plain"})
        self.mode: Mode = self.settings.pop("use")
        self._warm: set[int] = set()  # batch sizes that were run before
        self._timed = False
        if job.threads is not None:
            torch.set_num_threads(job.threads)

    @cached_property
    def decoder(self) -> Decoder:
        """The cell's model, ready to decode."""
        decoder: Decoder = gateskip.load(self.job.folder, self.job.dtype)
        budget = self.settings.get("budget", self.settings.get("draft_budget"))
        if budget is not None:
            try:
                decoder.thresholds(budget)
            except ValueError as error:
                raise StepError(f"{self.mode}: {error}") from error
        return decoder

    def load(self) -> dict[str, Any]:
        """Sizes in bytes: the folder on disk, and the weights in memory."""
        decoder = self.decoder
        sizes = {
            "disk_bytes": disk_bytes(self.job.folder),
            "resident_bytes": resident_bytes(decoder.skipping.model, decoder.skipping.gates),
        }
        engine = decoder.skipping.engine
        name = "native, rounded" if engine and engine.rounded else "native"
        if engine is None:
            name = f"torch: {decoder.unsuited}" if decoder.unsuited else "torch"
        return {
            "size": sizes,
            "kernels": decoder.kernels,
            "kernel_times_us": decoder.kernel_times,
            "engine": name,
        }

    # -- quality -------------------------------------------------------------------------------

    def quality(self, reference: Path) -> dict[str, Any]:
        """Perplexity, distance to the baseline, tasks, and compute saved on the same text."""
        wanted = self.job.benchmark["quality"]
        model = Scored(self.decoder, self.settings["budget"] if self.mode == "skip" else None)
        found: dict[str, Any] = {}
        if wanted["perplexity"]:
            found |= self._on_text(model, wanted, reference)
        if wanted["tasks"]:
            from compose.bench.tasks import run_tasks  # loads lm-eval

            scores = run_tasks(
                model,
                wanted["tasks"],
                limit=wanted["limit"],
                batch_size=wanted["batch_size"],
                cache=self.job.asset_cache,
            )
            found["tasks"] = {name: asdict(score) for name, score in scores.items()}
        if self.job.learns_from:
            found |= self._overlap(found, wanted)
        return found

    def _overlap(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Whether training texts hold what is scored, and a note for each that does."""
        texts = [found["perplexity"]["dataset"]] if "perplexity" in found else []
        tasks = [name for name in wanted["tasks"] if name in TASKS]
        cache = self.job.asset_cache
        shared = overlaps(self.job.learns_from, texts, tasks, wanted["limit"], cache)
        notes = [
            f"{each['tainted']} of {each['rows']} rows of {name} share thirteen words in a row"
            " with a text that stages learn from"
            for name, each in shared.items()
            if each["tainted"]
        ]
        notes = [*found.get("notes", ()), *notes]
        return {"overlap": shared} | ({"notes": notes} if notes else {})

    def _on_text(self, model: Scored, wanted: Mapping[str, Any], reference: Path) -> dict[str, Any]:
        texts = first_available(wanted["perplexity"], None, self.job.asset_cache)
        count = max(1, wanted["perplexity_tokens"] // BLOCK)
        blocks = token_blocks(texts, self.decoder.tokenizer, BLOCK, count)
        usage = self.decoder.skipping.usage
        usage.clear()
        if self.job.folder == self.job.baseline_folder and self.mode == "plain":
            scores, near = save_reference(model, blocks, reference), {}
        else:
            dense = load_reference(reference, blocks), load_head(self.job.baseline_folder)
            scores = score_blocks(model, blocks, dense)
            near = {"kl_to_baseline": scores.kl, "greedy_agreement": scores.agreement}
        perplexity = {
            "dataset": texts.name,
            "value": scores.perplexity,
            "tokens": scores.tokens,
            "origin": texts.origin,
        }
        found: dict[str, Any] = {"perplexity": perplexity, **near}
        if texts.name != wanted["perplexity"][0]:
            found["notes"] = [
                f"perplexity: {wanted['perplexity'][0]} could not be had here, "
                f"so {texts.name} stands in"
            ]
        if self.mode != "speculate":  # which saves time, not work
            found["compute"] = self._saved(usage)
        if (distance := self._rounding(blocks[:1, :ROUNDING_TOKENS])) is not None:
            found["kl_of_rounding"] = distance
        if model.levels is not None:
            found["insight"] = self._insight(blocks[:INSIGHT_BLOCKS], model.levels)
        return found

    def _rounding(self, ids: Tensor) -> float | None:
        """KL from these weights as they are scored to the same as they are decoded, on ids [1, S].

        Text is scored in torch; the engine decodes with rounded activations, or this is None.
        """
        skipping, engine = self.decoder.skipping, self.decoder.skipping.engine
        if engine is None or not engine.rounded:
            return None
        with torch.inference_mode():
            cache = skipping.new_cache(1, ids.shape[1])
            found = [skipping.forward(ids[:, :1], cache, [0])]
            for start in range(1, ids.shape[1], MOST_ROWS):
                found.append(skipping.forward(ids[:, start : start + MOST_ROWS], cache, [start]))
            decoded = torch.cat([skipping.head(part[0]) for part in found]).log_softmax(-1)
            skipping.engine = None
            try:
                scored = skipping.head(skipping.forward(ids, cache, [0])[0]).log_softmax(-1)
            finally:
                skipping.engine = engine
        return float((scored.exp() * (scored - decoded)).sum(-1).mean())

    def _insight(self, blocks: Tensor, levels: Sequence[float]) -> dict[str, Any]:
        """Who gets how much compute, on a few blocks [N, S] of the same text."""
        skipping, tokenizer = self.decoder.skipping, self.decoder.tokenizer
        assert skipping.gates is not None, "thresholds come with gates"
        rows = [row.tolist() for row in blocks]
        return summarize(
            [
                look(skipping.model, skipping.gates, tokenizer, row, levels, skipping.kv_rule)
                for row in rows
            ]
        )

    def _saved(self, usage: Usage) -> dict[str, Any]:
        saved = self._saving(usage)
        found: dict[str, Any] = {
            "saved_gross": saved.gross,
            "saved_net": saved.net,
            "saved_model": saved.model,
        }
        if self.mode == "skip":
            found["kept_shares"] = [round(share, 4) for share in usage.shares()]
        return found

    def _saving(self, usage: Usage) -> Saving:
        """Of the dense model's multiply-adds, those that the cell did not spend."""
        budget = self.settings["budget"] if self.mode == "skip" else 1.0
        return self.decoder.saved(usage, budget, dense_work(self.job.baseline_folder))

    # -- losslessness --------------------------------------------------------------------------

    def lossless(self) -> dict[str, Any]:
        """Speculation against plain decoding, token for token, one prompt at a time.

        Drafting is forced here where the cell would set its draft length itself: a decoder that
        falls back to plain steps would pass without having shown anything.
        """
        wanted = self.job.benchmark["lossless"]
        prompts = self._prompts(wanted["source"], wanted["prompts"])
        length = self.settings["draft_length"]
        settings = self.settings | {"draft_length": FORCED_DRAFT if length == "auto" else length}
        compared, total = 0, Stats()
        divergences: list[dict[str, Any]] = []
        target = self.settings["target"]
        batched = self.decoder.generate(prompts, wanted["new_tokens"], target=target).tokens
        for number, prompt in enumerate(prompts):
            plain = batched[number]
            own = self.decoder.generate([prompt], wanted["new_tokens"], self.mode, **settings)
            total.add(own.stats)
            compared += len(plain)
            if own.tokens[0] != plain:  # a batch rounds in another order: ask the row by itself
                alone = self.decoder.generate([prompt], wanted["new_tokens"], target=target)
                plain = alone.tokens[0]
            divergence = self._divergence(number, prompt, plain, own.tokens[0])
            divergences += [divergence] if divergence else []
        return {
            "lossless": not divergences,
            "first_divergence": divergences[0] if divergences else None,
            "divergences": divergences,
            "prompts": len(prompts),
            "tokens": compared,
            "acceptance_rate": total.acceptance_rate,
            "mean_accepted_tokens": total.mean_accepted_tokens,
            "acceptance_by_position": [stood / tried for tried, stood in total.positions],
            "looked_up_share": total.looked_up / total.drafted if total.drafted else None,
            "draft_length_histogram": total.draft_lengths,
            "checked_draft_length": settings["draft_length"],
        }

    def _divergence(
        self, number: int, prompt: list[int], plain: list[int], own: list[int]
    ) -> dict[str, Any] | None:
        """Where two continuations first differ, and plain decoding's top-2 logit margin there."""
        if plain == own:
            return None
        pairs = zip(plain, own, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(own)))
        ids = torch.tensor([prompt + plain[:same]])
        skipping = self.decoder.skipping
        hidden = skipping.forward(ids, skipping.new_cache(1, ids.shape[1]), [0])
        with torch.inference_mode():
            logits = skipping.head(hidden[0, -1]).float()
        best, second = logits.topk(2).values.tolist()
        return {
            "prompt": number,
            "position": same,
            "plain_token": plain[same] if same < len(plain) else None,
            "speculative_token": own[same] if same < len(own) else None,
            "margin": best - second,
            "margin_share": (best - second) / (best - float(logits.min())),
        }

    def _prompts(self, source: str, count: int) -> list[list[int]]:
        """Prompts as token ids, through the chat template where there is one."""
        from compose.bench.generate import prompt_ids

        data = load_texts(source, count, self.job.asset_cache)
        texts = data.prompts or data.rows
        if len(texts) < count:
            raise AssetError(f"{source} has {len(texts)} prompts, but {count} are asked for")
        return [prompt_ids(self.decoder.tokenizer, text) for text in texts[:count]]

    # -- speed ---------------------------------------------------------------------------------

    def speed(self, round: int, batch: int, threads: int) -> dict[str, Any]:
        """One repeat at a batch size; the first at each batch size warms up before it measures."""
        wanted = self.job.benchmark["speed"]
        if not self._timed:
            self._timed = True
            torch.set_num_threads(self.job.threads or threads)
            self.decoder.paces.clear()  # learned with other threads
            reset_peak()
        prompts = self._text_prompts(batch, wanted["prompt_tokens"])
        if batch not in self._warm:
            self._warm.add(batch)
            self._generate(prompts, WARM_TOKENS)
        usage = self.decoder.skipping.usage
        usage.clear()
        stats = self._generate(prompts, wanted["new_tokens"]).stats
        decoded = stats.new_tokens - batch  # the first token of each row comes out of prefill
        numbers: dict[str, Any] = {
            "prefill_tokens_per_s": stats.prompt_tokens / stats.prefill_s,
            "decode_tokens_per_s": decoded / stats.decode_s if decoded else None,
            "ttft_s": stats.ttft_s,
            "peak_bytes": peak_bytes(),
        }
        if self.mode == "skip":
            numbers["compute"] = {"saved_net_while_timed": self._saving(usage).net}
        if self.mode == "speculate":
            numbers["speculation"] = {
                "draft_s": stats.draft_s,
                "verify_s": stats.verify_s,
                "timed_draft_lengths": stats.draft_lengths,
            }
        return numbers

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        return self.decoder.generate(prompts, new_tokens, self.mode, **self.settings)

    def _text_prompts(self, batch: int, length: int) -> list[list[int]]:
        """Running text of an exact length: what is timed does not hang on how prompts end."""
        texts = load_texts("heldout-text", None, self.job.asset_cache)
        blocks: Tensor = token_blocks(texts, self.decoder.tokenizer, length, batch)
        return [row.tolist() for row in blocks]


class Scored(ScoredModel):
    """The cell as quality.py sees it: hidden states that were made while skipping."""

    def __init__(self, decoder: Decoder, budget: float | None) -> None:
        self.decoder, self.budget = decoder, budget
        self.levels = None if budget is None else decoder.thresholds(budget)

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return self.decoder.skipping.device

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return self.decoder.tokenizer

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> final hidden states [B, S, H]."""
        skipping = self.decoder.skipping
        cache = skipping.new_cache(*input_ids.shape)
        counts = None if lengths is None else lengths.tolist()
        return skipping.forward(input_ids, cache, [0] * len(input_ids), self.levels, counts)

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations, decoded as the cell decodes."""
        mode: Mode = "plain" if self.levels is None else "skip"
        budget = 1.0 if self.budget is None else self.budget
        return self.decoder.generate(prompts, new_tokens, mode, budget, eos=stop_tokens).tokens

    def branch(
        self, contexts: Sequence[list[int]], endings: Sequence[list[int]], owner: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after each context [G, H], and of each ending's tokens [R, E, H]."""
        skipping, lengths = self.decoder.skipping, [len(context) for context in contexts]
        room = max(lengths) + max(map(len, endings))
        cache = skipping.new_cache(len(contexts), room)
        zeros = [0] * len(contexts)
        read = skipping.forward(
            _padded(contexts).to(self.device), cache, zeros, self.levels, lengths
        )
        after = read[torch.arange(len(contexts)), torch.tensor(lengths) - 1]
        copies = cache.rows(owner)
        starts = [lengths[number] for number in owner]
        ids = _padded(endings).to(self.device)
        if ids.shape[1] == 0:
            return after, read.new_zeros(len(owner), 0, read.shape[-1])
        counts = [len(ending) for ending in endings]
        return after, skipping.forward(ids, copies, starts, self.levels, counts)

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., H] -> logits [..., V]."""
        return self.decoder.skipping.head(hidden)


def _padded(rows: Sequence[list[int]]) -> Tensor:
    """Token ids [N, S], padded on the right by zeros."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)


@lru_cache
def dense_work(folder: Path) -> Work:
    """Multiply-adds of the model in a folder, whose weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return Work.of(AutoModelForCausalLM.from_config(config))


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files, gates included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident_bytes(*modules: Any) -> int:
    """Bytes of parameters and buffers, each storage counted once."""
    sizes: dict[int, int] = {}
    for module in modules:
        if module is None:
            continue
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
