"""Settings of on-policy training, as stages take them."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from compose.errors import UserError
from gateskip.training.recipe import Divergence, OnPolicy

DEFAULT = OnPolicy()
Share = Annotated[float, Field(ge=0, le=1)]


class OnPolicyText(BaseModel):
    """How a fine-tune uses text that the model in training writes itself."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    after: Share = DEFAULT.after
    """Share of the steps before this phase begins."""

    share: Share = DEFAULT.share
    """Share of this phase's passes that use text written by the model."""

    every: int = Field(default=DEFAULT.every, ge=1)
    """Steps between two times that the model writes."""

    tokens: int = Field(default=DEFAULT.tokens, ge=1)
    """Tokens that it writes at the end of a block of training text."""

    temperature: float = Field(default=DEFAULT.temperature, ge=0)
    """Temperature of its sampling; 0 is greedy."""

    divergence: Divergence = DEFAULT.divergence
    """Divergence from the dense model on written text: `forward` is KL(dense || model), `reverse`
    is KL(model || dense), `mixed` is the mean of both."""

    top_k: int = Field(default=DEFAULT.top_k, ge=0)
    """Number of the dense model's most likely tokens that count one by one in the divergence; all
    others count as one. 0 counts every token."""


def as_settings(text: OnPolicyText | None) -> OnPolicy | None:
    """The settings as the training loop takes them."""
    if text is None:
        return None
    return OnPolicy(**{field.name: getattr(text, field.name) for field in fields(OnPolicy)})


def require_room(text: OnPolicyText | None, length: int) -> None:
    """Refuse a setting by which the model would write the whole block.

    Raises:
        UserError: `length`, the tokens of a block, is not above the number of tokens to write.
    """
    if text is not None and text.tokens >= length:
        raise UserError(
            f"on_policy writes {text.tokens} tokens at the end of blocks of length {length}",
            fix="use fewer tokens or longer blocks",
        )
