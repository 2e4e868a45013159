"""How a report closes: its terms, and the commands that go on from it."""

from __future__ import annotations

from shlex import quote

from compose.analysis.recommend import recommendations
from compose.units import printable
from reports.load import Report

GLOSSARY = (
    ("variant", "One combination of stages, measured."),
    ("dense", "The original model. All other variants are compared with it."),
    ("decode, prefill", "Writing an answer token by token; reading a prompt at once."),
    (
        "perplexity",
        "How badly a model predicts a text: e to the power of its mean loss a token."
        " Lower is better.",
    ),
    (
        "KL",
        "How far a variant's next-token probabilities are from those of dense, in nats a token."
        " At 0 they are identical.",
    ),
    ("keeps", "The share of dense's quality that a variant reaches."),
    (
        "95 % interval",
        "The range in which the true value lies with 95 % confidence. Where the interval of a ratio"
        " includes 1, no difference is shown.",
    ),
    (
        "verdict",
        "ACCEPT: quality is kept and something is gained. TRADE-OFF: something is gained and"
        " something lost. REGRESSION: something is lost and nothing gained. NO EVIDENCE: too little"
        " was measured to tell.",
    ),
    (
        "drafts",
        "Tokens that a cheap pass proposes. The whole model verifies several of them at once"
        " (speculative decoding).",
    ),
    ("look-up", "Drafts that are copied from earlier text. They cost almost nothing."),
    (
        "lossless",
        "The tokens with drafts are exactly those that the same weights write without drafts."
        " It says nothing of how close these weights are to dense.",
    ),
    (
        "gates",
        "Small networks that let a token skip attention or an MLP. “Saved” is the compute that is"
        " skipped.",
    ),
)
"""Term -> its meaning, in the order in which a reader meets them."""


def next_commands(report: Report) -> tuple[tuple[str, str], ...]:
    """Command -> its use. RUN stands for the folder of the report."""
    answers = recommendations(report.results)
    names = [printable(answer.cell.name) for answer in answers if answer.cell is not None]
    name = quote(names[0]) if names else "NAME"
    return (
        ("gateskip pick RUN --minimize size", "finds the smallest variant within your limits"),
        (f"gateskip export RUN --cell {name} --to my-model", "writes a variant as a model folder"),
        (
            f"gateskip export RUN --cell {name} --format gguf --to my-model.gguf",
            "writes it as a file for llama.cpp",
        ),
        ("gateskip chat my-model", "talks with it"),
        ('gateskip generate my-model "Why is the sky blue?"', "asks it one question"),
        ("gateskip report RUN OTHER-RUN", "compares two runs"),
    )
