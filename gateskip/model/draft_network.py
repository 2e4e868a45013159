"""A small draft network: maps the state before a token and the token to the state after it.

It has no attention and no cache: a draft starts from the model's last final state, which carries
the text so far (the recurrence of EAGLE, arXiv 2401.15077, section 3.1; an MLP in place of its
layer, as in Hydra, arXiv 2402.05109). The model's LM head reads the network's states, only in the
rows of the tokens that are frequent in its training text (FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.errors import FormatError

NETWORK_FILE = "draft_network.safetensors"
EPSILON = 1e-5  # of its norms


class DraftNetwork(nn.Module):
    """x = fuse [n(state), n(embedding)], then n(x + down(silu(gate n(x)) up n(x))); n are norms."""

    def __init__(self, hidden: int, inner: int, tokens: Tensor) -> None:
        """`tokens` [T] are those that the network can draft."""
        super().__init__()
        self.tokens: Tensor
        self.register_buffer("tokens", tokens.to(torch.int32).contiguous())
        self.norm_state, self.norm_token, self.norm_mlp, self.norm_final = (
            nn.RMSNorm(hidden, eps=EPSILON) for _ in range(4)
        )
        self.fuse = nn.Linear(2 * hidden, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)
        nn.init.eye_(self.fuse.weight)  # the state as it is
        nn.init.zeros_(self.down.weight)

    def forward(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Final states [..., H] before tokens, and these embedded [..., H] -> the states after."""
        x = self.fuse(torch.cat([self.norm_state(state), self.norm_token(embedded)], -1))
        normed = self.norm_mlp(x)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        after: Tensor = self.norm_final(x)
        return after


def frequent(blocks: Tensor, count: int, vocabulary: int) -> Tensor:
    """The `count` tokens [T] that are most frequent in token ids blocks [N, S], in ascending order.
    Ties go to the lower ids, which a byte pair encoding merged earlier."""
    counts = torch.bincount(blocks.flatten(), minlength=vocabulary)
    chosen = counts.argsort(descending=True, stable=True)[: min(count, vocabulary)]
    return chosen.sort().values


def save_network(folder: Path, network: DraftNetwork, dtype: torch.dtype) -> None:
    """Write a network into a model folder, its weights in `dtype`."""
    state = {
        name: (part if name == "tokens" else part.to(dtype)).contiguous()
        for name, part in network.state_dict().items()
    }
    save_file(state, str(folder / NETWORK_FILE), metadata={"format": "pt"})


def load_network(folder: Path, hidden: int, vocabulary: int) -> DraftNetwork | None:
    """The network of a folder whose model has these sizes, in float32; None without one.

    Raises FormatError where the file is damaged, or of another model.
    """
    path = folder / NETWORK_FILE
    return read_network(path, hidden, vocabulary) if path.exists() else None


def read_network(path: Path, hidden: int, vocabulary: int) -> DraftNetwork:
    """The network of a file, for a model of these sizes, in float32.

    Raises FormatError where the file is damaged, or of another model.
    """
    try:
        state = load_file(str(path))
        tokens, inner = state["tokens"], state["gate.weight"].shape[0]
        network = DraftNetwork(hidden, inner, tokens)
        network.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path} holds no draft network of this model: {error}") from error
    outside = bool((tokens < 0).any() | (tokens >= vocabulary).any())
    finite = all(bool(part.isfinite().all()) for part in network.parameters())
    if outside or not finite or not len(tokens):
        raise FormatError(
            f"{path} has tokens outside the vocabulary, or numbers that are not finite"
        )
    return network.requires_grad_(False)
