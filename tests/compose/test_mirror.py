"""The store's mirror at a URL: what is sent, what is fetched, and what is not believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_runs as scripted
from typer.testing import CliRunner

from compose.cli import app
from compose.errors import StepError, UserError
from compose.mirror import Mirror
from compose.store import MANIFEST, Store, is_sound, read_json

KEY = "a" * 16


def go(out: Path, script: Any, mirror: Mirror | None = None) -> Any:
    """A run without workers."""
    return scripted.go(out, script, mirror=mirror)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A mirror's URL: a folder, and fsspec's store of objects in memory."""
    if request.param == "file":
        yield f"file://{tmp_path / 'mirror'}"
        return
    import fsspec

    files = fsspec.filesystem("memory")
    yield "memory://steps/of/all"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def stored(folder: Path) -> Store:
    """A store with one entry, a file of it in a folder below."""
    store = Store(folder)
    with store.locked(KEY), store.write(KEY, {"wall_s": 1.0}) as entry:
        (entry / "model" / "sub").mkdir(parents=True)
        (entry / "model" / "model.safetensors").write_bytes(bytes(range(256)))
        (entry / "model" / "sub" / "config.json").write_text("{}")
    return store


def test_an_entry_is_sent_once_and_fetched_as_it_was(url: str, tmp_path: Path) -> None:
    store, other, mirror = stored(tmp_path / "a"), Store(tmp_path / "b"), Mirror.at(url)
    with other.locked(KEY):
        assert not mirror.fetch(KEY, other), "nothing is there yet"
        assert mirror.send(KEY, store) and not mirror.send(KEY, store)
        assert Mirror.at(url).fetch(KEY, other)
    assert other.damage(KEY) is None and other.manifest(KEY) == store.manifest(KEY)
    for name in store.manifest(KEY)["files"]:  # type: ignore[index]
        assert (other.path(KEY) / name).read_bytes() == (store.path(KEY) / name).read_bytes()
    assert list((other.root / ".temp").iterdir()) == []


def corrupt(folder: Path, how: str) -> None:
    """Damage a mirror in a folder."""
    manifest = folder / KEY / MANIFEST
    told = read_json(manifest)
    weights = folder / KEY / told["digest"] / "model" / "model.safetensors"
    if how == "flipped":
        data = bytearray(weights.read_bytes())
        data[7] ^= 1
        weights.write_bytes(data)
    elif how == "missing":
        weights.unlink()
    elif how == "manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b"wall_s", b"wall_t"))
    else:
        manifest.write_text("[" * 100_000)


@pytest.mark.parametrize("how", ["flipped", "missing", "manifest", "nested"])
def test_what_is_damaged_does_not_come_in(how: str, tmp_path: Path) -> None:
    store, other = stored(tmp_path / "a"), Store(tmp_path / "b")
    mirror = Mirror.at(str(tmp_path / "mirror"))
    mirror.send(KEY, store)
    corrupt(tmp_path / "mirror", how)
    with other.locked(KEY):
        if how in ("flipped", "missing"):
            with pytest.raises(StepError, match=r"not what its manifest says|cannot be read"):
                mirror.fetch(KEY, other)
        else:
            assert not mirror.fetch(KEY, other), "as if it had none"
            assert mirror.send(KEY, store), "and it is put right"
            assert mirror.fetch(KEY, other)
            return
    assert not other.path(KEY).exists() and list((other.root / ".temp").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../out", "/out", "model/../../out", ".", "a\\b", "a//b", MANIFEST, "a\0b"]
)
def test_a_manifest_names_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    from compose import store as store_module

    store, other = stored(tmp_path / "a"), Store(tmp_path / "b")
    mirror = Mirror.at(str(tmp_path / "mirror"))
    mirror.send(KEY, store)
    place = tmp_path / "mirror" / KEY / MANIFEST
    told = read_json(place)
    told["files"][name], told["sha256"][name] = 1, "0" * 64
    told["digest"] = store_module._digest(told)
    assert is_sound(told)
    place.write_text(json.dumps(told))
    with other.locked(KEY):
        assert not mirror.fetch(KEY, other)
    assert not (tmp_path / "out").exists() and not other.path(KEY).exists()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nosuch://a", "is no URL of a mirror"),
        ("s3://key:secret@bucket/a", "holds a user or a password"),
    ],
)
def test_a_url_that_is_none_is_the_users_mistake(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        Mirror.at(url)
    assert "secret" not in str(caught.value)


def test_the_command_line_refuses_such_a_url(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("schema: 1\nname: x\nmodel: {source: smollm2-135m-instruct}\nmatrix: default\n")
    done = CliRunner().invoke(app, ["run", str(file), "--mirror", "nosuch://a"])
    assert done.exit_code == 2 and "is no URL of a mirror" in done.output


def test_a_run_elsewhere_makes_nothing_that_the_mirror_has(url: str, tmp_path: Path) -> None:
    first, second = scripted.Script(), scripted.Script()
    assert go(tmp_path / "a", first, mirror=Mirror.at(url)).exit_code == 0
    assert len(first.done("step")) == 3
    assert go(tmp_path / "b", second, mirror=Mirror.at(url)).exit_code == 0
    assert second.done("step") == [] and len(second.done("quality")) == len(first.done("quality"))
    stores = [Store(tmp_path / name / "store") for name in "ab"]
    assert [stores[0].manifest(key) for key in stores[0].all_keys()] == [
        stores[1].manifest(key) for key in stores[0].all_keys()
    ]


def test_a_run_without_its_mirror_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        """A server that is not there."""

        def exists(self, _: str) -> bool:
            raise ConnectionRefusedError("nobody listens")

    shown: list[str] = []
    monkeypatch.setattr(scripted.Board, "print", lambda _, text, **__: shown.append(text))
    script: Any = scripted.Script()
    assert go(tmp_path, script, mirror=Mirror(Gone(), "x")).exit_code == 0
    assert len(script.done("step")) == 3
    assert any("is made here: the mirror cannot be read: Connection" in line for line in shown)
    assert any("is not at the mirror: the mirror cannot be written" in line for line in shown)


def test_a_run_sends_what_it_had_made_before(tmp_path: Path) -> None:
    go(tmp_path / "a", scripted.Script())
    mirror = Mirror.at(str(tmp_path / "mirror"))
    again = scripted.Script()
    go(tmp_path / "a", again, mirror=mirror)
    assert again.log == []
    assert len(list((tmp_path / "mirror").glob(f"*/{MANIFEST}"))) == 3
    shutil.rmtree(tmp_path / "a")
    go(tmp_path / "a", again, mirror=mirror)
    assert again.done("step") == []
