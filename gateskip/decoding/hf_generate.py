"""gateskip's decoding inside `model.generate`, with GenerationConfig, processors and streamers.

>>> decoder = gateskip.load("exports/shipped")                          # doctest: +SKIP
>>> model = decoder.skipping.model                                      # doctest: +SKIP
>>> model.generate(**inputs, custom_generate=custom_generate(decoder))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gateskip.decoding.decoder import Decoder, Mode
from gateskip.decoding.sampling import Sampler


def custom_generate(
    decoder: Decoder, mode: Mode = "speculate", streamer: Any = None, **settings: Any
) -> Callable[..., Tensor]:
    """A decoding loop for `generate(custom_generate=...)` of the decoder's model.

    `mode` and `settings` are those of `Decoder.generate`. The generation config sets length,
    stopping and sampling; torch's global seed sets the random numbers. A transformers `streamer` is
    given here, since `generate` (5.24) does not pass its own to a custom loop.
    """

    def run(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Continue input_ids [B, S], padded on the left where its mask is 0 -> [B, S + new].

        Raises ValueError for beam search and for another model than the decoder's.
        """
        if model is not decoder.skipping.model:
            raise ValueError("custom_generate was made for another model than the one asked")
        if generation_config.num_beams > 1:
            raise ValueError("num_beams: beams are not decoded here, leave it at 1")
        mask = inputs.get("attention_mask")  # named above, it would come twice
        real = torch.ones_like(input_ids) if mask is None else mask
        prompts = [ids[of_row.bool()].tolist() for ids, of_row in zip(input_ids, real, strict=True)]
        emit = None
        if streamer is not None:
            streamer.put(input_ids.cpu())
            emit = lambda _, token: streamer.put(torch.tensor([token]))  # noqa: E731
        written = decoder.generate(
            prompts,
            generation_config.max_length - input_ids.shape[1],
            mode,
            sampler=Sampler(
                temperature=float(generation_config.do_sample),
                processors=tuple(map(_unpadded, logits_processor)),
            ),
            seed=int(torch.randint(2**31, ())),
            eos=_ids(generation_config.eos_token_id),
            criteria=tuple(stopping_criteria),
            on_token=emit,
            **settings,
        )
        if streamer is not None:
            streamer.end()
        pad = next(iter(_ids(generation_config.pad_token_id)), 0)
        longest = max(map(len, written.tokens))
        new = torch.tensor([row + [pad] * (longest - len(row)) for row in written.tokens])
        return torch.cat((input_ids, new.to(input_ids)), 1)

    return run


def _unpadded(processor: Any) -> Any:
    """A repetition penalty without transformers' padding length, since rows here have no padding;
    other processors unchanged."""
    if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
        return type(processor)(processor.penalty)
    return processor


def _ids(stated: Any) -> list[int]:
    """Token ids from a config's field: one, several or none."""
    if stated is None:
        return []
    if isinstance(stated, Tensor):
        return [int(token) for token in stated.flatten()]
    return list(stated) if isinstance(stated, list | tuple) else [int(stated)]
