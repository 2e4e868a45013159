"""What compression costs: perplexity, distance to the dense model, and scores on tasks.

The model under test is anything that turns token ids into final hidden states and these into
logits, so one that skips branches is measured while it skips. Logits are made in chunks, and only
where they are needed: for a small model the LM head is a fifth of the work.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from compose.assets import TASKS, load_task
from compose.assets.fetch import Progress
from compose.assets.table import OURS
from compose.errors import AssetError, StepError, UserError, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD_CHUNK = 256  # tokens whose logits exist at once: 50 MB for a vocabulary of 49152
FALLBACK_LENGTH = 2048  # longest input where the tokenizer does not know the model's
METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has is reported
Z95 = 1.959964  # standard deviations on either side of a 95 % interval

Head = Callable[["Tensor"], "Tensor"]
"""Final hidden states [..., H] -> logits [..., V]."""


class ScoredModel(Protocol):
    """A model as this module sees it."""

    @property
    def device(self) -> torch.device:
        """Where its inputs must lie."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, as transformers gives it."""

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> final hidden states [B, S, H], which `head` takes.

        Rows are padded on the right; `lengths` [B] counts the tokens before the padding, None
        means that there is none. What stands at padded positions does not matter.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., H] -> logits [..., V]."""


class WritingModel(ScoredModel, Protocol):
    """A model that can also continue a prompt."""

    def write(
        self, prompts: Sequence[list[int]], new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations of prompts, each up to `new_tokens` or a token of `ends`."""


class BranchingModel(ScoredModel, Protocol):
    """A model that can read a context once for all that may follow it."""

    def branch(
        self, contexts: Sequence[list[int]], endings: Sequence[list[int]], owner: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after each context [G, H], and of each ending's tokens [R, E, H].

        Ending r follows the context `owner[r]`; endings are padded on the right, and may be empty.
        """


# ---------------------------------------------------------------- on text


@dataclass(frozen=True)
class BlockScores:
    """How a model predicts a text, and how near it is to the dense model there."""

    perplexity: float
    tokens: int
    """Predicted tokens: all but the first of each block."""
    kl: float | None = None
    """Mean over all positions of KL(dense || model), in nats."""
    agreement: float | None = None
    """Share of positions at which both would choose the same next token."""


def score_blocks(
    model: ScoredModel,
    blocks: Tensor,
    reference: tuple[Tensor, Head] | None = None,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
    keep: Callable[[Tensor], None] | None = None,
) -> BlockScores:
    """Run `blocks` [N, S] once and measure perplexity, and the distance to `reference` if given.

    `reference` is the dense model's final hidden states [N, S, H] and its head; `keep` is given
    the hidden states [B, S, H] of each batch.

    Raises:
        StepError: the reference was made from other blocks.
    """
    import torch

    if reference is not None and reference[0].shape[:2] != blocks.shape:
        raise StepError(
            f"the reference holds {list(reference[0].shape[:2])} positions, "
            f"but {list(blocks.shape)} are measured"
        )
    loss = distance = 0.0
    same = 0
    with torch.inference_mode():
        for start in range(0, len(blocks), batch_size):
            ids = blocks[start : start + batch_size].to(model.device)  # [B, S]
            hidden = model.hidden(ids, None)  # [B, S, H]
            if keep is not None:
                keep(hidden)
            dense = None if reference is None else reference[0][start : start + batch_size]
            for row, tokens in enumerate(ids):
                for part in _chunks(len(tokens)):
                    logits = _log_probs(model.head(hidden[row, part]))  # [C, V]
                    loss += _nll(logits, tokens[part.start + 1 : part.stop + 1])
                    if reference is not None and dense is not None:
                        near = dense[row, part].to(model.device)
                        target = _log_probs(reference[1](near))
                        distance += _kl(target, logits)
                        same += int((target.argmax(-1) == logits.argmax(-1)).sum())
            if progress is not None:
                progress(min(start + batch_size, len(blocks)), len(blocks), "scoring text")
    tokens_scored = len(blocks) * (blocks.shape[1] - 1)
    value = _exp(loss / tokens_scored)
    if reference is None:
        return BlockScores(value, tokens_scored)
    return BlockScores(value, tokens_scored, distance / blocks.numel(), same / blocks.numel())


def perplexity(model: ScoredModel, blocks: Tensor) -> tuple[float, int]:
    """exp of the mean loss over `blocks` [N, S], and the number N * (S - 1) of predicted tokens."""
    scores = score_blocks(model, blocks)
    return scores.perplexity, scores.tokens


def compare_reference(
    model: ScoredModel, blocks: Tensor, reference_hidden: Tensor, reference_head: Head
) -> tuple[float, float]:
    """Mean KL(dense || model) in nats, and the share of equal greedy choices, over `blocks` [N, S].

    Raises:
        StepError: the reference was made from other blocks.
    """
    scores = score_blocks(model, blocks, (reference_hidden, reference_head))
    assert scores.kl is not None and scores.agreement is not None
    return scores.kl, scores.agreement


def save_reference(
    model: ScoredModel, blocks: Tensor, path: Path, *, batch_size: int = 1
) -> BlockScores:
    """Store the final hidden states of `blocks` [N, S] as safetensors; the model's own perplexity.

    The file holds `hidden` [N, S, H] in the model's dtype and `blocks`; it appears whole.
    """
    import torch
    from safetensors.torch import save_file

    kept: list[Tensor] = []
    scores = score_blocks(
        model, blocks, batch_size=batch_size, keep=lambda hidden: kept.append(hidden.cpu())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({"hidden": torch.cat(kept).contiguous(), "blocks": blocks.cpu()}, partial)
    partial.replace(path)
    return scores


def load_reference(path: Path, blocks: Tensor) -> Tensor:
    """The hidden states [N, S, H] that save_reference stored for exactly these `blocks`.

    Raises:
        StepError: the file is absent or unreadable, or was made from other blocks.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
        hidden, theirs = stored["hidden"], stored["blocks"]
    except (OSError, SafetensorError, KeyError) as error:
        raise StepError(f"cannot read the reference {path}: {error}") from error
    if not torch.equal(theirs, blocks.cpu()):
        raise StepError(f"the reference {path} was made from other text")
    return hidden


def load_head(folder: Path) -> Head:
    """The LM head of an unquantized model folder, read without the rest of the model.

    Raises:
        StepError: the folder has no such weight.
    """
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", False)
    names = ("model.embed_tokens.weight",) if tied else ("lm_head.weight",)
    weight = _read_weight(folder, (*names, "lm_head.weight", "model.embed_tokens.weight"))
    softcap = config.get("final_logit_softcapping")
    scale = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = hidden.to(weight.dtype) @ weight.T * scale
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    return head


def _read_weight(folder: Path, names: Sequence[str]) -> Tensor:
    from safetensors import safe_open

    for name in names:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 -- not a mapping
                    found: Tensor = file.get_tensor(name)
                    return found
    raise StepError(f"{folder} has none of the weights {', '.join(dict.fromkeys(names))}")


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, HEAD_CHUNK):
        yield slice(start, min(start + HEAD_CHUNK, length))


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    """Summed loss of the targets [T] under the first T rows of [C, V]; T is C or C - 1."""
    picked = log_probs[: len(targets)].gather(1, targets[:, None])
    return -float(picked.double().sum())


def _kl(target: Tensor, found: Tensor) -> float:
    """Summed KL(target || found) of two [C, V] of log-probabilities."""
    return float((target.exp() * (target - found)).sum(-1).double().sum())


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


# ---------------------------------------------------------------- continuations


Pair = tuple[list[int], list[int]]
"""Token ids of a context, and of the continuation whose probability is asked for."""


def score_continuations(
    model: ScoredModel,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    max_length: int,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """For each pair log P(continuation | context), and whether greedy decoding would write it.

    Inputs longer than `max_length` lose their beginning. An input that another one begins with is
    not run by itself: its positions are read off the longer one, since later tokens cannot change
    them. Batches are of like lengths, and logits are made only for the continuations' tokens. A
    model with a `branch` reads a context that several continuations share once.
    """
    import torch

    families = share_contexts(pairs, max_length) if hasattr(model, "branch") else []
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    done = 0
    with torch.inference_mode():
        for start in range(0, len(families), batch_size):
            batch = families[start : start + batch_size]
            for pair, score in _score_families(cast(BranchingModel, model), pairs, batch):
                results[pair] = score
            done += sum(map(len, batch))
            if progress is not None:
                progress(done, len(pairs), "scoring answers")
        alone = sorted(set(range(len(pairs))).difference(*families))
        for pair, score in _score_rows(model, pairs, alone, batch_size, max_length):
            results[pair] = score
            done += 1
            if progress is not None:
                progress(done, len(pairs), "scoring answers")
    return results


def share_contexts(pairs: Sequence[Pair], max_length: int) -> list[list[int]]:
    """Pairs that have a context in common and fit whole: groups of two and more, longest first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, ending) in enumerate(pairs):
        if context and len(context) + len(ending) <= max_length:
            groups.setdefault(tuple(context), []).append(index)
    shared = [(len(key), group) for key, group in groups.items() if len(group) > 1]
    return [group for _, group in sorted(shared, key=lambda each: -each[0])]


def _score_families(
    model: BranchingModel, pairs: Sequence[Pair], families: Sequence[list[int]]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Scores of pairs that share contexts, family by family: each context is run once."""
    import torch

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
    """Scores of the `chosen` pairs, each run as a row of its own or read off a longer one."""
    inputs = [(pairs[pair][0] + pairs[pair][1])[:-1][-max_length:] for pair in chosen]
    rows, row_of = fold_prefixes(inputs)
    asks: list[list[int]] = [[] for _ in rows]  # row -> the inputs that are read off it
    for index, row in enumerate(row_of):
        asks[row].append(index)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        hidden = model.hidden(*_pad([rows[row] for row in batch], model.device))  # [B, S, H]
        places: list[tuple[int, int]] = []  # (row in the batch, position) of each asked token
        targets: list[int] = []
        asked = [(place, index) for place, row in enumerate(batch) for index in asks[row]]
        counts = []
        for place, index in asked:
            ending, end = pairs[chosen[index]][1], len(inputs[index])
            kept = ending[-end:]  # all of it, unless it is longer than the model allows
            places += [(place, end - len(kept) + offset) for offset in range(len(kept))]
            targets += kept
            counts.append(len(kept))
        values, greedy = _score_places(model, hidden, places, targets)
        first = 0
        for (_, index), count in zip(asked, counts, strict=True):
            part = slice(first, first + count)
            yield chosen[index], (sum(values[part]), all(greedy[part]))
            first += count


def fold_prefixes(inputs: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Rows to run, and for each input the row that begins with it."""
    rows: list[list[int]] = []
    row_of = [0] * len(inputs)
    # Backwards in lexical order, an input comes right after the inputs that it begins.
    for index in sorted(range(len(inputs)), key=lambda each: inputs[each], reverse=True):
        ids = inputs[index]
        if not rows or rows[-1][: len(ids)] != ids:
            rows.append(ids)
        row_of[index] = len(rows) - 1
    return rows, row_of


def _pad(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, S] padded on the right by zeros, and lengths [B]."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)


def _score_places(
    model: ScoredModel, hidden: Tensor, places: list[tuple[int, int]], targets: list[int]
) -> tuple[list[float], list[bool]]:
    """Log-probability of each target at its place (row, position) of [B, S, H]; is it greedy."""
    import torch

    values: list[float] = []
    greedy: list[bool] = []
    index = torch.tensor(places, device=hidden.device).view(-1, 2)
    wanted = torch.tensor(targets, device=hidden.device)
    for part in _chunks(len(targets)):
        picked = hidden[index[part, 0], index[part, 1]]  # [C, H]
        log_probs = _log_probs(model.head(picked))  # [C, V]
        values += log_probs.gather(1, wanted[part, None])[:, 0].tolist()
        greedy += (log_probs.argmax(-1) == wanted[part]).tolist()
    return values, greedy


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class TaskScore:
    """A task's score; an accuracy between 0 and 1."""

    metric: str
    value: float
    n: int
    ci95: tuple[float, float]
    """Wilson's interval."""
    data: str
    """Where the questions came from."""


def run_tasks(
    model: ScoredModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Score `model` on tasks of lm-eval: its prompts and metrics, the first `limit` questions.

    The tasks in `compose.assets.TASKS` are read from files here; others go through the hub.

    Raises:
        UserError: a task is unknown, or asks for free text of a model that has no `write`.
        AssetError: a task's questions cannot be had.
    """
    if not tasks:
        return {}
    import lm_eval

    from compose.bench.tasks import Scorer

    with tempfile.TemporaryDirectory(prefix="gateskip-tasks-") as scratch:
        ours = [name for name in tasks if name in TASKS]
        origins = {name: _define(name, Path(scratch), cache, limit) for name in ours}
        manager = _manager(Path(scratch), tasks)
        try:
            found = lm_eval.simple_evaluate(
                model=Scorer(model, batch_size=batch_size, progress=progress),
                tasks=list(tasks),
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
            )
        except NotImplementedError as error:
            raise UserError(str(error), fix=f"choose among {', '.join(TASKS)}") from error
        except (ConnectionError, FileNotFoundError) as error:
            raise AssetError(
                f"the questions of a task among {', '.join(tasks)} cannot be had: {error}",
                fix=f"go online, or choose among {', '.join(TASKS)}",
            ) from error
    return {name: _score(name, found, origins.get(name, "hub:lm-eval")) for name in tasks}


def _define(name: str, folder: Path, cache: Path | None, limit: int | None = None) -> str:
    """Write lm-eval's own definition of the task with our rows as its data; the data's origin.

    Only the first `limit` rows are passed on: lm-eval would prepare all before it takes as many.
    """
    data = load_task(name, cache)
    definition = _definition(name, data.definition)
    rows = folder / f"{name}.jsonl"
    with data.path.open(encoding="utf-8") as lines:
        rows.write_text("".join(islice(lines, limit)), encoding="utf-8")
    splits = {f"{split}_split": None for split in ("training", "validation", "test", "fewshot")}
    text = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {data.split: str(rows)},
            "cache_dir": str(folder / "datasets"),
        },
        **splits,
        f"{data.split}_split": data.split,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    return data.origin


def _definition(name: str, place: str) -> Path:
    """The task's YAML file: ours, or the one that this version of lm-eval has."""
    import lm_eval.tasks

    if place.startswith(OURS):
        return Path(__file__).parents[1] / "data" / "tasks" / place.removeprefix(OURS)
    theirs = Path(lm_eval.tasks.__file__).parent / place
    if not theirs.is_file():
        raise UserError(f"this version of lm-eval has no task {name!r} at {place}")
    return theirs


def _manager(folder: Path, tasks: Sequence[str]) -> Any:
    """An index of our task files alone; of lm-eval's thousands too, only if one of them is asked.

    Building the large one takes many seconds.
    """
    from lm_eval.tasks import TaskManager

    others = [name for name in tasks if name not in TASKS]
    manager = TaskManager(include_path=str(folder), include_defaults=bool(others))
    for name in others:
        if name not in manager.all_tasks:
            raise UserError(
                f"lm-eval has no task {name!r}: {suggest(name, TASKS)}",
                fix="`lm-eval ls tasks` lists all others",
            )
    return manager


def _score(name: str, found: dict[str, Any], origin: str) -> TaskScore:
    measured = found["results"][name]
    metric = next((each for each in METRICS if f"{each},none" in measured), None)
    if metric is None:
        names = sorted(key for key in measured if "," in key and "stderr" not in key)
        raise UserError(f"task {name!r} has no accuracy, only {', '.join(names)}")
    value = float(measured[f"{metric},none"])
    members = found.get("group_subtasks", {}).get(name) or [name]
    n = sum(found["n-samples"][member]["effective"] for member in members)
    return TaskScore(metric, value, n, wilson(value, n), origin)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in `n` trials."""
    if n == 0:
        return 0.0, 1.0
    middle = share + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + (Z95 / (2 * n)) ** 2)
    scale = 1 + Z95**2 / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def longest_input(tokenizer: Any) -> int:
    """How many tokens a model takes, as its tokenizer says; a huge number there means nothing."""
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and length < 1 << 24 else FALLBACK_LENGTH
