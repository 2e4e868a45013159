"""The peer `onnxruntime`: the generate() API of onnxruntime-genai on a model from its model
builder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve import cut, held_bytes, one_by_one, serve, timed, write_logits

WARM_TOKENS = 2


class OnnxRuntime:
    """One loaded model; each call makes a generator for its batch."""

    def __init__(self) -> None:
        self.model: Any = None
        self.session: Any = None

    def convert(self, source: str, target: str, option: str, threads: int) -> dict[str, Any]:
        """Build by the documented command, at its defaults for the CPU."""
        scratch = Path(target) / "scratch"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", source, "-o", target, "-p", option, "-e", "cpu", "-c", str(scratch)]
        subprocess.run(command, check=True)
        shutil.rmtree(scratch, ignore_errors=True)
        return {}

    def load(self, model: str, threads: int, context: int, batch: int, **_: Any) -> dict[str, Any]:
        """Load the folder with `threads` threads within operators, and run one step."""
        import onnxruntime
        import onnxruntime_genai

        self.folder, self.threads, self.context = Path(model), threads, context
        self.config = json.loads((self.folder / "genai_config.json").read_text("utf-8"))
        if self.model is None:
            self.api = onnxruntime_genai
            config = onnxruntime_genai.Config(model)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": self._threads()}}}))
            self.model = onnxruntime_genai.Model(config)
        self.generate([[1] * min(8, context // 2)] * batch, WARM_TOKENS, [], True)
        return {"flags": onnxruntime.get_build_info(), "resident_bytes": held_bytes()}

    def _threads(self) -> dict[str, int]:
        return {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, stop: list[int], ignore_stop: bool
    ) -> dict[str, Any]:
        """Continue prompts of one length in one batch; those of other lengths follow one by one.

        Where stop tokens are ignored, `min_length` keeps the generator from choosing them.
        """
        if len(set(map(len, prompts))) > 1:
            answers: dict[str, Any] = one_by_one(
                self.generate, prompts, new_tokens, stop, ignore_stop
            )
            return answers
        import numpy

        length = len(prompts[0]) + new_tokens
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(
            batch_size=len(prompts),
            do_sample=False,
            num_beams=1,
            max_length=length,
            min_length=length if ignore_stop else 0,
        )
        ids = numpy.array(prompts, numpy.int32)
        ends = set() if ignore_stop else set(stop)
        started = time.perf_counter()
        generator = self.api.Generator(self.model, params)
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        generator.generate_next_token()
        first = time.perf_counter()
        tokens = [[int(token)] for token in generator.get_next_tokens()]
        while len(tokens[0]) < new_tokens and not all(ends & set(row) for row in tokens):
            generator.generate_next_token()
            for row, token in zip(tokens, generator.get_next_tokens(), strict=True):
                row.append(int(token))
        ended = time.perf_counter()
        if ends:
            tokens = [cut(row, stop) for row in tokens]
        answer: dict[str, Any] = timed(tokens, started, first, ended, len(prompts))
        return answer

    def logits(self, blocks: list[list[int]], path: str, vocabulary: int) -> dict[str, Any]:
        """Write float32 logits [N, S, V] as .npy, from onnxruntime on the model's graph without a
        KV cache."""
        answer: dict[str, Any] = write_logits(path, blocks, vocabulary, self._forward)
        return answer

    def _forward(self, block: list[int], row: Any) -> None:
        """Set `row` to the logits [S, V] of one block."""
        import numpy
        import onnxruntime

        decoder = self.config["model"]["decoder"]
        if self.session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            self.session = onnxruntime.InferenceSession(
                self.folder / decoder["filename"], options, providers=["CPUExecutionProvider"]
            )
        numbers = {
            "input_ids": numpy.array([block], numpy.int64),
            "attention_mask": numpy.ones((1, len(block)), numpy.int64),
            "position_ids": numpy.arange(len(block), dtype=numpy.int64)[None],
        }
        empty = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        types = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16}
        inputs = {
            entry.name: numbers[entry.name]
            if entry.name in numbers
            else numpy.zeros(empty, types[entry.type])
            for entry in self.session.get_inputs()
        }
        row[:] = self.session.run(["logits"], inputs)[0][0][:, : row.shape[1]]


if __name__ == "__main__":
    serve(OnnxRuntime())
