"""A Python process in which only some distributions can be imported, as if no other were installed.

`python core_alone.py FOLDER` decodes a folder with the core's libraries and prints what was hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


def canonical(name: str) -> str:
    """A distribution's name as the packaging standard writes it."""
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def closure(requirements: Iterable[str]) -> set[str]:
    """Distributions that are installed for these requirements, those of their own included."""
    from packaging.requirements import Requirement

    needed: set[tuple[str, str]] = set()
    waiting = [(Requirement(each), "") for each in requirements]
    while waiting:
        requirement, within = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": within}):
            continue
        for extra in ("", *requirement.extras):
            if (canonical(requirement.name), extra) not in needed:
                needed.add((canonical(requirement.name), extra))
                try:
                    stated = metadata.requires(requirement.name) or []
                except metadata.PackageNotFoundError:
                    continue
                waiting += [(Requirement(each), extra) for each in stated]
    return {name for name, _ in needed}


class Without:
    """A finder of modules that does not find some of them, nor some distributions."""

    def __init__(self, finder: Any, modules: frozenset[str], distributions: frozenset[str]) -> None:
        self.finder, self.modules, self.distributions = finder, modules, distributions

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As the finder's own, but None for what is hidden."""
        if name.partition(".")[0] in self.modules:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *given: Any, **named: Any) -> Any:
        """As the finder's own, less what is hidden."""
        find = getattr(self.finder, "find_distributions", lambda *_, **__: ())
        for each in find(*given, **named):
            if canonical(each.name) not in self.distributions:
                yield each


def hide(modules: Iterable[str], distributions: Iterable[str] = ()) -> None:
    """Let this process find neither these top-level modules nor these distributions."""
    hidden = frozenset(modules), frozenset(distributions)
    for name in [name for name in sys.modules if name.partition(".")[0] in hidden[0]]:
        del sys.modules[name]
    sys.meta_path[:] = [Without(finder, *hidden) for finder in sys.meta_path]  # type: ignore[misc]


def hide_all_but(requirements: Iterable[str]) -> set[str]:
    """Hide every installed distribution that these requirements do not need; their names."""
    kept = closure(requirements) | {"gateskip-compose"}
    owners = metadata.packages_distributions()
    modules = {m for m, of in owners.items() if not kept & {canonical(each) for each in of}}
    every = {canonical(each.name) for each in metadata.distributions()}
    hide(modules, every - kept)
    return every - kept


def decode(folder: Path) -> None:
    """Decode a gated folder in every mode, by gateskip and by what the folder carries itself."""
    import gateskip

    decoder = gateskip.load(folder)
    prompt = list(range(5, 25))
    tokens = {
        mode: decoder.generate([prompt], 8, mode=mode, budget=0.8, draft_weights="own").tokens
        for mode in ("plain", "skip", "speculate")
    }
    assert tokens["plain"] == tokens["speculate"]
    assert all(len(rows[0]) == 8 for rows in tokens.values())
    assert decode_by_itself(folder, prompt) == tokens["plain"][0]


def decode_by_itself(folder: Path, prompt: list[int]) -> list[int]:
    """What a folder's own code generates after `prompt`, at full compute."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(ids, attention_mask=torch.ones_like(ids), mode="plain", **settings)
    tokens: list[int] = text[0, len(prompt) :].tolist()
    return tokens


if __name__ == "__main__":
    import tomllib

    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    gone = hide_all_but(tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"])
    decode(Path(sys.argv[1]))
    print(*sorted(gone))
