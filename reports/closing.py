"""How a report closes: its terms, and the commands that go on from it."""

from __future__ import annotations

from shlex import quote

from compose.analysis.recommend import recommendations
from compose.units import printable
from reports.load import Report

GLOSSARY = (
    ("variant", "One combination of stages. A run measures several variants."),
    ("dense", "The original model. The other variants are compared with it."),
    (
        "decode, prefill",
        "Decode: generating an answer token by token. Prefill: processing the prompt.",
    ),
    (
        "perplexity",
        "How badly a model predicts a text: e to the power of its mean loss per token."
        " Lower is better.",
    ),
    (
        "KL",
        "Distance between the next-token probabilities of a variant and of dense, in nats per"
        " token. With a KL of 0 they are identical.",
    ),
    ("keeps", "The quality of a variant divided by the quality of dense."),
    (
        "95 % interval",
        "The range in which the true value lies with 95 % confidence. If the interval of a ratio"
        " includes 1, no difference is shown.",
    ),
    (
        "verdict",
        "ACCEPT: faster or smaller, without a relevant loss of quality. TRADE-OFF: something got"
        " better and something got worse. REGRESSION: something got worse and nothing got better."
        " NO EVIDENCE: too little was measured for a verdict.",
    ),
    (
        "drafts",
        "Tokens that a cheap method proposes. The whole model verifies several of them in one"
        " pass (speculative decoding).",
    ),
    ("look-up", "Drafts that are copied from earlier text. Look-up costs almost nothing."),
    (
        "lossless",
        "Decoding with drafts is lossless if it gives the same tokens as the same weights without"
        " drafts. Quantized weights can still differ from dense.",
    ),
    (
        "gates",
        "Small networks that decide whether a token skips attention or an MLP. “Saved” is the"
        " skipped share of the compute.",
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
            "writes the variant as a file for llama.cpp",
        ),
        ("gateskip chat my-model", "starts a chat with the exported model"),
        (
            'gateskip generate my-model "Why is the sky blue?"',
            "asks the exported model one question",
        ),
        ("gateskip report RUN OTHER-RUN", "compares two runs"),
    )
