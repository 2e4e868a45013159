"""A model that computes in float32 while its weights keep their stored type.

Float32 holds bfloat16 and float16 exactly: a matrix is converted to float32 for each of its
products and freed again. The results equal, bit by bit, those of the model loaded in float32, at
half its memory. The system can evict pages of weights that are mapped from their file at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.quantization.packed_linear import DenseLinear


class StoredEmbedding(nn.Module):
    """An embedding whose rows become float32 as tokens are looked up."""

    dtype = torch.float32

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.num_embeddings, self.embedding_dim = self.weight.shape
        # Gemma's, not rounded to the type that the model is loaded in
        scale = getattr(embedding, "scalar_embed_scale", None)
        self.embed_scale = None if scale is None else torch.tensor(scale, dtype=torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden]."""
        rows = F.embedding(ids, self.weight).float()
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.device)


def embed_in_float32(model: Any) -> None:
    """Replace an embedding, in place, by one that keeps its stored table and returns float32."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.weight.dtype != torch.float32:
        model.set_input_embeddings(StoredEmbedding(embedding))


@contextmanager
def heads_in_float32(*models: Any) -> Iterator[None]:
    """Within this context the models' LM heads exist in float32, for logits computed in chunks;
    where autocast chooses the type, they stay unchanged."""
    heads = {model.get_output_embeddings() for model in models}
    with ExitStack() as stack:
        for head in heads:
            if isinstance(head, DenseLinear) and not _autocast(head.weight):
                stack.enter_context(head.fp32_weight())
        yield


def _autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def compute_in_float32(model: Any) -> Any:
    """`model`, changed in place so that no weight trains: plain linear layers and the embedding
    keep their stored type, and everything else becomes float32."""
    model.requires_grad_(False)
    small = [
        (name, part)
        for name, part in model.named_modules()
        if type(part) is nn.Linear and part.weight.dtype != torch.float32
    ]
    embed_in_float32(model)
    for name, part in small:
        model.set_submodule(name, DenseLinear(part))
    kinds = (DenseLinear, StoredEmbedding)
    held = {id(part.weight) for part in model.modules() if isinstance(part, kinds)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in held and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model
