"""Whether the token ids of two models mean the same. Imports no library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vocabulary_difference(model: Mapping[str, int], draft: Mapping[str, int]) -> str | None:
    """How two vocabularies (token to id) differ, by the first token that does; None where they are
    equal.

    >>> vocabulary_difference({"a": 0, "b": 1}, {"a": 0, "c": 1})
    "another tokenizer: 'b' is token 1 of the model and no token of the draft model"
    """
    if model == draft:
        return None
    token, _ = min(model.items() ^ draft.items(), key=lambda item: (item[1], item[0]))
    return (
        f"another tokenizer: {token!r} is {_named(model.get(token))} of the model and"
        f" {_named(draft.get(token))} of the draft model"
    )


def require_same_vocabulary(model: Any, tokenizer: Any, draft: Any, drafts_tokenizer: Any) -> None:
    """Refuse a draft model whose token ids mean something else.

    Raises ValueError where the tokenizers' vocabularies differ, or the models have another number
    of embeddings or of logits.
    """
    reason = vocabulary_difference(tokenizer.get_vocab(), drafts_tokenizer.get_vocab())
    if reason is not None:
        raise ValueError(f"the draft model has {reason}; take a model of the same family")
    for part, sizes in (("embeddings", embeddings), ("logits", logits)):
        if sizes(model) != sizes(draft):
            raise ValueError(
                f"the draft model has {sizes(draft)} {part} and the model {sizes(model)}: take a"
                " draft model with as many"
            )


def embeddings(model: Any) -> int:
    """Number of tokens that a model can read."""
    return int(model.get_input_embeddings().num_embeddings)


def logits(model: Any) -> int:
    """Number of tokens that a model can predict."""
    return int(model.get_output_embeddings().out_features)


def _named(token: int | None) -> str:
    return "no token" if token is None else f"token {token}"
