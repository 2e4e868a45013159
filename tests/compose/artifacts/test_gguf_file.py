"""Headers of GGUF files: what they say, and every way in which one can be broken or unknown."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from gguf_files import raw_gguf

from compose.artifacts.gguf.config import llama3_factors
from compose.artifacts.gguf.file import STORAGES, is_gguf, open_gguf
from compose.artifacts.gguf.read import check_gguf_source
from compose.errors import ArtifactError

SIZES = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.block_count": 0,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b"],
}
GOOD = SIZES | TOKENIZER
EMBEDDING = ("token_embd.weight", (2, 64), 0, bytes(4 * 128))

Save = Callable[[bytes], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def refused(path: Path) -> str:
    """The message with which a file is refused; it is the user's mistake."""
    with pytest.raises(ArtifactError) as caught:
        check_gguf_source(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_file_says_its_sizes(save: Save) -> None:
    path = save(raw_gguf(GOOD, [EMBEDDING]))
    file = open_gguf(path)
    eps = "llama.attention.layer_norm_rms_epsilon"
    assert file.metadata == GOOD | {eps: pytest.approx(1e-5)}
    tensor = file.tensors["token_embd.weight"]
    assert (tensor.shape, tensor.storage.name, tensor.row_bytes, tensor.rows) == (
        (2, 64),
        "F32",
        256,
        2,
    )
    assert tensor.start % 32 == 0 and tensor.start + 512 == path.stat().st_size
    config = check_gguf_source(path)
    assert config["hidden_size"] == 64 and config["vocab_size"] == 2 and config["head_dim"] == 16
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert is_gguf("a/B.GGUF") and not is_gguf("a/gguf")


def test_every_storage_is_what_the_gguf_package_dequantizes() -> None:
    for kind, storage in STORAGES.items():
        known = gguf.GGMLQuantizationType(kind)
        assert known.name == storage.name
        assert gguf.GGML_QUANT_SIZES[known] == (storage.weights, storage.bytes)
        zeros = numpy.zeros((2, storage.bytes), numpy.uint8)
        assert gguf.dequantize(zeros, known).shape == (2, storage.weights)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short(share: float, save: Save) -> None:
    whole = raw_gguf(GOOD, [EMBEDDING])
    text = refused(save(whole[: int(share * len(whole))]))
    assert "cut short" in text or "not a GGUF file" in text
    assert "model.gguf" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is not a GGUF file"),
        (b"PK\x03\x04 a zip", "it is not a GGUF file"),
        (raw_gguf(GOOD, [EMBEDDING], version=1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "cut short"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77),
            "a value of type 77",
        ),
        (raw_gguf(GOOD, [("w", (2, 64), 99, bytes(99))]), "w is stored as GGML type 99"),
        (raw_gguf(GOOD, [("w", (2, 65), 8, bytes(99))]), r"w has the sizes (2, 65)"),
        (raw_gguf(GOOD, [("w", (2, 1 << 40), 0, bytes(99))]), "cut short"),
    ],
)
def test_a_file_that_is_broken(content: bytes, says: str, save: Save) -> None:
    assert says in refused(save(content))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "absent.gguf")
    assert "cannot read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": None}, "it has no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "its tokenizer is 'rwkv'"),
        ({"tokenizer.ggml.pre": None}, "its pre-tokenizer is 'default'"),
        ({"tokenizer.ggml.pre": "viking"}, "its pre-tokenizer is 'viking' (supported: gpt-2"),
        ({"general.architecture": None}, "does not state its architecture"),
        ({"general.architecture": "lama"}, "did you mean 'llama'?"),
        ({"general.architecture": "mamba"}, "known: llama, qwen2"),
        ({"llama.context_length": None}, "does not state llama.context_length"),
        ({"llama.logit_scale": 2.0}, "states llama.logit_scale, which is not supported"),
        ({"llama.expert_count": 8}, "a mixture of experts"),
        ({"llama.attention.value_length": 8}, "16 channels a head, and values 8"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "8 of a head's 16"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, "does not state llama.rope.scaling.factor"),
    ],
)
def test_a_model_that_is_not_known_here(change: dict[str, Any], says: str, save: Save) -> None:
    stated = {key: value for key, value in (GOOD | change).items() if value is not None}
    assert says in refused(save(raw_gguf(stated, [EMBEDDING])))


def test_a_part_of_a_model(save: Save) -> None:
    assert "a part of a model" in refused(save(raw_gguf(GOOD)))
    assert check_gguf_source(save(raw_gguf(GOOD | {"llama.expert_count": 0}, [EMBEDDING])))


def test_blocks_are_kept_only_where_there_are_some(save: Save) -> None:
    layer = ("blk.0.ffn_up.weight", (128, 64), 1, bytes(2 * 128 * 64))
    path = save(raw_gguf(GOOD, [EMBEDDING, layer]))
    with pytest.raises(ArtifactError, match=r"(?s)stored as F16, .*leave keep_blocks out"):
        check_gguf_source(path, keep_blocks=True)


def test_scaled_positions_of_llama_3(save: Save) -> None:
    """Llama 3.2's factors, by its config's numbers, from the tensor that a file has instead."""
    wanted = llama3_factors(64, 500000.0, 32.0)
    assert wanted[0] == 1.0 and wanted[-1] == 32.0 and 1.0 < wanted[15] < 32.0
    head = {"llama.attention.key_length": 64, "llama.rope.freq_base": 500000.0}
    stored = ("rope_freqs.weight", (32,), 0, struct.pack("<32f", *wanted))
    rope = check_gguf_source(save(raw_gguf(GOOD | head, [EMBEDDING, stored])))["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = ("rope_freqs.weight", (32,), 0, struct.pack("<32f", *range(32)))
    text = refused(save(raw_gguf(GOOD | head, [EMBEDDING, other])))
    assert "is not that of Llama 3.1 or 3.2" in text


def test_the_factors_are_those_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters=rope | {"original_max_position_embeddings": 8192},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = torch.tensor(llama3_factors(128, 500000.0, 8.0))
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
