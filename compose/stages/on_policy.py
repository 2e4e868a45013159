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
    """Settings for training on text that the trained model writes itself (on-policy
    distillation)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    after: Share = DEFAULT.after
    """Share of the training steps that come before training on text written by the model."""

    share: Share = DEFAULT.share
    """Share of the training passes that use text written by the model, once training on such text
    has begun."""

    every: int = Field(default=DEFAULT.every, ge=1)
    """Interval, in training steps, at which the model writes new training text."""

    tokens: int = Field(default=DEFAULT.tokens, ge=1)
    """Number of tokens that the model writes at the end of each block of training text."""

    temperature: float = Field(default=DEFAULT.temperature, ge=0)
    """Sampling temperature with which the model writes training text; 0 means greedy decoding."""

    divergence: Divergence = DEFAULT.divergence
    """Training loss on text that the model wrote: KL(dense || model) for `forward`, KL(model ||
    dense) for `reverse`, or the mean of both for `mixed`."""

    top_k: int = Field(default=DEFAULT.top_k, ge=0)
    """Number of most likely tokens, as the dense model ranks them, whose probabilities the loss
    compares one by one. All other tokens of the vocabulary are compared as if they were one token.
    With `top_k: 0`, all tokens of the vocabulary are compared one by one."""


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
