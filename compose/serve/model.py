"""The served model: its tokenizer, its settings, and the requests that a scheduler takes."""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from compose.artifacts.folder import is_gated
from compose.bench.conversation import context_of
from compose.bench.generate import (
    chat_ids,
    decode_settings,
    open_decoder,
    prepare,
    stop_token_ids,
)
from compose.capacity import free_memory
from compose.errors import UserError
from compose.serve.api.errors import ApiError, invalid
from compose.serve.api.fields import ChatBody, ChatMessage, Options
from compose.serve.api.formats import Tool
from compose.serve.call_format import BARE, CallFormat, tool_template
from compose.serve.constraint import Constraint, Constraints
from compose.serve.settings import ServeSettings
from gateskip.decoding.config import SkipConfig, grouped
from gateskip.decoding.sampling import Sampler
from gateskip.serving.requests import Request, ServeLimits

SEEDS = 2**43
"""Seeds are taken modulo this number: torch takes no larger ones."""
BY_LOOKUP = {"draft_weights": "own", "draft_budget": 1.0}
"""Settings by which only look-up in the text drafts."""


class ServedModel:
    """A loaded model folder.

    Raises UserError for a folder that decodes with `target: original`, else as `open_decoder`.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._served = settings
        self.names = settings.names
        self.decoder, self.settings = open_decoder(
            settings.folder, budget=settings.budget, speculate=settings.speculate
        )
        if self.settings.get("target") == "original":
            raise UserError(
                f"{settings.folder} decodes with target: original, which a server cannot do",
                fix="export the variant without `target: original`, or use --no-speculate",
            )
        if self.settings["mode"] == "speculate" and self.decoder.draft_model is not None:
            self.settings |= BY_LOOKUP  # another model drafts for one text at a time
        prepare(self.decoder, self.settings)
        if "kv_cache" in self.settings:
            self.decoder.skipping.kv_cache = self.settings["kv_cache"]
        self.eos = tuple(stop_token_ids(self.decoder))
        self.limits = self._limits(settings)
        # Tokenizers are not safe in several threads: the scheduler has the decoder's own.
        self.tokenizer = copy.deepcopy(self.decoder.tokenizer)
        self._encoder = copy.deepcopy(self.decoder.tokenizer)
        self._encoder.model_max_length = 1 << 60  # no warning: longer prompts are refused
        self._tools = tool_template(self._encoder)
        self._constraints = Constraints(
            copy.deepcopy(self.decoder.tokenizer),
            self.decoder.skipping.model.config.vocab_size,
            self.eos,
        )
        self._settings_of = lru_cache(maxsize=256)(self._decode_settings)

    def _limits(self, settings: ServeSettings) -> ServeLimits:
        context = settings.max_context or ServeLimits.context
        return ServeLimits(
            rows=settings.max_rows,
            context=min(context, context_of(self.decoder)),
            queue=settings.max_queue,
            cache_bytes=cache_bytes(settings),
            prefix_dir=settings.prefix_dir,
        )

    def require_name(self, name: str | None) -> None:
        """Raises ApiError where a request names another model."""
        if name is not None and name not in self.names:
            served = " and ".join(self.names)
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; this server has {served}",
                code="model_not_found",
                param="model",
            )

    @property
    def skipping(self) -> dict[str, Any]:
        """The field `gateskip` of the model: how it answers by default, and its calibrated
        budgets."""
        budgets = sorted(budget for budget in self.decoder.grid if budget < 1)
        own = self.settings["mode"]
        budget = self.settings.get("budget") if own == "skip" else None
        return {"mode": own, "budget": budget, "budgets": budgets}

    def chat_prompt(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of a conversation by the model's chat template."""
        if not getattr(self._encoder, "chat_template", None):
            raise invalid("this model has no chat template: use /v1/completions", "messages")
        if not self._tools.shows_tools:
            _require_no_calls(messages)
        turns = [_turn(message) for message in messages]
        unseen = {"function": {"strict"}}  # models are not trained on it
        shown = [tool.model_dump(exclude_none=True, exclude=unseen) for tool in tools]
        try:
            return chat_ids(self._encoder, turns, shown or None)
        except Exception as error:  # a template refuses by an exception of its own
            raise invalid(f"the chat template refuses the messages: {error}", "messages") from None

    def call_format(self, body: ChatBody) -> CallFormat | None:
        """How the answer to a chat writes calls; None where it may have none.

        Raises ApiError where the chat template has no form of calls that can be recognised.
        """
        if not body.callable_tools:
            return None
        if self._tools.calls is None and not body.must_call:
            message = (
                "tools: the chat template of this model has no <tool_call> form; use tool_choice"
                " required, or the name of a function"
            )
            raise invalid(message, "tools", "unsupported_parameter")
        return self._tools.calls or BARE

    def chat_constraint(self, body: ChatBody) -> Constraint | None:
        """The grammar of the answer to a chat; None where it is free. Raises ApiError."""
        form = self.call_format(body)
        if form is None:
            return self.constraint(body)
        once = not body.parallel_tool_calls
        tools = body.callable_tools
        return self._constraints.calls(tools, form, must_call=body.must_call, once=once)

    def constraint(self, options: Options) -> Constraint | None:
        """The grammar of an answer's JSON; None where it is free text. Raises ApiError."""
        schema = options.schema_of_answer
        return None if schema is None else self._constraints.json(schema, "response_format")

    def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text that is continued."""
        if isinstance(prompt, str):
            return list(self._encoder(prompt).input_ids)
        size = self.decoder.skipping.model.config.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < size), None)
        if wrong is not None:
            raise invalid(f"prompt has the token id {wrong}; ids are 0 to {size - 1}", "prompt")
        return prompt

    def requests(
        self, prompt: Sequence[int], options: Options, constraint: Constraint | None = None
    ) -> list[Request]:
        """The requests for the `n` answers to a prompt, each with its own seed."""
        answer = self._answer_tokens(prompt, options.max_tokens)
        settings = dict(self._settings_of(options.gateskip.mode, options.gateskip.budget))
        mode = settings.pop("mode")
        if mode == "speculate" and (options.tops is not None or constraint is not None):
            mode = "plain"  # the same tokens; drafts give no log probabilities, and know no grammar
        for name in ("kv_cache", "target"):  # the same for all requests
            settings.pop(name, None)
        shares = options.gateskip.token_shares
        if shares and mode != "skip":
            message = f"token_shares: mode {mode} skips nothing in answers, so ask for a budget"
            raise invalid(message, "gateskip.token_shares")
        skip, draft = grouped(None, None, settings.pop("budget", None), settings)
        seed = secrets.randbits(32) if options.seed is None else options.seed
        sampler = Sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)

        def one(choice: int) -> Sampler:
            if constraint is None:
                return sampler
            return replace(sampler, processors=(constraint.mask(len(prompt)),))

        return [
            Request(
                prompt=tuple(prompt),
                max_new_tokens=answer,
                mode=mode,
                skip=skip,
                draft=draft,
                sampler=one(choice),
                seed=(seed + choice) % SEEDS,
                eos=self.eos,
                stop=tuple(options.stop),
                logprobs=options.tops,
                token_shares=shares,
                deadline=options.gateskip.deadline_s,
            )
            for choice in range(options.n)
        ]

    def _answer_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        """Most tokens of an answer; by default, what the context has room for."""
        context, used = self.limits.context, len(prompt)
        if not used:
            raise invalid("the prompt has no tokens", "prompt")
        room = context - used
        if room < (asked or 1):
            answer = f" and the answer up to {asked}" if asked else ""
            raise invalid(
                f"the prompt has {used} tokens{answer}; the limit for both is {context}",
                code="context_length_exceeded",
            )
        return asked or room

    def _decode_settings(self, mode: str | None, budget: float | None) -> dict[str, Any]:
        """Decode settings of a request: the server's own, unless it asks for a mode or a budget."""
        own = self.settings["mode"]
        mode = mode or ("skip" if budget is not None else own)
        if mode == own and budget is None:
            return self.settings
        self._check(mode, budget)
        if mode == "skip" and budget is None:
            budget = SkipConfig().budget
        settings = decode_settings(self._served.folder, budget=budget, speculate=False)
        self._check_calibrated(settings)
        return settings

    def _check(self, mode: str, budget: float | None) -> None:
        if mode == "speculate" and self.settings["mode"] != mode:
            message = "mode speculate: this server does not draft; start it with --speculate"
            raise invalid(message, "gateskip.mode")
        if mode != "skip" and budget is not None:
            message = f"budget: mode {mode} skips nothing in answers, so leave the budget out"
            raise invalid(message, "gateskip.budget")
        if mode == "skip" and not is_gated(self._served.folder):
            raise invalid("gateskip: this model has no gates, so it cannot skip", "gateskip")

    def _check_calibrated(self, settings: dict[str, Any]) -> None:
        try:
            if settings["mode"] == "skip":
                self.decoder.thresholds(settings["budget"])
        except ValueError as error:
            raise invalid(f"budget {settings['budget']}: {error}", "gateskip.budget") from None


def cache_bytes(settings: ServeSettings) -> int:
    """Most memory of the KV cache, in bytes: by default, half of the memory that is free."""
    if settings.cache_mb is not None:
        return settings.cache_mb * 1_000_000
    return free_memory() // (2 * settings.replicas)


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A turn as templates take it: `developer` is the newer name of `system`, and arguments are an
    object."""
    turn = {**message.model_dump(exclude_none=True), "content": message.content or ""}
    if message.role == "developer":
        turn["role"] = "system"
    for call in turn["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    if not message.tool_calls:
        del turn["tool_calls"]
    return turn


def _require_no_calls(messages: Sequence[ChatMessage]) -> None:
    """Raises ApiError where a template without tools would leave out calls and their results."""
    for i, message in enumerate(messages):
        if message.tool_calls or message.role == "tool":
            field = "tool_calls" if message.tool_calls else "role"
            raise invalid(
                f"messages[{i}].{field}: the chat template of this model takes no tools",
                f"messages[{i}].{field}",
                "unsupported_parameter",
            )


def mode_text(settings: dict[str, Any]) -> str:
    """How answers are decoded, in words for the line at the start."""
    budget = settings.get("draft_budget", settings.get("budget"))
    return settings["mode"] if budget in (None, 1.0) else f"{settings['mode']} at budget {budget}"


def budget_of(request: Request) -> float | None:
    """The budget by which a request skips; None where it skips nothing."""
    return request.skip.budget if request.mode == "skip" and request.skip is not None else None
