"""Log-probabilities of continuations of a context, for multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compose.bench.quality.text import ScoredModel, head_chunks, log_probs
from compose.units import Progress

Pair = tuple[list[int], list[int]]
"""Token ids of a context, and of the continuation whose probability is computed."""


@runtime_checkable
class BranchingModel(ScoredModel, Protocol):
    """A model that can prefill a context once for all its continuations."""

    parts: bool
    """Whether contexts and their continuations are computed differently, so that every context is
    prefilled by itself."""

    def branch(
        self, contexts: Sequence[list[int]], endings: Sequence[list[int]], owner: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after each context [G, H], and of each ending's tokens [R, E, H].

        Ending r follows the context `owner[r]`; endings are padded on the right, and may be empty.
        """


def score_continuations(
    model: ScoredModel,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    max_length: int,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """For each pair log P(continuation | context), and whether greedy decoding would write it.

    Inputs longer than `max_length` lose their beginning. An input that is a prefix of another is
    not run by itself: its scores are taken from the longer one, since later tokens cannot change
    them. Batches have similar lengths, and logits are computed only for the continuations' tokens.
    A `BranchingModel` prefills a context once for all its continuations.
    """
    families: list[list[int]] = []
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    done = 0
    with torch.inference_mode():
        if isinstance(model, BranchingModel):
            families = share_contexts(pairs, max_length, least=1 if model.parts else 2)
            for start in range(0, len(families), batch_size):
                batch = families[start : start + batch_size]
                for pair, score in _score_families(model, pairs, batch):
                    scores[pair] = score
                done += sum(map(len, batch))
                if progress is not None:
                    progress(done, len(pairs), "scoring answers")
        alone = sorted(set(range(len(pairs))).difference(*families))
        for pair, score in _score_rows(model, pairs, alone, batch_size, max_length):
            scores[pair] = score
            done += 1
            if progress is not None:
                progress(done, len(pairs), "scoring answers")
    return scores


def share_contexts(pairs: Sequence[Pair], max_length: int, least: int = 2) -> list[list[int]]:
    """Groups of pairs that share a context and fit the model whole, of at least `least` pairs, the
    longest context first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, ending) in enumerate(pairs):
        if context and len(context) + len(ending) <= max_length:
            groups.setdefault(tuple(context), []).append(index)
    shared = [(len(key), group) for key, group in groups.items() if len(group) >= least]
    return [group for _, group in sorted(shared, key=lambda pair: -pair[0])]


def _score_families(
    model: BranchingModel, pairs: Sequence[Pair], families: Sequence[list[int]]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Scores of pairs that share contexts, group by group: each context is run once."""
    order = [pair for family in families for pair in family]
    owner = [number for number, family in enumerate(families) for _ in family]
    contexts = [pairs[family[0]][0] for family in families]
    after, within = model.branch(contexts, [pairs[pair][1][:-1] for pair in order], owner)
    for row, pair in enumerate(order):
        ending = pairs[pair][1]
        hidden = torch.cat((after[owner[row]].unsqueeze(0), within[row, : len(ending) - 1]))
        values, greedy = _score_places(
            model, hidden.unsqueeze(0), [(0, place) for place in range(len(ending))], ending
        )
        yield pair, (sum(values), all(greedy))


def _score_rows(
    model: ScoredModel,
    pairs: Sequence[Pair],
    chosen: Sequence[int],
    batch_size: int,
    max_length: int,
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Scores of the `chosen` pairs, each run as a row or taken from a longer row."""
    inputs = [(pairs[pair][0] + pairs[pair][1])[:-1][-max_length:] for pair in chosen]
    rows, row_of = fold_prefixes(inputs)
    asks: list[list[int]] = [[] for _ in rows]  # row -> the inputs that are read off it
    for index, row in enumerate(row_of):
        asks[row].append(index)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        hidden = model.hidden(*_pad([rows[row] for row in batch], model.device))  # [B, S, H]
        places: list[tuple[int, int]] = []  # (row in the batch, position) of each scored token
        targets: list[int] = []
        endings = [(place, index) for place, row in enumerate(batch) for index in asks[row]]
        counts = []
        for place, index in endings:
            ending, end = pairs[chosen[index]][1], len(inputs[index])
            tokens = ending[-end:]  # all of it, unless it is longer than the model allows
            places += [(place, end - len(tokens) + offset) for offset in range(len(tokens))]
            targets += tokens
            counts.append(len(tokens))
        values, greedy = _score_places(model, hidden, places, targets)
        first = 0
        for (_, index), count in zip(endings, counts, strict=True):
            part = slice(first, first + count)
            yield chosen[index], (sum(values[part]), all(greedy[part]))
            first += count


def fold_prefixes(inputs: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Rows to run, and for each input the row that begins with it."""
    rows: list[list[int]] = []
    row_of = [0] * len(inputs)
    # In reverse lexical order, an input comes right after the inputs that it is a prefix of.
    for index in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        ids = inputs[index]
        if not rows or rows[-1][: len(ids)] != ids:
            rows.append(ids)
        row_of[index] = len(rows) - 1
    return rows, row_of


def _pad(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, S] padded on the right by zeros, and lengths [B]."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)


def _score_places(
    model: ScoredModel, hidden: Tensor, places: list[tuple[int, int]], targets: list[int]
) -> tuple[list[float], list[bool]]:
    """Log-probability of each target at its place (row, position) of [B, S, H], and whether it is
    the argmax."""
    values: list[float] = []
    greedy: list[bool] = []
    index = torch.tensor(places, device=hidden.device).view(-1, 2)
    target_ids = torch.tensor(targets, device=hidden.device)
    for part in head_chunks(len(targets)):
        picked = hidden[index[part, 0], index[part, 1]]  # [C, H]
        predicted = log_probs(model.head(picked))  # [C, V]
        values += predicted.gather(1, target_ids[part, None])[:, 0].tolist()
        greedy += (predicted.argmax(-1) == target_ids[part]).tolist()
    return values, greedy
