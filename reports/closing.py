"""How a report closes: its terms, and the commands that go on from it."""

from __future__ import annotations

from shlex import quote

from compose.analysis.recommend import recommendations
from compose.units import printable
from reports.load import Report

GLOSSARY = (
    (
        "variant",
        "A model that was made and measured with one combination of stages, such as"
        " quantization and drafts.",
    ),
    ("dense", "The original model, with which all variants are compared."),
    (
        "decode, prefill",
        "Decode means generating an answer token by token. Prefill means processing the prompt"
        " before the first token of the answer.",
    ),
    (
        "perplexity",
        "Measure of how badly a model predicts a text: e to the power of the mean loss per token."
        " A lower perplexity is better.",
    ),
    (
        "KL",
        "KL divergence from the next-token probabilities of the original model to those of a"
        " variant, in nats per token. If the KL is 0, the probabilities are identical.",
    ),
    ("keeps", "The quality of a variant, divided by the quality of the original model."),
    (
        "95 % interval",
        "The range in which the true value lies with 95 % confidence. If the interval of a ratio"
        " includes 1, no difference is shown.",
    ),
    (
        "verdict",
        "ACCEPT means that the variant is faster or smaller and loses no relevant quality."
        " TRADE-OFF means that something got better and something got worse. REGRESSION means that"
        " something got worse and nothing got better. NO EVIDENCE means that the measurements are"
        " too few or too uncertain for a verdict.",
    ),
    (
        "drafts",
        "Tokens that a cheap method proposes, and that the whole model verifies in one pass"
        " (speculative decoding).",
    ),
    (
        "look-up",
        "Drafts that are copied from earlier places of the same text, which takes almost no time.",
    ),
    (
        "lossless",
        "Drafts are lossless if the same weights give the same tokens with and without drafts."
        " Lossless drafts do not restore quality that quantization has lost.",
    ),
    (
        "gates",
        "Small networks that decide for each token whether the attention or the MLP of a layer is"
        " skipped. The columns “Saved” give the share of compute that is skipped.",
    ),
)
"""Term -> its meaning, in the order in which a reader meets them."""


def next_commands(report: Report) -> tuple[tuple[str, str], ...]:
    """Command -> its use. RUN stands for the folder of the report."""
    answers = recommendations(report.results)
    names = [printable(answer.cell.name) for answer in answers if answer.cell is not None]
    name = quote(names[0]) if names else "NAME"
    return (
        (
            "gateskip pick RUN --minimize size",
            "shows the smallest variant; --at-most-kl limits its loss of quality",
        ),
        (
            f"gateskip export RUN --cell {name} --to my-model",
            "exports this variant as a model folder",
        ),
        (
            f"gateskip export RUN --cell {name} --format gguf --to my-model.gguf",
            "exports this variant as a file for llama.cpp",
        ),
        ("gateskip chat my-model", "starts a chat with the exported model"),
        (
            'gateskip generate my-model "Why is the sky blue?"',
            "asks the exported model one question",
        ),
        ("gateskip report RUN OTHER-RUN", "compares two runs"),
    )
