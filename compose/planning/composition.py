"""The table of which stage may follow which, computed from the rules of the stages themselves.

A pair is tried alone, then with gates before it, then with gates between, because many stages need
gates. Rules that need sizes (groups, heads, widths) are left out; the planner checks those.
"""

from __future__ import annotations

from itertools import product

from compose.errors import RuleBroken
from compose.stages.base import RULES, Stage
from compose.stages.registry import STAGES

NEEDS = ("decode-needs-gates", "branches-need-gates")
YES, GATED = "yes", "with gates"


def example(use: str) -> Stage:
    """The stage with the parameters of its `example`."""
    return STAGES[use].model_validate({"use": use, **STAGES[use].example})


def verdict(before: str, after: str) -> str:
    """`yes`, `with gates` (before both, or between), or the rule that the pair breaks."""
    first, second, gates = example(before), example(after), example("gate")
    broken: list[str] = []
    for chain in ((first, second), (gates, first, second), (first, gates, second)):
        try:
            for place, stage in enumerate(chain):
                stage.check(None, chain[:place])
        except RuleBroken as error:
            broken.append(error.rule)
        else:
            return YES if len(chain) == 2 else GATED
    return next((rule for rule in broken if rule not in NEEDS), broken[0])


def as_markdown() -> str:
    """The table, a row for each stage that comes first, and the rules that it names."""
    uses = list(STAGES)
    lines = ["| first, then | " + " | ".join(f"`{use}`" for use in uses) + " |"]
    lines.append("|---" * (len(uses) + 1) + "|")
    verdicts = {pair: verdict(*pair) for pair in product(uses, uses)}
    for before in uses:
        cells = [verdicts[before, after] for after in uses]
        lines.append(f"| `{before}` | " + " | ".join(cells) + " |")
    named = [rule for rule in RULES if rule in verdicts.values()]
    return "\n".join([*lines, "", *(f"- Rule `{rule}`: {RULES[rule]}" for rule in named)])
