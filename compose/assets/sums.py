"""Sums and short word problems with their answers, drawn from a seed: text to learn arithmetic by.

Each row repeats one form of problem with other numbers. No row has the form of the task
`arithmetic` (examples `a + b = c`, an empty line between two), whose answers are scored.
"""

from __future__ import annotations

import random
from collections.abc import Callable

ROWS = 4000
LENGTHS = (6, 14)  # problems in a row, least and most
NAMES = ("Mia", "Omar", "Lena", "Ravi", "Chloe", "Jonas", "Aiko", "Sam")
THINGS = ("pears", "stamps", "marbles", "books", "coins", "shells", "pencils", "tickets")

Problem = Callable[[random.Random], str]


def sums_rows() -> list[str]:
    """ROWS rows of text, always the same."""
    draws = random.Random(20_251_013)
    rows = []
    for number in range(ROWS):
        problem, between = FORMS[number % len(FORMS)]
        count = draws.randint(*LENGTHS)
        rows.append(between.join(problem(draws) for _ in range(count)))
    return rows


def _terms(draws: random.Random) -> tuple[int, str, int, int]:
    """Two numbers, the sign between them, and the result, which is a whole number of at least 0."""
    sign = draws.choice("+-*/")
    if sign in "+-":
        a, b = draws.randint(1, 99), draws.randint(1, 99)
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        return a, sign, b, a + b if sign == "+" else a - b
    a, b = draws.randint(2, 12), draws.randint(2, 12)
    return (a, sign, b, a * b) if sign == "*" else (a * b, sign, b, a)


WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def _equation(draws: random.Random) -> str:
    a, sign, b, result = _terms(draws)
    return f"{a}{sign}{b}={result}"


def _spoken(draws: random.Random) -> str:
    a, sign, b, result = _terms(draws)
    return f"Q: What is {a} {WORDS[sign]} {b}?\nA: {result}"


def _sentence(draws: random.Random) -> str:
    a, sign, b, result = _terms(draws)
    return f"{a} {WORDS[sign]} {b} equals {result}."


def _three_terms(draws: random.Random) -> str:
    a, b = draws.randint(1, 50), draws.randint(1, 50)
    c = draws.randint(1, a + b)
    return f"Compute {a} + {b} - {c}. Answer: {a + b - c}"


def _story(draws: random.Random) -> str:
    name, things = draws.choice(NAMES), draws.choice(THINGS)
    a, b = draws.randint(2, 40), draws.randint(2, 40)
    if draws.random() < 0.5:
        story = f"{name} has {a} {things} and gets {b} more."
        shown = f"{a} + {b} = {a + b}, so {name} has {a + b} {things}."
    else:
        a, b = max(a, b) + 1, min(a, b)
        story = f"{name} has {a} {things} and gives away {b}."
        shown = f"{a} - {b} = {a - b}, so {name} has {a - b} {things}."
    return f"{story} How many {things} does {name} have now? {shown}"


FORMS: tuple[tuple[Problem, str], ...] = (
    (_equation, "\n"),
    (_spoken, "\n\n"),
    (_sentence, " "),
    (_three_terms, "\n"),
    (_story, "\n"),
)
"""A form of problem, and the separator between two of them."""
