"""Malformed inputs, as tables of (input, message): one message with its place, nothing else.

Mistakes of grammar and names that a person makes are in test_parse.py; here are those of damaged,
generated and hostile files: pipelines, models, texts, gates, GGUF files, results.
"""

from __future__ import annotations

import json
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from count_malformed import WANTED, counted
from safetensors.torch import load_file, save_file

from compose import assets
from compose.artifacts.gguf.file import open_gguf
from compose.artifacts.gguf.read import check_gguf_source
from compose.artifacts.intake import require_source, require_values
from compose.artifacts.safetensors_header import stored_tensors
from compose.errors import ArtifactError, AssetError, PipelineError, PlanError, UserError
from compose.language.parse import load_pipeline
from compose.planning.planner import make_plan
from compose.results.io import load_results
from gateskip.checkpoint import GateFile, load, load_gates, read_gates, save_gates
from gateskip.errors import FormatError
from gateskip.gates.kinds import make_gates
from gateskip.quantization.folders import load_model

HANG_S = 30  # each is refused in milliseconds; an alarm ends one that would never be
HEAD = "schema: 1\nname: x\nmodel: {source: owner/name}\n"


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Ends what hangs, with TimeoutError; it judges no speed."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not refused within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refuse(folder: Path, content: str | bytes) -> str:
    """The message for a pipeline file, without the folder; a hang ends the test."""
    file = folder / "p.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with no_longer_than(HANG_S), pytest.raises((PipelineError, PlanError)) as caught:
        make_plan(load_pipeline(file))
    assert caught.value.exit_code == 2
    message = str(caught.value).replace(f"{folder}/", "")
    assert len(message) < 4000, "a message is something to read"
    assert message.isprintable() or "\n" in message
    return message


# --- Pipelines: bytes, size, depth, aliases ------------------------------------------------------


def bomb(levels: int, width: int) -> str:
    """Each anchor is a list of aliases of the one before it: width ** levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines) + "\n"


def merge_bomb(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


FILES: dict[str, tuple[str | bytes, str]] = {
    "alias bomb": (bomb(8, 9), "has more than 5000 values or 64 levels here"),
    "wide alias bomb": (bomb(3, 120), "more than 5000 values"),
    "merge bomb": (merge_bomb(9), "more than 5000 values"),
    "aliases one in another": (
        "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200))]),
        "more than 5000 values or 64 levels",
    ),
    "brackets": (
        "a: " + "[" * 3000,
        "p.yaml:1:67: lists and mappings are nested more than 64 deep",
    ),
    "closed brackets": (
        "a: " + "[" * 3000 + "]" * 3000,
        "p.yaml:1:67: lists and mappings are nested more than 64 deep",
    ),
    "braces": ("a: " + "{a: " * 500, "lists and mappings are nested more than 64 deep"),
    "dashes": ("a:\n  " + "- " * 500 + "x", "lists and mappings are nested more than 64 deep"),
    "indents": (
        "\n".join(" " * n + "a:" for n in range(200)),
        "lists and mappings are nested more than 64 deep",
    ),
    "brackets in a key": ("[" * 100 + ": 1", "p.yaml:1:65: lists and mappings are nested"),
    "many values": (HEAD + "more_seeds: [" + "1," * 20_000 + "]", "more than 5000 values"),
    "too long": (HEAD + "# " + "x" * (1 << 18), "larger than 64 KiB"),
    "utf-16": (HEAD.encode("utf-16"), "p.yaml:1: the file is not UTF-8 text"),
    "latin-1": (HEAD.encode() + "# caf\xe9\n".encode("latin-1"), "p.yaml:4: the file is not UTF-8"),
    "cut in a character": (HEAD.encode() + b"# \xe2\x82", "p.yaml:4: the file is not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "p.yaml:1: the file is not UTF-8"),
    "NUL": (b"schema: 1\nname: a\0b\n", "p.yaml:2:8: not YAML: unacceptable character U+0000"),
    "escape": (b"name: \x1b[31mred\n", "p.yaml:1:7: not YAML: unacceptable character U+001B"),
    "only NUL": (b"\0" * 100, "p.yaml:1:1: not YAML: unacceptable character U+0000"),
    "written NUL": ('name: "a\\0b"\n', "p.yaml:1:7: this text contains the character U+0000"),
    "written escape": ('name: "\\e[31m"\n', "p.yaml:1:7: this text contains the character U+001B"),
    "half a pair": ('name: "\\ud800"\n', "p.yaml:1:7: this text contains the character U+D800"),
    "NUL in a key": ('"a\\0": 1\n', "p.yaml:1:1: this text contains the character U+0000"),
    "bell in a path": (
        'schema: 1\nname: x\nmodel: {source: "\\a"}\n',
        "p.yaml:3:17: this text contains the character U+0007",
    ),
    "a tab as indent": ("model:\n\tsource: x\n", "p.yaml:2:1: not YAML: found character"),
    "python object": ("a: !!python/object/apply:os.system [ls]\n", "p.yaml:1:4: the tag"),
    "python name": ("a: !!python/name:os.system\n", "the tag"),
    "binary": ("a: !!binary aGVsbG8=\n", "the tag 'tag:yaml.org,2002:binary' is not supported"),
    "set": ("a: !!set {x, y}\n", "p.yaml:1:4: the tag 'tag:yaml.org,2002:set' is not supported"),
    "directive": ("%YAML 3.0\n---\na: 1\n", "p.yaml:1:"),
    "unclosed quote": ('name: "abc\n', "not YAML: "),
    "unclosed brace": ("model: {source: x\n", "not YAML: "),
    "two documents": ("a: 1\n---\nb: 2\n", "p.yaml:2:1: not YAML"),
    "a number with 5000 digits": ("seed: " + "9" * 5000, "cannot be read as int"),
    "int of words": ("seed: !!int many\n", "'many' cannot be read as int"),
    "int of nothing": ("seed: !!int ''\n", "'' cannot be read as int"),
    "float of words": ("seed: !!float many\n", "'many' cannot be read as float"),
    "bool of words": ("seed: !!bool perhaps\n", "'perhaps' cannot be read as bool"),
    "long key": ("? " + "k" * 5000 + "\n: 1\n", "kkk...: known: schema, name"),
    "long value": (HEAD + f"seed: {'x' * 5000}\n", "p.yaml:4:7: seed: expected a whole number"),
    "duplicate key": (HEAD + "seed: 1\nseed: 1\n", "p.yaml:5:1: the key 'seed' is given twice"),
    "duplicate section": (
        HEAD + "model: {source: a}\n",
        "p.yaml:4:1: the key 'model' is given twice",
    ),
    "duplicate stage": (
        HEAD + "stages:\n  a: {use: heal}\n  a: {use: heal}\n",
        "p.yaml:6:3: the key 'a' is given twice (first on line 5)",
    ),
    "null key": (HEAD + "~: 1\n", "p.yaml:4:1: a key must be text"),
    "list as a key": (HEAD + "? [a]\n: 1\n", "p.yaml:4:3: a key must be text"),
    "number as a key": (HEAD + "1: 1\n", "p.yaml:4:1: unknown key '1'"),
    "undefined alias": (HEAD + "seed: *x\n", "p.yaml:4:7: not YAML: found undefined alias"),
    "merge of text": (HEAD + "data: {<<: x}\n", "'<<' needs a mapping"),
    "too many chains": (
        HEAD
        + "stages: {"
        + ", ".join(f"s{n}: {{use: heal, steps: {n + 1}}}" for n in range(12))
        + "}\n"
        + "matrix: {"
        + ", ".join(f"x{a}: [none, s{a}, s{a + 1}, s{a + 2}]" for a in range(9))
        + "}\n",
        "p.yaml:5:1: the file asks for 262144 chains",
    ),
    "too many seeds": (
        HEAD + f"more_seeds: [{', '.join(map(str, range(1, 4000)))}]\nmatrix: default\n",
        "p.yaml:4:1: ",
    ),
    "a long chain": (
        HEAD + "stages: {h: {use: heal}}\npipelines: {a: [" + "h, " * 2000 + "]}\n",
        "a chain of 2000 stages: at most 100 are planned",
    ),
    "many misspelt stages": (
        HEAD + "stages: {h: {use: heal}}\npipelines: {a: [" + "g, " * 4000 + "]}\n",
        "no stage is named 'g'",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused_with_one_message(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    assert message in refuse(tmp_path, content)


# --- Pipelines: values ---------------------------------------------------------------------------

WHOLE, NUMBER = "expected a whole number, not ", "expected a number, not "
VALUES: list[tuple[str, str]] = [
    ("seed: -1", "4:7: seed: expected a number of at least 0, not -1"),
    ("seed: 4294967296", "4:7: seed: expected a number below 4294967296"),
    ("seed: 1.0", f"4:7: seed: {WHOLE}1.0"),
    ("seed: .nan", f"4:7: seed: {WHOLE}nan"),
    ("seed: .inf", f"4:7: seed: {WHOLE}inf"),
    ("seed: -.inf", f"4:7: seed: {WHOLE}-inf"),
    ("seed: 1e400", f"4:7: seed: {WHOLE}inf"),
    ("seed: yes", f"4:7: seed: {WHOLE}'yes'"),
    ("seed: true", f"4:7: seed: {WHOLE}true"),
    ("seed: ''", f"4:7: seed: {WHOLE}''"),
    ("seed:", f"seed: {WHOLE}nothing (null)"),
    ("seed: []", f"4:7: seed: {WHOLE}an empty list"),
    ("seed: {}", f"4:7: seed: {WHOLE}a mapping"),
    ("seed: 2001-01-01", f"4:7: seed: {WHOLE}'2001-01-01'"),
    ("seed: 0x", f"4:7: seed: {WHOLE}'0x'"),
    ("more_seeds: 1", "4:13: more_seeds: expected a list, not 1"),
    ("more_seeds: [0]", "4:14: seed 0 is listed twice"),
    ("more_seeds: [1, 1]", "4:17: seed 1 is listed twice"),
    ("more_seeds: [1, x]", f"4:17: more_seeds[1]: {WHOLE}'x'"),
    ("more_seeds: [-1]", "4:14: more_seeds[0]: expected a number of at least 0"),
    ("data: []", "4:7: data: expected a mapping, not an empty list"),
    ("data: {train: x}", "4:15: data.train: expected a mapping, not 'x'"),
    ("data: {train: {limit: 0}}", "data.train.limit: expected a number of at least 1, not 0"),
    ("data: {train: {limit: .inf}}", f"data.train.limit: {WHOLE}inf"),
    ("data: {train: {length: 7}}", "data.train.length: expected a number of at least 8"),
    ("data: {train: {source: ''}}", "data.train.source: expected text that is not empty"),
    ("data: {train: {source: 7}}", "data.train.source: expected text, not 7"),
    ("data: {train: {source: [a]}}", "data.train.source: expected text, not a list"),
    ("data: {train: {source: ../no.jsonl}}", "there is no file"),
    ("data: {train: {source: /no.txt}}", "there is no file '/no.txt'"),
    ("data: {train: {source: ~nobody/no.txt}}", "there is no file"),
    (f"data: {{train: {{source: /{'b' * 300}.txt}}}}", "there is no file"),
    (f"data: {{train: {{source: a/{'b' * 300}}}}}", "is too long for the name of a model or data"),
    ("data: {train: {mix: {sums: .inf}}}", "data.train.mix.sums: expected a finite number"),
    ("data: {train: {split: x}}", "unknown key 'split' in data.train"),
    ("data: {test: {}}", "unknown key 'test' in data"),
    ("stages: []", "stages: expected a mapping, not an empty list"),
    ("stages: {a: {}}", "4:13: stages.a lacks the key 'use'"),
    ("stages: {a: []}", "stages.a: expected a mapping, not an empty list"),
    ("stages: {a: {use: 1}}", "unknown stage '1'"),
    ("stages: {a: {use: [heal]}}", "unknown stage"),
    ("stages: {a: {use: null}}", "unknown stage 'None'"),
    ("stages: {a: {use: HEAL}}", "unknown stage 'HEAL': did you mean 'heal'?"),
    ("stages: {'': {use: heal}}", "'' is not a name"),
    ("stages: {'a b': {use: heal}}", "'a b' is not a name"),
    ("stages: {../a: {use: heal}}", "'../a' is not a name"),
    ("stages: {a/b: {use: heal}}", "'a/b' is not a name"),
    ("stages: {-a: {use: heal}}", "'-a' is not a name"),
    ("stages: {.a: {use: heal}}", "'.a' is not a name"),
    ("stages: {'<b>': {use: heal}}", "'<b>' is not a name"),
    ("stages: {источник: {use: heal}}", "is not a name"),
    ("stages: {dense: {use: heal}}", "'dense' is a reserved name"),
    ("stages: {source: {use: heal}}", "'source' is a reserved name"),
    ("stages: {default: {use: heal}}", "'default' is a reserved name"),
    ("stages: {a: {use: heal, steps: -1}}", "stages.a.steps: expected a number of at least"),
    ("stages: {a: {use: heal, steps: 1.5}}", f"stages.a.steps: {WHOLE}1.5"),
    ("stages: {a: {use: heal, lr: .nan}}", "stages.a.lr: expected a"),
    ("stages: {a: {use: heal, lr: .inf}}", "stages.a.lr: expected a finite number"),
    ("stages: {a: {use: heal, lr: 1e999}}", "stages.a.lr: expected a finite number"),
    ("stages: {a: {use: heal, lr: 0}}", "stages.a.lr: expected a number above 0"),
    ("stages: {a: {use: heal, lr: -1}}", "stages.a.lr: expected a number above 0"),
    ("stages: {a: {use: heal, lr: fast}}", f"stages.a.lr: {NUMBER}'fast'"),
    ("stages: {a: {use: heal, lr: '1e-4'}}", f"stages.a.lr: {NUMBER}'1e-4'"),
    ("stages: {a: {use: gate, budget: 0}}", "stages.a.budget: expected a number above 0"),
    ("stages: {a: {use: gate, budget: .nan}}", "stages.a.budget: expected a finite number"),
    ("stages: {a: {use: gate, budget: -.inf}}", "stages.a.budget: expected a finite number"),
    ("stages: {a: {use: gate, rank: 1}}", "stages.a.rank: expected a number of at least 2"),
    ("stages: {a: {use: gate, recipe: [ours]}}", "stages.a.recipe: expected 'ours' or 'paper'"),
    ("stages: {a: {use: gate, recipe: {}}}", "stages.a.recipe: expected 'ours' or 'paper'"),
    (
        "stages: {a: {use: gate, on_policy: {temperature: .inf}}}",
        "stages.a.on_policy.temperature: expected a finite number",
    ),
    (
        "stages: {a: {use: int4, allocate: {size_mb: .inf}}}",
        "stages.a.allocate.size_mb: expected a finite number",
    ),
    ("stages: {a: {use: gate, scales: 1}}", "stages.a.scales: expected true or false, not 1"),
    ("stages: {a: {use: gate, scales: 'no'}}", "stages.a.scales: expected true or false"),
    ("stages: {a: {use: gate, init: ''}}", "stages.a.init: expected text that is not empty"),
    ("stages: {a: {use: gate, init: /no.safetensors}}", "there is no file '/no.safetensors'"),
    ("stages: {a: {use: gate, kind: null}}", "stages.a.kind: expected 'scalar'"),
    ("stages: {a: {use: skip, budget: 1.1}}", "stages.a.budget: expected a number of at most 1"),
    ("stages: {a: {use: skip, budget: .inf}}", "stages.a.budget: expected a"),
    ("stages: {a: {use: gptq, bits: 5}}", "stages.a.bits: expected"),
    ("stages: {a: {use: gptq, bits: four}}", "stages.a.bits: expected"),
    ("stages: {a: {use: gptq, group_size: 0}}", "stages.a.group_size: expected"),
    ("stages: {a: {use: bnb, format: nf5}}", "stages.a.format: expected"),
    ("stages: {a: {use: bnb, format: null}}", "stages.a.format: expected"),
    ("stages: {a: {use: prune-width, ratio: 1}}", "stages.a.ratio: expected a number below 1"),
    ("stages: {a: {use: prune-width, ratio: -0.1}}", "stages.a.ratio: expected a number"),
    ("stages: {a: {use: drop-layers, count: 0}}", "stages.a.count: expected a number of at least"),
    ("stages: {a: {use: drop-layers, layers: [-1]}}", "stages.a"),
    ("stages: {a: {use: drop-layers, layers: x}}", "stages.a.layers: expected a list"),
    ("pipelines: []", "pipelines: expected a mapping, not an empty list"),
    ("pipelines: {a: x}", "4:16: pipelines.a: expected a list, not 'x'"),
    ("pipelines: {a: [x]}", "4:17: no stage is named 'x'"),
    ("pipelines: {a: [[x]]}", "pipelines.a[0]: expected text, not a list"),
    ("pipelines: {a: [1]}", "pipelines.a[0]: expected text, not 1"),
    ("pipelines: {dense: []}", "'dense' is a reserved name"),
    ("pipelines: {../../a: []}", "'../../a' is not a name"),
    ("matrix: 1", "matrix: expected a mapping, not 1"),
    ("matrix: []", "matrix: expected a mapping, not an empty list"),
    ("matrix: everything", "matrix: 'everything' is not a matrix"),
    ("matrix: {a: none}", "matrix.a: expected a list, not 'none'"),
    ("matrix: {a: [none, x]}", "4:20: no stage is named 'x'"),
    ("matrix: {a: [[]]}", "4:14: matrix.a[0]: expected"),
    ("matrix: {a: [none, none]}", "axis 'a' has the choice none twice"),
    ("matrix: {a: [1.5]}", "matrix.a[0]: expected text or a list, not 1.5"),
    ("matrix: {exclude: []}", "the matrix has no axis"),
    ("matrix: {a: [none], exclude: {}}", "matrix.exclude: expected a list, not a mapping"),
    ("matrix: {a: [none], exclude: [x]}", "matrix.exclude[0]: expected a mapping, not 'x'"),
    ("matrix: {a: [none], exclude: [{a: 1}]}", "matrix.exclude[0].a: expected text or a list"),
    ("benchmark: 1", "benchmark: expected a mapping, not 1"),
    ("benchmark: {threads: 0}", "benchmark.threads: expected a number of at least 1"),
    ("benchmark: {threads: .inf}", f"benchmark.threads: {WHOLE}inf"),
    ("benchmark: {baseline: ''}", "benchmark.baseline: expected text that is not empty"),
    ("benchmark: {baseline: gone}\nmatrix: default", "no cell is named 'gone'"),
    ("benchmark: {against: [x, x]}", "benchmark.against: 'x' is listed twice"),
    ("benchmark: {against: vllm}", "4:13: peer 'vllm': known: llama.cpp"),
    ("benchmark: {speed: {repeats: 0}}", "speed.repeats: expected a number of at least 1"),
    ("benchmark: {speed: {repeats: 1e3}}", f"speed.repeats: {WHOLE}1000.0"),
    ("benchmark: {speed: {min_seconds: -1}}", "speed.min_seconds: expected a number of at least 0"),
    ("benchmark: {speed: {min_seconds: .nan}}", "speed.min_seconds: expected a"),
    ("benchmark: {speed: {min_seconds: .inf}}", "speed.min_seconds: expected a finite number"),
    ("benchmark: {speed: {batch_sizes: []}}", "batch_sizes: expected a list of at least 1"),
    ("benchmark: {speed: {batch_sizes: [0]}}", "batch_sizes[0]: expected a number of at least 1"),
    ("benchmark: {speed: {contexts: [128, 128]}}", "contexts: 128 is listed twice"),
    ("benchmark: {speed: {prompts: no.jsonl}}", "4:30: there is no file"),
    ("benchmark: {speed: {prompts: ''}}", "speed.prompts: expected text that is not empty"),
    ("benchmark: {quality: {tasks: arc}}", "quality.tasks: expected a list, not 'arc'"),
    ("benchmark: {quality: {tasks: [a, a]}}", "quality.tasks: 'a' is listed twice"),
    ("benchmark: {quality: {perplexity: 3}}", "quality.perplexity: expected a list, not 3"),
    ("benchmark: {quality: {perplexity: [3]}}", "quality.perplexity[0]: expected text, not 3"),
    ("benchmark: {quality: {perplexity_tokens: 1}}", "expected a number of at least 2, not 1"),
    ("benchmark: {quality: {limit: null}}", f"quality.limit: {WHOLE}nothing"),
    ("benchmark: {quality: {own_answers: 3}}", "quality.own_answers: expected a mapping"),
    ("benchmark: {lossless: {prompts: 0}}", "lossless.prompts: expected a number of at least 1"),
    ("benchmark: {lossless: {source: /no.jsonl}}", "there is no file '/no.jsonl'"),
    ("export: []", "export: expected a mapping, not an empty list"),
    ("export: {dense: x}", "export.dense: expected a mapping, not 'x'"),
    ("export: {dense: {}}", "export.dense lacks the key 'to'"),
    ("export: {dense: {to: ''}}", "export.dense.to: expected text that is not empty"),
    ("export: {gone: {to: x}}\nmatrix: default", "no cell is named 'gone'"),
]
HEADS: list[tuple[str, str]] = [
    ("schema: 1\n", "1:1: the file lacks the key 'model'"),
    ("schema: 0\nname: x\nmodel: {source: a}\n", "1:9: schema: expected 1, not 0"),
    ("schema: '1'\nname: x\nmodel: {source: a}\n", "1:9: schema: expected 1, not '1'"),
    ("schema: true\nname: x\nmodel: {source: a}\n", "1:9: schema: expected 1, not 'true'"),
    ("name: ''\nmodel: {source: a}\n", "1:7: name: '' is not a name"),
    ("name: ../x\nmodel: {source: a}\n", "1:7: name: '../x' is not a name"),
    ("name: a/b\nmodel: {source: a}\n", "1:7: name: 'a/b' is not a name"),
    ("name: .\nmodel: {source: a}\n", "1:7: name: '.' is not a name"),
    ("name: 7\nmodel: {source: a}\n", "1:7: name: expected text, not 7"),
    ("name: null\nmodel: {source: a}\n", "1:7: name: expected text, not nothing"),
    (f"name: {'x' * 5000}/\nmodel: {{source: a}}\n", "xxx... is not a name"),
    ("name: x\nmodel: smollm2\n", "2:8: model: expected a mapping, not 'smollm2'"),
    ("name: x\nmodel: []\n", "2:8: model: expected a mapping, not an empty list"),
    ("name: x\nmodel: {}\n", "2:1: model lacks the key 'source'"),
    ("name: x\nmodel: {source: ''}\n", "2:17: model.source: expected text that is not empty"),
    ("name: x\nmodel: {source: 1}\n", "2:17: model.source: expected text, not 1"),
    ("name: x\nmodel: {source: [a]}\n", "2:17: model.source: expected text, not a list"),
    ("name: x\nmodel: {source: ./no}\n", "there is no model (config.json) in"),
    ("name: x\nmodel: {source: /no}\n", "there is no model (config.json) in '/no'"),
    ("name: x\nmodel: {source: ~nobody/no}\n", "there is no model (config.json) in"),
    (f"name: x\nmodel: {{source: a{'b' * 300}}}\n", "is too long for the name of a model"),
    (f"name: x\nmodel: {{source: /{'b' * 300}}}\n", "there is no model (config.json) in"),
    ("name: x\nmodel: {source: a, dtype: int8}\n", "model.dtype: expected 'float32', 'bfloat16'"),
    ("name: x\nmodel: {source: a, trust_remote_code: true}\n", "unknown key 'trust_remote_code'"),
]


@pytest.mark.parametrize(("line", "message"), VALUES, ids=[line for line, _ in VALUES])
def test_a_value_is_refused_at_its_place(line: str, message: str, tmp_path: Path) -> None:
    assert message in refuse(tmp_path, f"{HEAD}{line}\n")


@pytest.mark.parametrize(("text", "message"), HEADS)
def test_the_head_of_a_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refuse(tmp_path, text)


# --- Models --------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _cut(share: float) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return cut


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _entry(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: _header(folder, lambda header: header[name].update(changes))


NORM = "model.norm.weight"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is not a readable JSON"),
    "config cut short": (_write("config.json", b'{"model_type": "lla'), "not a readable JSON"),
    "config is a list": (_write("config.json", b"[]"), "config.json is not a readable JSON"),
    "config nested": (_write("config.json", b"[" * 100_000), "config.json is not a readable JSON"),
    "config not text": (_write("config.json", b"\xff\xfe"), "config.json is not a readable JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "pickled weights": (_pickle, "has pickled weights (pytorch_model.bin), which run code"),
    "empty weights": (_cut(0), "does not begin with the length of a header"),
    "weights cut in the header": (_cut(0.001), "is cut short in its header"),
    "weights cut short": (_cut(0.5), "it is cut short: 'model."),
    "weights cut by little": (_cut(0.9999), "it is cut short: 'model."),
    "weights are text": (_write("model.safetensors", b"<html>404</html>"), "safetensors file"),
    "weights are a pointer": (
        _write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors is not a complete safetensors file",
    ),
    "header no JSON": (
        _write("model.safetensors", (4).to_bytes(8, "little") + b"abcd"),
        "its header is not JSON",
    ),
    "header nested": (
        _write("model.safetensors", (90_000).to_bytes(8, "little") + b"[" * 90_000),
        "its header is not JSON",
    ),
    "header a list": (
        _write("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        "its header is not a mapping",
    ),
    "huge header": (
        _write("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
        "does not begin with the length of a header",
    ),
    "negative shape": (_entry(NORM, shape=[-64]), "no valid entry for the tensor 'model.norm"),
    "shape of words": (_entry(NORM, shape="big"), "no valid entry for the tensor 'model.norm"),
    "other shape": (_entry(NORM, shape=[65]), "bytes, too few or too many for shape [65]"),
    "other type": (_entry(NORM, dtype="F64"), "bytes, too few or too many for shape [64]"),
    "offsets turned": (_entry(NORM, data_offsets=[8, 0]), "no valid entry for the tensor"),
    "offsets beyond": (
        _entry(NORM, data_offsets=[0, 1 << 50]),
        "is cut short: 'model.norm.weight'",
    ),
    "no tokenizer": (_no_tokenizer, "has no tokenizer (tokenizer.json"),
    "index of nothing": (lambda f: _index(f, {"a": "gone.safetensors"}), "'gone.safetensors'"),
    "index leaves its folder": (lambda f: _index(f, {"a": "../x.safetensors"}), "'../x.safe"),
    "index of a lost tensor": (
        lambda f: _index(f, {"lost.weight": "model.safetensors"}),
        "names the tensor lost.weight, which no file has",
    ),
    "index no mapping": (lambda f: _index(f, []), "is not readable JSON that maps tensors"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_is_refused_by_its_files(case: str, model: Path) -> None:
    harm, message = MODELS[case]
    harm(model)
    with pytest.raises(AssetError) as caught:
        require_source(model)
    assert message in str(caught.value)
    assert str(model) in str(caught.value)


def test_a_pipeline_on_such_a_folder_is_refused_at_its_line(model: Path, tmp_path: Path) -> None:
    from compose.planning.prepare import load_plan

    file = tmp_path / "p.yaml"
    file.write_text(f"schema: 1\nname: x\nmodel:\n  source: {model}\nmatrix: default\n")
    load_plan(file, tmp_path / "cache")
    _cut(0.5)(model)
    with pytest.raises(AssetError, match=r"p\.yaml:4:11: .*cut short"):
        load_plan(file, tmp_path / "cache")


VALUES_OF: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (
        lambda f: _weights(f, lambda t: t[NORM].__setitem__(0, float("nan"))),
        "1 numbers of the tensor model.norm.weight are not finite",
    ),
    "infinite": (
        lambda f: _weights(f, lambda t: t[NORM].fill_(float("-inf"))),
        "64 numbers of the tensor model.norm.weight are not finite",
    ),
    "small vocabulary": (
        lambda f: _config(f, vocab_size=500),
        "the tokenizer has 512 tokens, but the model only 500 embeddings",
    ),
    "tokenizer cut short": (_write("tokenizer.json", b'{"version": "1.0", '), "cannot be read"),
    "tokenizer empty": (_write("tokenizer.json", b""), "its tokenizer cannot be read"),
    "unknown type": (lambda f: _config(f, model_type="llamma"), "no model type 'llamma'"),
    "no type": (lambda f: _config(f, model_type=None), "no model type None"),
    "own code": (
        lambda f: _config(f, model_type="mine", auto_map={"AutoModelForCausalLM": "m.Mine"}),
        "no model type 'mine', and code in a model folder is never run",
    ),
}


@pytest.mark.parametrize("case", VALUES_OF)
def test_a_model_folder_is_refused_by_its_values(case: str, model: Path) -> None:
    harm, message = VALUES_OF[case]
    harm(model)
    with pytest.raises(AssetError) as caught:
        require_values(model, "owner/name")
    assert message in str(caught.value)
    assert str(caught.value).startswith("owner/name: ") and str(model) not in str(caught.value)


LOADED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "lost": (lambda t: t.pop(NORM), "the weights lack the tensor model.norm.weight"),
    "several lost": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers.3.")],
        "lack the tensor model.layers.3.",
    ),
    "narrow": (
        lambda t: t.update({NORM: torch.ones(32)}),
        "the tensor model.norm.weight has the shape [32], and the config asks for [64]",
    ),
    "turned": (
        lambda t: t.update(
            {"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T}
        ),
        "has the shape [64, 128], and the config asks for [128, 64]",
    ),
}


@pytest.mark.parametrize("case", LOADED)
def test_a_tensor_is_never_made_up(case: str, model: Path) -> None:
    harm, message = LOADED[case]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        harm(tensors)
        tensors.update({name: value.contiguous() for name, value in tensors.items()})

    _weights(model, change)
    with pytest.raises(FormatError) as caught:
        load_model(model)
    assert message in str(caught.value)


LAYER = "model.layers.1.mlp.up_proj"
PACKED: list[tuple[str, str]] = [
    ("int4", f"{LAYER}.codes"),
    ("int4", f"{LAYER}.scale"),
    ("int4", f"{LAYER}.minimum"),
    ("int8", f"{LAYER}.codes"),
    ("int8", f"{LAYER}.scale"),
    ("int4", NORM),
    ("int4", "model.embed_tokens.codes"),
]


@pytest.mark.parametrize(("use", "tensor"), PACKED)
def test_a_packed_tensor_that_is_missing_is_refused_by_name(
    use: str,
    tensor: str,
    tiny_llama: Path,
    grid_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(grid_folder(tiny_llama, use), folder)
    load_model(folder)  # whole, it passes
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError) as caught:
        load_model(folder)
    assert f"lack the tensor {tensor}" in str(caught.value)


def test_a_whole_model_passes(tiny_llama: Path) -> None:
    require_source(tiny_llama)
    require_values(tiny_llama, str(tiny_llama))
    assert stored_tensors(tiny_llama / "model.safetensors")[NORM].shape == (64,)


# --- Texts ---------------------------------------------------------------------------------------

TEXTS: list[tuple[str, bytes, str]] = [
    ("a.txt", b"", "a.txt holds no rows"),
    ("a.txt", b" \n\n \t\n", "holds no rows"),
    ("a.txt", b"good\n\nb\xe9d\n", "a.txt:3: the text is not UTF-8"),
    ("a.txt", "text".encode("utf-16"), "a.txt:1: the text is not UTF-8"),
    ("a.jsonl", b"", "holds no rows"),
    ("a.jsonl", b'{"text": "a"}\nnot json\n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b"\n\n\n{]\n", "a.jsonl:4: not JSON"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
    ("a.jsonl", b"3\n", "row 1 of a.jsonl is no text"),
    ("a.jsonl", b"null\n", "row 1 of a.jsonl is no text"),
    ("a.jsonl", b'{"text": 3}\n', "row 1 of a.jsonl is no text"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "row 2 of a.jsonl is no text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "row 1 of a.jsonl holds half of a surrogate pair"),
    ("a.jsonl", b'{"messages": "hello"}\n', "row 1 of a.jsonl is no chat"),
    ("a.jsonl", b'{"messages": [{"text": "x"}]}\n', "row 1 of a.jsonl is no chat"),
    ("a.jsonl", b'{"messages": [3]}\n', "row 1 of a.jsonl is no chat"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n', "a.jsonl:2: the text is not UTF-8"),
    ("a.json", b"", "a.json: not JSON"),
    ("a.json", b"3", "a.json: holds no list of rows"),
    ("a.json", b'{"a": [], "b": []}', "a.json: holds no list of rows"),
    ("a.json", b"[" * 100_000, "a.json: not JSON"),
    ("a.json", b"[1, 2]", "row 1 of a.json is no text"),
    ("a.txt.xz", b"not packed", "cannot read"),
    ("a.txt.xz", b"\xfd7zXZ\x00\x00\x04cut", "cannot read"),
    ("a.parquet", b"PAR1", "of a kind that is not read here"),
]


@pytest.mark.parametrize(("name", "content", "message"), TEXTS)
def test_a_text_is_refused_with_its_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError) as caught:
        assets.load_texts(str(tmp_path / name))
    assert message in str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "data: {train: {length: 513}}\nstages: {g: {use: heal}}",
            "4:24: 513 tokens are more than",
        ),
        ("stages: {g: {use: gate, length: 600}}", "4:33: 600 tokens are more than the 512"),
        ("benchmark: {speed: {prompt_tokens: 500}}", "4:36: 628 tokens are more than the 512"),
        ("benchmark: {speed: {contexts: [64, 9000]}}", "4:36: 9128 tokens are more than the 512"),
    ],
)
def test_what_is_longer_than_the_context_is_refused_at_its_line(
    line: str, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from compose.planning.prepare import load_plan

    file = tmp_path / "p.yaml"
    file.write_text(
        f"schema: 1\nname: x\nmodel: {{source: {tiny_llama}}}\n{line}\nmatrix: default\n"
    )
    with pytest.raises(PlanError) as caught:
        load_plan(file, tmp_path / "cache")
    assert message in str(caught.value)


# --- Gates ---------------------------------------------------------------------------------------


def _gates(folder: Path, branches: int = 8, hidden: int = 64) -> Path:
    file = GateFile(make_gates("scalar", branches, hidden), "project", {0.8: [0.0] * branches})
    save_gates(folder, file)
    return folder


def _meta(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "gateskip.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _without(key: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "gateskip.json"
        meta = json.loads(path.read_text())
        del meta[key]
        path.write_text(json.dumps(meta))

    return change


def _stated(text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "gates.safetensors"
        save_file(load_file(file), file, metadata={"gates": text})

    return change


def _cut_gates(folder: Path) -> None:
    file = folder / "gates.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _nan_gates(folder: Path) -> None:
    file = folder / "gates.safetensors"
    state = load_file(file)
    state["weight"][0, 0] = float("nan")
    save_file(state, file, metadata={"gates": "scalar 8 64"})


GATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (_meta(format=3), "format 3; this version reads format 2"),
    "older": (_meta(format=1), "format 1; this version reads format 2"),
    "no format": (_without("format"), "format None; this version reads format 2"),
    "unknown kind": (_meta(kind="matrix"), "gates of kind 'matrix'"),
    "kind a list": (_meta(kind=["scalar"]), "gates of kind ['scalar']"),
    "no thresholds": (_without("thresholds"), "does not describe gates (KeyError: 'thresholds')"),
    "thresholds a list": (_meta(thresholds=[]), "does not describe gates"),
    "threshold of words": (_meta(thresholds={"0.8": ["often"] * 8}), "does not describe gates"),
    "threshold NaN": (_meta(thresholds={"0.8": [float("nan")] * 8}), "nan is not a number"),
    "budget of words": (_meta(thresholds={"most": [0.0] * 8}), "does not describe gates"),
    "few thresholds": (_meta(thresholds={"0.8": [0.0] * 7}), "thresholds for other branches"),
    "kept of words": (_meta(kept={"0.8": "much"}), "does not describe gates"),
    "training a number": (_meta(training=3), "does not describe gates"),
    "sizes unknown": (_meta(sizes={"width": 3}), "holds scalar gates of other sizes"),
    "not JSON": (_write("gateskip.json", b"{"), "gateskip.json is not readable JSON"),
    "not a mapping": (_write("gateskip.json", b"[]"), "gateskip.json is not a mapping"),
    "nested": (_write("gateskip.json", b"[" * 100_000), "gateskip.json is not readable JSON"),
    "not text": (_write("gateskip.json", b"\xff"), "gateskip.json is not readable JSON"),
    "cut short": (_cut_gates, "gates.safetensors cannot be read as gates"),
    "empty": (_write("gates.safetensors", b""), "cannot be read as gates"),
    "other kind": (_stated("vector 8 64"), "holds no scalar gates: found vector"),
    "nothing stated": (_stated(""), "holds no scalar gates: found nothing"),
    "no sizes": (_stated("scalar"), "holds scalar gates of other sizes"),
    "sizes of words": (_stated("scalar many 64"), "holds scalar gates of other sizes"),
    "huge sizes": (_stated("scalar 100000 100000"), "it states 100000 branches of 100000 inputs"),
    "negative sizes": (_stated("scalar -8 64"), "holds scalar gates of other sizes"),
    "fewer": (_stated("scalar 7 64"), "holds scalar gates of other sizes"),
    "NaN": (_nan_gates, "holds numbers that are not finite, in weight"),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_are_refused_by_name(case: str, tmp_path: Path) -> None:
    harm, message = GATES[case]
    harm(_gates(tmp_path))
    with pytest.raises(FormatError) as caught:
        load_gates(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("branches", "hidden"), [(6, 64), (8, 32), (16, 64)])
def test_gates_of_another_model_are_refused(model: Path, branches: int, hidden: int) -> None:
    _gates(model, branches, hidden)
    wanted = (
        f"belongs to another model: {branches} branches of {hidden} inputs, "
        "but this model has 8 of 64"
    )
    for backend in ("gathered", "reference"):
        with pytest.raises(FormatError, match=wanted):
            load(model, backend=backend)  # type: ignore[arg-type]


def test_a_pickle_is_no_gates(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "g.safetensors")
    with pytest.raises(FormatError, match="cannot be read as gates"):
        read_gates(tmp_path / "g.safetensors")


# --- GGUF ----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 128,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    entries = (
        [text("general.name") + struct.pack("<I", 8) + text("x")] if entries is None else entries
    )
    tensors = [tensor("a", (32,), 0, 0)] if tensors is None else tensors
    count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries + tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def entry(kind: int, value: bytes) -> bytes:
    return text("k") + struct.pack("<I", kind) + value


GGUF_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is not a GGUF file"),
    "old": (b"GGJT" + bytes(100), "it is not a GGUF file"),
    "page": (b"<html>", "it is not a GGUF file"),
    "letters alone": (b"GGUF", "is cut short"),
    "version 1": (gguf(version=1), "it is GGUF version 1"),
    "version 4": (gguf(version=4), "it is GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its numbers are big-endian"),
    "many tensors": (gguf(counts=(1 << 40, 0)), "states 1099511627776 tensors"),
    "many entries": (gguf(counts=(0, 1 << 60)), "entries"),
    "more entries": (gguf(counts=(1, 900)), "is cut short"),
    "more tensors": (gguf(counts=(9, 1), data=0), "is cut short"),
    "huge key": (gguf([struct.pack("<Q", 1 << 40) + b"k"]), "is cut short"),
    "long key": (gguf([text("k" * 70_000) + struct.pack("<II", 4, 0)]), "a name in it has 70,000"),
    "long text": (gguf([text("k") + struct.pack("<IQ", 8, 1 << 40)]), "is cut short"),
    "unknown type": (gguf([entry(13, b"")]), "a value of type 13"),
    "long list": (gguf([entry(9, struct.pack("<IQ", 4, 1 << 60))]), "is cut short"),
    "long list of texts": (gguf([entry(9, struct.pack("<IQ", 8, 1 << 60))]), "is cut short"),
    "lists in lists": (
        gguf([entry(9, struct.pack("<IQ", 9, 1) * 9 + struct.pack("<IQ", 0, 0))]),
        "nests lists too deeply",
    ),
    "alignment 0": (
        gguf([text("general.alignment") + struct.pack("<II", 4, 0)]),
        "its alignment is 0",
    ),
    "alignment of words": (
        gguf([text("general.alignment") + struct.pack("<I", 8) + text("x")]),
        "its alignment is 'x'",
    ),
    "dimensions": (gguf(tensors=[tensor("a", (1,) * 9, 0, 0)]), "a has 9 dimensions"),
    "unknown tensor": (
        gguf(tensors=[tensor("a", (32,), 99, 0)]),
        "a is stored as GGML type 99",
    ),
    "half a block": (gguf(tensors=[tensor("a", (33,), 2, 0)]), "a has the sizes (33,)"),
    "tensor beyond": (gguf(tensors=[tensor("a", (64,), 0, 0)]), "cut short: a would end at byte"),
    "offset beyond": (
        gguf(tensors=[tensor("a", (32,), 0, 1 << 60)]),
        "cut short: a would end at byte",
    ),
    "huge shape": (
        gguf(tensors=[tensor("a", (1 << 62,) * 4, 0, 0)]),
        "cut short: a would end at byte",
    ),
    "twice": (gguf(tensors=[tensor("a", (8,), 0, 0)] * 2), "a occurs twice in it"),
    "no data": (gguf(data=0), "cut short: a would end at byte"),
}


@pytest.mark.parametrize("case", GGUF_FILES)
def test_a_gguf_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = GGUF_FILES[case]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_gguf(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith("m.gguf cannot be read: ")


def test_a_whole_gguf_file_is_read(tmp_path: Path) -> None:
    numbers = entry(9, struct.pack("<IQ4I", 4, 4, 1, 2, 3, 4))
    (tmp_path / "m.gguf").write_bytes(gguf([numbers], [tensor("a", (32, 2), 2, 64)]))
    header = open_gguf(tmp_path / "m.gguf")
    assert header.metadata == {"k": [1, 2, 3, 4]}
    assert (header.tensors["a"].storage.name, header.tensors["a"].shape) == ("Q4_0", (2, 32))


STATED = {
    "general.architecture": (8, text("llama")),
    "tokenizer.ggml.model": (8, text("llama")),
    "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 1) + text("a")),
    "llama.context_length": (4, struct.pack("<I", 8)),
    "llama.embedding_length": (4, struct.pack("<I", 32)),
    "llama.block_count": (4, struct.pack("<I", 0)),
    "llama.feed_forward_length": (4, struct.pack("<I", 8)),
    "llama.attention.head_count": (4, struct.pack("<I", 1)),
    "llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-5)),
}
CONFIGS: dict[str, tuple[dict[str, tuple[int, bytes]], str]] = {
    "text for a size": ({"llama.embedding_length": (8, text("x"))}, "does not make a config"),
    "no heads": (
        {"llama.attention.head_count": (4, struct.pack("<I", 0))},
        "does not make a config",
    ),
    "endless layers": ({"llama.block_count": (4, b"\xff" * 4)}, "llama.block_count is 4294967295"),
    "half a layer": ({"llama.block_count": (6, struct.pack("<f", 0.5))}, "block_count is 0.5"),
    "no list": ({"llama.block_count": (9, struct.pack("<IQ", 4, 0))}, "does not make a config"),
    "wide heads": ({"llama.attention.key_length": (10, b"\xff" * 8)}, "key_length is 18446"),
    "names of others": ({"general.architecture": (8, text("\x1b[31mx"))}, r"is '\x1b[31mx'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_gguf_file_with_a_senseless_config_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[case]
    entries = [
        text(key) + struct.pack("<I", kind) + value
        for key, (kind, value) in {**STATED, **changes}.items()
    ]
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf(entries, [tensor("token_embd.weight", (32, 1), 0, 0)]))
    with pytest.raises(ArtifactError) as caught:
        check_gguf_source(file)
    assert message in str(caught.value)


# --- Results -------------------------------------------------------------------------------------

RESULTS: list[tuple[bytes, str]] = [
    (b"", "this is not JSON"),
    (b"\xff\xfe", "this is not JSON"),
    (b"[" * 100_000, "this is not JSON"),
    (b"3", "the file"),
    (b"{}", "Field required"),
    (b'{"schema_version": 4}', "schema version 4 is newer than 3"),
    (b'{"schema_version": 1}', "schema version 1 is older than 3"),
    (b'{"schema_version": "3"}', "schema_version"),
    (b'{"schema_version": null}', "schema_version"),
    (b'{"schema_version": 3, "run": "x", "cells": {}}', "cells"),
    (b'{"schema_version": 3, "run": "x", "cells": [3]}', "cells[0]"),
    (b'{"schema_version": 3, "run": ["x"], "cells": []}', "run"),
    (
        b'{"schema_version": 3, "run": "x", "cells": [{"name": "a", "chain": [], "status": "ok"},'
        b' {"name": "a", "chain": [], "status": "ok"}]}',
        "two cells are called 'a'",
    ),
    (
        b'{"schema_version": 3, "run": "x", "cells": [{"name": "a", "chain": [], "status": "ok",'
        b' "seconds": NaN, "notes": 3}]}',
        "results.json",
    ),
]


@pytest.mark.parametrize(("content", "message"), RESULTS)
def test_results_are_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_results(tmp_path)
    assert message in str(caught.value)
    assert caught.value.file == str(tmp_path / "results.json")


def test_the_tables_have_250_rows() -> None:
    assert sum(counted(Path(__file__)).values()) >= WANTED
