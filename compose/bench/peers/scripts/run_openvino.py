"""The peer `openvino`: OpenVINO GenAI on a folder that optimum-intel exported."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve import cut, held_bytes, serve, timed, write_logits

WARM_TOKENS = 2
KV_BLOCK = 32  # tokens of a block of the paged cache on a CPU
GROUP = 64  # optimum-intel's own 128 does not divide widths such as 576
MODEL = "openvino_model.xml"


class OpenVino:
    """One continuous-batching pipeline, which is what `LLMPipeline` runs on x86 as well."""

    def __init__(self) -> None:
        self.pipeline: Any = None
        self.compiled: Any = None

    def convert(
        self,
        source: str,
        target: str,
        option: str,
        threads: int,
        rows: list[list[int]] | None = None,
    ) -> dict[str, Any]:
        """Export by `optimum-cli`, as a user does; the tokenizer comes along. `rows` of token ids
        are what AWQ and scale estimation are fitted to: the command itself takes no text of one's
        own."""
        if rows is None:
            self._export(source, target, option)
        else:
            self._export(source, target, "fp32")
            self._fit(Path(target), rows)
        return {}

    def _export(self, source: str, target: str, option: str) -> None:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", source, "--task", "text-generation-with-past"]
        command += ["--weight-format", option]
        if option == "int4":
            command += ["--group-size", str(GROUP), "--ratio", "1.0"]
        subprocess.run([*command, target], check=True)

    def _fit(self, folder: Path, rows: list[list[int]]) -> None:
        """Compress an exported model by AWQ and scale estimation on rows of token ids."""
        import nncf
        import torch
        from optimum.intel import (
            OVConfig,
            OVModelForCausalLM,
            OVQuantizer,
            OVWeightQuantizationConfig,
        )
        from optimum.intel.openvino.quantization import OVCalibrationDataset

        model = OVModelForCausalLM.from_pretrained(folder, compile=False)
        inputs = [{"input_ids": torch.tensor([row])} for row in rows]
        inputs = [{**each, "attention_mask": torch.ones_like(each["input_ids"])} for each in inputs]
        text = OVCalibrationDataset(nncf.Dataset(inputs, lambda each: model.prepare_inputs(**each)))
        config = OVWeightQuantizationConfig(
            bits=4,
            sym=False,
            group_size=GROUP,
            ratio=1.0,
            quant_method="awq",
            scale_estimation=True,
            num_samples=len(rows),
        )
        with tempfile.TemporaryDirectory(dir=folder.parent) as compressed:
            OVQuantizer(model).quantize(
                ov_config=OVConfig(quantization_config=config),
                calibration_dataset=text,
                save_directory=compressed,
            )
            for file in Path(compressed).glob("openvino_model.*"):
                file.replace(folder / file.name)  # the file that was mapped stays until we end

    def load(self, model: str, threads: int, context: int, batch: int, **_: Any) -> dict[str, Any]:
        """Make a pipeline whose cache holds `batch` rows of `context` tokens; run one step.

        Prefix caching is off: it would answer a repeated prompt without computing it. A step takes
        whole prompts, as `LLMPipeline` does it.
        """
        import openvino
        import openvino_genai

        self.api, self.openvino = openvino_genai, openvino
        self.folder = Path(model)
        self.properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = max(context * batch, 256)
        scheduler.max_num_seqs = batch
        scheduler.num_kv_blocks = batch * (context // KV_BLOCK + 2)
        self.pipeline = None  # the old one's memory goes first
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", self.properties
        )
        self.generate([[1] * min(8, context // 2)] * batch, WARM_TOKENS, [], True)
        core = openvino.Core()
        flags = {
            "version": openvino.get_version(),
            "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "capabilities": " ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        }
        stated = ", ".join(f"{name} {value}" for name, value in flags.items())
        return {"flags": stated, "resident_bytes": held_bytes()}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, stop: list[int], ignore_stop: bool
    ) -> dict[str, Any]:
        """Add a request for each row, then step until all are finished.

        Rows whose prompts come first may have more tokens when the last row gets its first token;
        `first_tokens` counts these.
        """
        import numpy

        config = self.api.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.do_sample = False
        config.ignore_eos = ignore_stop
        if stop and not ignore_stop:
            config.eos_token_id = stop[0]
            config.stop_token_ids = set(stop)
        rows = [self.openvino.Tensor(numpy.array([row], numpy.int64)) for row in prompts]
        pipeline = self.pipeline
        tokens: list[list[int]] = [[] for _ in prompts]
        started = time.perf_counter()
        handles = [pipeline.add_request(i, row, config) for i, row in enumerate(rows)]
        waiting = set(range(len(rows)))
        while waiting and pipeline.has_non_finished_requests():
            pipeline.step()
            for index in list(waiting):
                if handles[index].can_read():
                    waiting.discard(index)
        first = time.perf_counter()
        for handle, row in zip(handles, tokens, strict=True):
            _read(handle, row)
        first_tokens = sum(map(len, tokens))
        resumed = time.perf_counter()
        while pipeline.has_non_finished_requests():
            pipeline.step()
        ended = first + time.perf_counter() - resumed
        for handle, row in zip(handles, tokens, strict=True):
            _read(handle, row)
        if not ignore_stop:
            tokens = [cut(row, stop) for row in tokens]
        answer: dict[str, Any] = timed(tokens, started, first, ended, first_tokens)
        return answer

    def logits(self, blocks: list[list[int]], path: str, vocabulary: int) -> dict[str, Any]:
        """Write float32 logits [N, S, V] as .npy: OpenVINO on the exported graph, state reset."""
        if self.compiled is None:
            core = self.openvino.Core()
            graph = core.compile_model(self.folder / MODEL, "CPU", self.properties)
            self.compiled = graph.create_infer_request()
        answer: dict[str, Any] = write_logits(path, blocks, vocabulary, self._forward)
        return answer

    def _forward(self, block: list[int], row: Any) -> None:
        """Set `row` to the logits [S, V] of one block."""
        import numpy

        self.compiled.reset_state()
        numbers = {
            "input_ids": numpy.array([block], numpy.int64),
            "attention_mask": numpy.ones((1, len(block)), numpy.int64),
            "position_ids": numpy.arange(len(block), dtype=numpy.int64)[None],
            "beam_idx": numpy.zeros(1, numpy.int32),
        }
        names = {name for entry in self.compiled.model_inputs for name in entry.names}
        self.compiled.infer({name: numbers[name] for name in numbers if name in names})
        row[:] = self.compiled.get_tensor("logits").data[0][:, : row.shape[1]]


def _read(handle: Any, row: list[int]) -> None:
    """Add to `row` the tokens that a request has written since it was last read."""
    while handle.can_read():
        (output,) = handle.read().values()
        row.extend(output.generated_ids)


if __name__ == "__main__":
    serve(OpenVino())
