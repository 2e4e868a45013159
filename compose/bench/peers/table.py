"""The table of other engines: their options, requirements and settings.

None of them is installed into this project's environment. `environment` makes one for each engine
from the version ranges here; another range makes another environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compose.errors import UserError, suggest

SCRIPTS = Path(__file__).with_name("scripts")


@dataclass(frozen=True)
class Engine:
    """One other engine."""

    name: str
    script: str
    """File in `scripts/` that runs in its environment."""
    options: Mapping[str, str]
    """Option -> its settings, as the end of a sentence. The empty option is the plain name."""
    distributions: tuple[str, ...]
    """Distributions whose versions are recorded."""
    calibrated: frozenset[str] = frozenset()
    """Options whose weights are fitted to the calibration text of the pipeline."""
    requirements: tuple[str, ...] = ()
    """Requirements for pip, pinned to ranges; empty where this project's environment has them."""
    pip_options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the installation."""
    compiled: bool = False
    """Whether pip compiles it for this processor, so that other processors need their own."""
    settings: str = ""
    """A sentence on the settings that all options share; the options' own sentences follow."""

    @property
    def script_path(self) -> Path:
        """Path of the engine's script."""
        return SCRIPTS / self.script


GGUF_TYPES = {
    "q4_0": "Q4_0",
    "q4_1": "Q4_1",
    "q4_k_m": "Q4_K_M",
    "iq4_nl": "IQ4_NL",
    "iq4_xs": "IQ4_XS",
    "q5_0": "Q5_0",
    "q5_k_m": "Q5_K_M",
    "q6_k": "Q6_K",
    "q8_0": "Q8_0",
    "bf16": "BF16",
    "q3_k_m": "Q3_K_M",
}
"""Options of llama.cpp -> llama.cpp's name of the file type."""

IMATRIX = "+imatrix"
"""End of a llama.cpp option whose file is quantized with an importance matrix."""

WEIGHED = {
    **{name: kind for name, kind in GGUF_TYPES.items() if name not in ("q8_0", "bf16")},
    "iq3_xxs": "IQ3_XXS",
}
"""The file types that read an importance matrix; IQ3_XXS cannot be written without one."""

FLASH = "+fa"
"""End of a llama.cpp option that turns flash attention on."""

ENGINES: dict[str, Engine] = {
    "llama.cpp": Engine(
        name="llama.cpp",
        script="run_llama_cpp.py",
        options={
            name: f"quantized to {kind} by llama_model_quantize without an importance matrix"
            for name, kind in GGUF_TYPES.items()
        }
        | {
            f"{name}{IMATRIX}": f"quantized to {kind} by llama_model_quantize with an importance"
            " matrix: the mean square of each layer's inputs in llama.cpp's own passes over the"
            " text, as llama-imatrix collects it"
            for name, kind in WEIGHED.items()
        },
        calibrated=frozenset(name + IMATRIX for name in WEIGHED),
        distributions=("llama-cpp-python",),
        requirements=("llama-cpp-python>=0.3.34,<0.4", "numpy>=2.0,<3"),
        # A wheel from pip's cache may have been compiled for another processor.
        pip_options=("--no-binary=llama-cpp-python", "--no-cache-dir"),
        variables={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_BLAS=OFF -DMTMD_BUILD=OFF"
            " -DLLAVA_BUILD=OFF -DCMAKE_BUILD_TYPE=Release",
            "FORCE_CMAKE": "1",
        },
        compiled=True,
        settings="compiled for this processor with OpenMP; llama_decode of one sequence a row, the"
        " prompt in one batch of up to 2048 tokens; keys and values in f16",
    ),
    "openvino": Engine(
        name="openvino",
        script="run_openvino.py",
        options={
            "int4": "weights int4 in groups of 64 with offset at ratio 1.0, embedding and LM head"
            " int8, exported by optimum-intel without data",
            "int8": "weights int8 with a scale a channel and offset, exported by optimum-intel",
            "int4+awq": "weights int4 in groups of 64 with offset at ratio 1.0, embedding and LM"
            " head int8, by optimum-intel with AWQ and scale estimation on the text",
        },
        calibrated=frozenset({"int4+awq"}),
        distributions=("openvino", "openvino-genai", "optimum-intel", "nncf"),
        requirements=(
            "openvino>=2026.2,<2027",
            "openvino-genai>=2026.2,<2027",
            "openvino-tokenizers>=2026.2,<2027",
            "optimum-intel>=2.0,<3",
            "nncf>=3.0,<4",
            "torch>=2.9,<3",
            "numpy>=2.0,<3",
        ),
        settings="OpenVINO GenAI on the CPU, greedy, PERFORMANCE_HINT LATENCY,"
        " INFERENCE_NUM_THREADS as given, INFERENCE_PRECISION_HINT left at its default (bf16 where"
        " the processor has it); its continuous batching, prefix caching off",
    ),
    "onnxruntime": Engine(
        name="onnxruntime",
        script="run_onnxruntime.py",
        options={
            "int4": "weights, embedding and LM head int4, symmetric in blocks of 32, by the"
            " model builder of onnxruntime-genai at its defaults for the CPU (accuracy_level 4:"
            " int8 products)",
        },
        distributions=("onnxruntime-genai", "onnxruntime"),
        requirements=(
            "onnxruntime-genai>=0.14,<0.19",
            "onnxruntime>=1.24,<2",
            "onnx>=1.19,<2",
            "onnx-ir>=0.1.12,<2",
            "torch>=2.9,<3",
            "transformers>=4.57,<6",
            "numpy>=2.0,<3",
        ),
        settings="onnxruntime-genai on the CPU, greedy, intra_op_num_threads as given",
    ),
    "transformers": Engine(
        name="transformers",
        script="run_transformers.py",
        options={
            "": "plain",
            "compiled": "static KV cache as long as the context, decoding compiled by torch.compile"
            " before anything is timed",
            "lookup": "prompt_lookup_num_tokens=10",
        },
        distributions=("transformers", "torch"),
        settings="generate of transformers on the folder as from_pretrained gives it, greedy,"
        " in the float type of the folder",
    ),
}


@dataclass(frozen=True)
class PeerName:
    """A user's name of a peer, split into its parts."""

    text: str
    engine: Engine
    option: str
    """A key of the engine's options, or a path of a .gguf file."""
    flash: bool = False
    """Flash attention, for llama.cpp."""

    @property
    def reads_text(self) -> bool:
        """Whether its weights are fitted to the pipeline's calibration text."""
        return self.option in self.engine.calibrated

    @property
    def file(self) -> Path | None:
        """The .gguf file in the name, if any."""
        path = self.option if self.option.endswith(".gguf") else ""
        return Path(path).expanduser() if path else None

    def settings(self) -> str:
        """One sentence on the settings."""
        how = self.engine.options.get(self.option, "the file as it is")
        flash = ""
        if self.engine.name == "llama.cpp":
            flash = f"; flash attention {'on' if self.flash else 'off'}"
        return f"{self.engine.settings}; {how}{flash}."


def is_peer(text: str) -> bool:
    """Whether a name is that of another engine.

    >>> is_peer("llama.cpp:q4_0"), is_peer("plain")
    (True, False)
    """
    return text.partition(":")[0] in ENGINES


def parse_peer(text: str) -> PeerName:
    """Read `llama.cpp:q4_k_m`, `llama.cpp:q4_0+imatrix`, `llama.cpp:FILE.gguf+fa`, `transformers`,
    ...

    Raises:
        UserError: there is no such engine or option.
    """
    kind, _, rest = text.partition(":")
    engine = ENGINES.get(kind)
    if engine is None:
        raise UserError(f"peer {text!r}: {suggest(kind, ENGINES)}", fix="as in llama.cpp:q4_k_m")
    flash = kind == "llama.cpp" and rest.endswith(FLASH)
    option = rest.removesuffix(FLASH) if flash else rest
    if option in engine.options or (kind == "llama.cpp" and option.endswith(".gguf")):
        return PeerName(text, engine, option, flash)
    options = [name for name in engine.options if name]
    raise UserError(
        f"peer {text!r}: {suggest(option, options)}",
        fix=f"as in {kind}:{options[0]}"
        + (", with +fa for flash attention, or a .gguf file" if kind == "llama.cpp" else ""),
    )
