"""The peer `transformers`: `generate` on a folder that `from_pretrained` loads."""

from __future__ import annotations

import time
from typing import Any

from serve import cut, held_bytes, one_by_one, serve, timed, write_logits

LOOKED_UP = 10  # tokens proposed from the prompt, as the documentation of transformers has it
WARM_TOKENS = 4


class Transformers:
    """One loaded model, and for `compiled` one static cache for each batch size."""

    def load(
        self, model: str, option: str, threads: int, context: int, batch: int, **_: Any
    ) -> dict[str, Any]:
        """Load the folder; `compiled` is compiled for this batch before it returns."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        torch.set_num_threads(threads)
        if not hasattr(self, "model"):
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
            self.model.generation_config = GenerationConfig()  # no sampling, no stop of the folder
            self.caches: dict[int, Any] = {}
        self.context, self.settings = context, self._settings(option)
        self.compiled = option == "compiled"
        self.caches.clear()  # they are as long as the context
        self.generate([[0] * min(8, context // 2)] * batch, WARM_TOKENS, [], True)
        return {
            "flags": " ".join(torch.__config__.parallel_info().split()),
            "resident_bytes": held_bytes(),
        }

    def _settings(self, option: str) -> dict[str, Any]:
        if option == "lookup":
            return {"prompt_lookup_num_tokens": LOOKED_UP}
        if option == "compiled":
            from transformers.generation.configuration_utils import CompileConfig

            config: Any = CompileConfig()
            config._compile_all_devices = True  # transformers leaves it off where there is no GPU
            return {"compile_config": config}
        return {}

    def _cache(self, batch: int) -> dict[str, Any]:
        """An empty static cache as long as the context, so that no call changes a shape."""
        if not self.compiled:
            return {}
        if batch not in self.caches:
            from transformers import StaticCache

            self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.context)
        self.caches[batch].reset()
        return {"past_key_values": self.caches[batch]}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, stop: list[int], ignore_stop: bool
    ) -> dict[str, Any]:
        """Continue all prompts in one call, padded on the left.

        The first token is timed by a stopping criterion, which transformers calls after each step:
        prefill and decoding are two parts of one call. `compiled_graphs` counts the graphs compiled
        during the call; where it is not 0, the times include compilation.
        """
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        if self.settings.get("prompt_lookup_num_tokens") and len(prompts) > 1:
            answers: dict[str, Any] = one_by_one(
                self.generate, prompts, new_tokens, stop, ignore_stop
            )
            return answers  # transformers has no batched prompt look-up
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        first: list[float] = []
        steps: list[int] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                if not first:
                    first.append(time.perf_counter())
                    steps.append(input_ids.shape[1] - width)
                return torch.zeros(len(input_ids), dtype=torch.bool)

        ended_by = {} if ignore_stop or not stop else {"eos_token_id": stop}
        cache = self._cache(len(prompts))
        compiled = _compiled_graphs()
        started = time.perf_counter()
        text = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=stop[0] if stop else 0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
            **cache,
            **ended_by,
            **self.settings,
        )
        ended = time.perf_counter()
        rows = [row[width:].tolist() for row in text]
        tokens = rows if ignore_stop else [cut(row, stop) for row in rows]
        at_first = sum(min(steps[0], len(row)) for row in tokens)
        answer = timed(tokens, started, first[0], ended, at_first)
        return {**answer, "compiled_graphs": _compiled_graphs() - compiled}

    def logits(self, blocks: list[list[int]], path: str, vocabulary: int) -> dict[str, Any]:
        """Write float32 logits [N, S, V] of the blocks as .npy."""
        answer: dict[str, Any] = write_logits(path, blocks, vocabulary, self._forward)
        return answer

    def _forward(self, block: list[int], row: Any) -> None:
        """Set `row` to the logits [S, V] of one block."""
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([block])).logits[0]  # [S, V]
            row[:] = logits[:, : row.shape[1]].float().numpy()


def _compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    serve(Transformers())
