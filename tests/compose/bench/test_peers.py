"""Other engines in processes of their own: names, environments, the protocol, their answers.

What needs an engine's environment is marked `peers` and skipped where that has not been made:
`make peers-test` makes them all.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf_files import ARCHITECTURES, SIX_LAYERS
from gguf_files import converted as written_like_llama_cpp
from jobs import cell_job
from peer_environments import environment_of
from transformers import AutoTokenizer

from compose.artifacts.gguf.metadata import WRITTEN
from compose.artifacts.gguf.read import write_folder
from compose.artifacts.gguf.write import write_gguf
from compose.bench.peers.environment import environment_folder, python_of
from compose.bench.peers.prepare import CalibrationText, PreparedPeer, _gguf, prepare
from compose.bench.peers.process import PeerProcess
from compose.bench.peers.table import (
    ENGINES,
    GGUF_TYPES,
    IMATRIX,
    WEIGHED,
    Engine,
    is_peer,
    parse_peer,
)
from compose.contract import DataSpec, silent
from compose.errors import StepError, UserError
from compose.stages.text.split_text import split_blocks
from compose.workers.main import _calibration_rows

STOP = 2
PROMPTS = [[5, 9, 14, 33, 21, 7, 8, 50], [71, 6, 30, 12, 11, 19, 40, 3]]


TEXT = CalibrationText(
    ("some text", "more"), [[(11 * at + 5 * row) % 500 for at in range(64)] for row in range(8)]
)
"""Text that calibrated options are fitted to."""


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with converted models of its own, in which `ready` puts environments."""
    cache = tmp_path_factory.mktemp("peers")
    (cache / "peers").mkdir()
    return cache


@pytest.fixture
def ready(engine_cache: Path) -> Callable[[str, Path], PreparedPeer]:
    """Prepare a peer, or skip the test where its environment has not been made."""

    def make(name: str, folder: Path) -> PreparedPeer:
        engine = parse_peer(name).engine
        if engine.requirements and not environment_folder(engine, engine_cache).exists():
            place = environment_of(engine)
            (engine_cache / "peers" / place.name).symlink_to(place, target_is_directory=True)
        return prepare(name, folder, engine_cache, text=TEXT)

    return make


def reference(folder: Path) -> Any:
    """The model in float32, plain transformers in this process."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, one whole forward pass a token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# --- Names ---------------------------------------------------------------------------------------


def test_names_are_read() -> None:
    assert parse_peer("transformers").option == ""
    assert parse_peer("llama.cpp:q4_k_m").settings().endswith("flash attention off.")
    flash = parse_peer("llama.cpp:q4_0+fa")
    assert (flash.option, flash.flash) == ("q4_0", True)
    assert flash.settings().endswith("flash attention on.")
    assert parse_peer("llama.cpp:some/model.gguf").file == Path("some/model.gguf")
    assert is_peer("openvino:int4") and not is_peer("skip:0.8")
    weighed = parse_peer("llama.cpp:q4_k_m+imatrix+fa")
    assert (weighed.option, weighed.flash, weighed.reads_text) == ("q4_k_m+imatrix", True, True)
    assert not parse_peer("llama.cpp:q4_k_m").reads_text, "an older name reads no text"
    assert parse_peer("openvino:int4+awq").reads_text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lama.cpp:q4_0", r"did you mean 'llama.cpp'"),
        ("llama.cpp:q4_k", r"did you mean 'q4_k_m'"),
        ("llama.cpp", r"known: q4_0"),
        ("llama.cpp:q8_0+imatrix", r"q8_0"),
        ("llama.cpp:iq3_xxs", r"known: .*iq3_xxs\+imatrix"),
        ("openvino:int5", r"known: int4, int8"),
        ("transformers:early-exit-10", r"known: compiled, lookup"),
        ("transformers:compiled+fa", r"known: compiled, lookup"),
    ],
)
def test_unknown_names_say_what_is_known(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_peer(name)


def test_every_requirement_is_a_range() -> None:
    for engine in ENGINES.values():
        for requirement in engine.requirements:
            assert ">=" in requirement and "<" in requirement.replace("<=", ""), requirement


@pytest.mark.parametrize("source", [None, "self-written"])
def test_calibrated_engines_get_the_rows_of_the_rounding_stage(
    source: str | None, tiny_llama: Path, tmp_path: Path, make_job: Callable[..., Any]
) -> None:
    (tmp_path / "own.txt").write_text("Each contributor grants you a licence.\n" * 60)
    spec = DataSpec(source=source or str(tmp_path / "own.txt"), limit=3, length=16)
    job = cell_job(
        tiny_llama,
        tmp_path,
        name="llama.cpp:q4_0+imatrix",
        seed=5,
        threads=1,
        peer="llama.cpp:q4_0+imatrix",
        calibration=spec,
    )
    stage = make_job(
        tiny_llama, tmp_path / "out", calibration=spec, seed=5, asset_cache=tmp_path / "cache"
    )
    wanted = split_blocks(stage, "calibration", AutoTokenizer.from_pretrained(tiny_llama))
    rows = _calibration_rows(job, silent)
    assert rows == wanted.tolist() and len(rows) == 3 and len(rows[0]) == 16


# --- Environments --------------------------------------------------------------------------------

LOCAL = Engine(
    name="local",
    script="serve.py",
    options={"": "plain"},
    distributions=("setuptools",),
    pip_options=("--no-index",),
    requirements=("no-such-distribution-anywhere>=1,<2",),
)


def test_a_failed_installation_is_one_clear_message(tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(UserError, match="peer local cannot be installed on this machine") as caught:
        python_of(LOCAL, tmp_path, lambda done, total, note: notes.append(note))
    place = environment_folder(LOCAL, tmp_path)
    log = place.with_name(f"{place.name}.log")
    assert "No matching distribution" in str(caught.value), "pip's own last lines"
    assert str(log) in str(caught.value.fix) and "No matching distribution" in log.read_text()
    assert not place.exists(), "a failed environment is not left"
    assert any(note.startswith("installing local") for note in notes)


def test_an_environment_is_made_once_and_hashed_over_what_decides_it(tmp_path: Path) -> None:
    engine = replace(LOCAL, requirements=("pip>=1,<99",), distributions=("pip",))
    python = python_of(engine, tmp_path)
    made = python.stat().st_mtime_ns
    assert python_of(engine, tmp_path) == python and python.stat().st_mtime_ns == made
    inside = subprocess.run(
        [str(python), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
    ).stdout.strip()
    assert Path(inside).resolve() == python.parents[1].resolve(), "it works after the renaming"
    other = replace(engine, requirements=("pip>=2,<99",))
    assert environment_folder(other, tmp_path) != environment_folder(engine, tmp_path)


def test_transformers_needs_no_environment(tmp_path: Path) -> None:
    assert python_of(ENGINES["transformers"], tmp_path) == Path(sys.executable)
    assert list(tmp_path.iterdir()) == []


# --- The protocol, with a script that does what is asked ------------------------------------------

TALKER = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
from serve import serve
class Talker:
    def load(self, **given):
        print("printed to standard output")
        os.write(1, b"written to file descriptor 1")
        return {{"flags": "", "resident_bytes": 0, "given": given}}
    def generate(self, **given):
        raise ValueError("no such row")
    def logits(self, **given):
        os.kill(os.getpid(), signal.SIGILL)
serve(Talker())
"""


@pytest.fixture
def talker(tmp_path: Path) -> PreparedPeer:
    script = tmp_path / "talker.py"
    script.write_text(TALKER.format(scripts=str(ENGINES["transformers"].script_path.parent)))
    model = tmp_path / "model"
    return PreparedPeer(
        "talker", "talker", "", Path(sys.executable), script, model, 8, 0, {"talker": "1"}, ""
    )


def test_what_a_library_prints_stays_out_of_the_answers(talker: PreparedPeer) -> None:
    with PeerProcess(talker, 1) as peer:
        for _ in range(3):
            loaded = peer.load(16, 1)
            assert loaded["given"]["context"] == 16 and loaded["versions"] == {"talker": "1"}


def test_a_failure_is_an_error_and_the_process_goes_on(talker: PreparedPeer) -> None:
    with PeerProcess(talker, 1) as peer:
        with pytest.raises(StepError, match="failed in generate: ValueError: no such row"):
            peer.generate([[1]], 1)
        assert peer.load(16, 1)["given"]["batch"] == 1


def test_an_engine_that_dies_takes_only_its_own_process(
    talker: PreparedPeer, tmp_path: Path
) -> None:
    """llama.cpp and oneDNN in one process died of SIGILL, and the measurement with them."""
    with PeerProcess(talker, 1) as peer:
        peer.load(16, 1)
        with pytest.raises(StepError, match="peer talker died of SIGILL in logits"):
            peer.logits([[1]], tmp_path / "x.npy")


# --- transformers, which is always there ---------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_peer(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PeerProcess]:
    """One process for all: it takes seconds to import transformers."""
    prepared = prepare("transformers", tiny_llama, tmp_path_factory.mktemp("transformers"))
    assert prepared.disk_bytes == (tiny_llama / "model.safetensors").stat().st_size
    with PeerProcess(prepared, 1) as peer:
        yield peer


def continued(peer: PeerProcess, wanted: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a peer writes after `PROMPTS`, which is what a plain loop does, with and without stop
    tokens."""
    assert peer.load(64, 2)["resident_bytes"] > 0
    run = peer.generate(PROMPTS, 12, [STOP], ignore_stop=True)
    assert run["tokens"] == wanted
    assert run["prefill_s"] == run["ttft_s"] > 0 and run["decode_s"] > 0
    stopped = peer.generate(PROMPTS, 12, [wanted[0][3]])
    cut = wanted[0].index(wanted[0][3]) + 1
    assert stopped["tokens"][0] == wanted[0][:cut], "the stop token is the last"
    return run


@pytest.mark.slow
def test_transformers_continues_as_a_plain_loop(
    transformers_peer: PeerProcess, tiny_llama: Path
) -> None:
    model = reference(tiny_llama)
    run = continued(transformers_peer, [greedy(model, row, 12) for row in PROMPTS])
    assert run["first_tokens"] == 2, "one a row"


@pytest.mark.slow
def test_transformers_with_look_up_continues_as_a_plain_loop(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = reference(tiny_llama)
    with PeerProcess(prepare("transformers:lookup", tiny_llama, tmp_path), 1) as peer:
        continued(peer, [greedy(model, row, 12) for row in PROMPTS])


@pytest.mark.slow
def test_rows_of_unequal_length(transformers_peer: PeerProcess, tiny_llama: Path) -> None:
    rows = [PROMPTS[0], PROMPTS[1][:3]]
    model = reference(tiny_llama)
    transformers_peer.load(64, 2)
    tokens = transformers_peer.generate(rows, 6, [], ignore_stop=True)["tokens"]
    assert tokens == [greedy(model, row, 6) for row in rows]


@pytest.mark.slow
def test_logits_come_back_as_a_mapped_array(
    transformers_peer: PeerProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    blocks = [PROMPTS[0] * 2, PROMPTS[1] * 2]
    transformers_peer.load(64, 1)
    logits = transformers_peer.logits(blocks, tmp_path / "logits.npy")
    assert isinstance(logits, numpy.memmap)
    assert logits.shape == (2, 16, 512) and logits.dtype == numpy.float32
    with torch.inference_mode():
        wanted = reference(tiny_llama)(torch.tensor(blocks)).logits.numpy()
    assert numpy.abs(logits - wanted).max() < 1e-4


@pytest.mark.slow
def test_compiled_compiles_nothing_after_load(tiny_llama: Path, tmp_path: Path) -> None:
    """It compiled inside timed repeats: the static cache grew with the length of each call."""
    wanted = greedy(reference(tiny_llama), PROMPTS[0], 40)
    with PeerProcess(prepare("transformers:compiled", tiny_llama, tmp_path), 1) as peer:
        peer.load(64, 1)
        for count in (5, 40, 17):
            run = peer.generate(PROMPTS[:1], count, [], ignore_stop=True)
            assert run["tokens"] == [wanted[:count]]
            assert run["compiled_graphs"] == 0


# --- Engines with environments of their own -------------------------------------------------------

BOUNDS = {
    "llama.cpp:bf16": 0.02,
    "llama.cpp:bf16+fa": 0.02,
    "llama.cpp:q8_0": 0.05,
    "openvino:int8": 0.1,
    **{f"llama.cpp:{kind}": 0.8 for kind in GGUF_TYPES if kind not in ("bf16", "q8_0")},
    **{f"llama.cpp:{kind}{IMATRIX}": 0.8 for kind in WEIGHED},
    "openvino:int4": 0.8,
    "openvino:int4+awq": 0.8,
    "onnxruntime:int4": 0.8,
}
"""Peer -> largest root mean square of the difference of logits, over that of the logits."""


@pytest.mark.peers
@pytest.mark.parametrize("name", BOUNDS)
def test_an_engine_runs_our_model(
    name: str, tiny_llama: Path, tmp_path: Path, ready: Callable[[str, Path], PreparedPeer]
) -> None:
    """Its logits are those of the model but for rounding, and its tokens those of its logits."""
    prepared = ready(name, tiny_llama)
    assert prepared.disk_bytes > 0 and prepared.settings.endswith(".")
    sentence = "Calibrated on 8 rows of 64 tokens of some text and more."
    assert prepared.settings.endswith(sentence) == parse_peer(name).reads_text
    blocks = [PROMPTS[0] * 2, PROMPTS[1] * 2]
    with PeerProcess(prepared, 1) as peer:
        loaded = peer.load(64, 2)
        assert loaded["resident_bytes"] > 0 and loaded["flags"] and loaded["versions"]
        run = peer.generate(PROMPTS, 12, [STOP], ignore_stop=True)
        assert [len(row) for row in run["tokens"]] == [12, 12]
        assert run["first_tokens"] >= 2 and run["prefill_s"] == run["ttft_s"] > 0
        stop = run["tokens"][0][3]
        stopped = peer.generate(PROMPTS, 12, [stop])["tokens"]
        assert stopped[0] == run["tokens"][0][: run["tokens"][0].index(stop) + 1]
        peer.load(64, 1)
        alone = [peer.generate([row], 12, [], True)["tokens"][0] for row in PROMPTS]
        assert _same(alone, run["tokens"]) >= 0.8, "a row in a batch is the row alone"
        logits = peer.logits(blocks, tmp_path / "blocks.npy")
        written = [row + text for row, text in zip(PROMPTS, run["tokens"], strict=True)]
        again = peer.logits(written, tmp_path / "written.npy")
    best = again[:, len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist()
    assert _same(best, run["tokens"]) >= 0.8
    with torch.inference_mode():
        wanted = reference(tiny_llama)(torch.tensor(blocks)).logits.numpy()
    assert logits.shape == wanted.shape
    error = float(((logits - wanted) ** 2).mean() ** 0.5 / (wanted**2).mean() ** 0.5)
    assert error < BOUNDS[name]


def _same(left: list[list[int]], right: list[list[int]]) -> float:
    """Share of equal tokens."""
    pairs = [each for rows in zip(left, right, strict=True) for each in zip(*rows, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Layer of transformers -> llama.cpp's name."""


@pytest.mark.peers
def test_an_importance_matrix_holds_mean_squares_of_inputs(
    tiny_llama: Path, engine_cache: Path, ready: Callable[[str, Path], PreparedPeer]
) -> None:
    """All that `llama-imatrix` collects, against hooks on the model in float32."""
    weighed = ready("llama.cpp:q4_0+imatrix", tiny_llama)
    plain = ready("llama.cpp:q4_0", tiny_llama)
    assert weighed.model.read_bytes() != plain.model.read_bytes()
    (file,) = (engine_cache / "peers" / "models").glob(f"*-imatrix-{TEXT.digest()}/*.npz")
    measured = dict(numpy.load(file))
    squares: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
            squares[name] = inputs[0].square().mean((0, 1)).numpy()

        return hook

    model = reference(tiny_llama)
    for at, layer in enumerate(model.model.layers):
        for ours, theirs in LAYERS.items():
            layer.get_submodule(ours).register_forward_hook(watch(f"blk.{at}.{theirs}.weight"))
    with torch.inference_mode():
        model(torch.tensor(TEXT.rows))
    assert measured.keys() == squares.keys()
    for name, mean in squares.items():
        numpy.testing.assert_allclose(measured[name], mean, rtol=0.02, atol=0.01 * mean.mean())


@pytest.mark.peers
def test_a_gguf_file_by_its_path(
    tiny_llama: Path, ready: Callable[[str, Path], PreparedPeer]
) -> None:
    file = ready("llama.cpp:q8_0", tiny_llama).model
    named = ready(f"llama.cpp:{file}", tiny_llama)
    assert named.model == file
    assert 0 < named.disk_bytes < file.stat().st_size, "which holds the vocabulary too"
    with pytest.raises(UserError, match="there is no file"):
        ready("llama.cpp:missing.gguf", tiny_llama)


@pytest.mark.peers
def test_a_conversion_is_made_once(
    tiny_llama: Path, ready: Callable[[str, Path], PreparedPeer]
) -> None:
    first = ready("llama.cpp:q4_0", tiny_llama).model
    stamp = first.stat().st_mtime_ns
    assert ready("llama.cpp:q4_0", tiny_llama).model == first
    assert first.stat().st_mtime_ns == stamp


@pytest.mark.peers
def test_a_prompt_that_does_not_fit_is_an_error(
    tiny_llama: Path, ready: Callable[[str, Path], PreparedPeer]
) -> None:
    with PeerProcess(ready("llama.cpp:q8_0", tiny_llama), 1) as peer:
        peer.load(16, 1)
        with pytest.raises(StepError, match="do not fit"):
            peer.generate([[3] * 16], 8)


# --- GGUF files, read and written -----------------------------------------------------------------

LONG = [[(7 * step + 3 * row) % 500 for step in range(48)] for row in (1, 2)]
"""Longer than the window of the tiny models."""


@pytest.mark.peers
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpp_runs_what_our_reader_reads(
    family: str,
    make_tiny: Callable[..., Path],
    tmp_path: Path,
    ready: Callable[[str, Path], PreparedPeer],
) -> None:
    """One file, two readers: what differs is the float16 of llama.cpp's KV cache."""
    more = SIX_LAYERS if family == "gemma3_text" else {}
    file = written_like_llama_cpp(make_tiny(family, **more), tmp_path / "a.gguf")
    write_folder(file, tmp_path / "model")
    with PeerProcess(ready(f"llama.cpp:{file}", tmp_path / "model"), 1) as peer:
        peer.load(64, 1)
        logits = peer.logits(LONG, tmp_path / "logits.npy")
    with torch.inference_mode():
        wanted = reference(tmp_path / "model")(torch.tensor(LONG)).logits.numpy()
    seen = 32 if family == "phi3" else 48  # llama.cpp leaves Phi3's window out
    assert relative(logits[:, :seen], wanted[:, :seen]) < 5e-3


@pytest.mark.peers
@pytest.mark.parametrize("family", WRITTEN)
def test_llama_cpp_runs_what_we_write(
    family: str,
    make_tiny: Callable[..., Path],
    tmp_path: Path,
    ready: Callable[[str, Path], PreparedPeer],
) -> None:
    more = SIX_LAYERS if family == "gemma3_text" else {}
    folder, file = make_tiny(family, **more), tmp_path / "a.gguf"
    write_gguf(folder, file, "f32")
    with PeerProcess(ready(f"llama.cpp:{file}", folder), 1) as peer:
        peer.load(64, 1)
        logits = peer.logits(LONG, tmp_path / "logits.npy")
    with torch.inference_mode():
        wanted = reference(folder)(torch.tensor(LONG)).logits.numpy()
    assert relative(logits, wanted) < 5e-3


@pytest.mark.peers
@pytest.mark.parametrize("use", ["int4", "int8", "int3"])
def test_llama_cpp_runs_our_integers(
    use: str,
    make_tiny: Callable[..., Path],
    grid_folder: Callable[..., Path],
    tmp_path: Path,
    ready: Callable[[str, Path], PreparedPeer],
) -> None:
    """The same weights: what differs is that llama.cpp rounds activations to 8 bits. So its logits
    are as far from ours as from its own on these weights in float32, and those are ours."""
    from gateskip.quantization.folders import load_model

    folder, file = grid_folder(make_tiny("llama"), use), tmp_path / "a.gguf"
    write_gguf(folder, file, None)
    write_folder(file, tmp_path / "floats")
    write_gguf(tmp_path / "floats", tmp_path / "floats.gguf", "f32")
    logits = []
    for each in (file, tmp_path / "floats.gguf"):
        with PeerProcess(ready(f"llama.cpp:{each}", folder), 1) as peer:
            peer.load(64, 1)
            logits.append(peer.logits(LONG, tmp_path / f"{each.stem}.npy"))
    with torch.inference_mode():
        ours = load_model(folder, "float32")(torch.tensor(LONG)).logits.numpy()
    integers, floats = logits
    assert relative(floats, ours) < 5e-3
    rounding = relative(integers, floats)
    assert rounding < 0.05 and relative(integers, ours) == pytest.approx(rounding, rel=0.1)


def relative(logits: Any, wanted: Any) -> float:
    """Root mean square of the difference over that of the logits."""
    return float(((logits - wanted) ** 2).mean() ** 0.5 / (wanted**2).mean() ** 0.5)


def test_llama_cpp_does_not_quantize_integers(
    tiny_llama: Path, grid_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"(?s)are integers.*gateskip export FOLDER --format gguf"):
        _gguf(grid_folder(tiny_llama, "int4"), tmp_path, "content", "q4_0", None)
