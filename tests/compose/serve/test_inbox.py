"""The events of an answer reach the event loop at once or gathered."""

from __future__ import annotations

import asyncio
import threading

import pytest

from compose.serve.api.answer import Inbox
from gateskip.serving.requests import Event, Finished, NewToken, Receipt

LONG_S = 3600.0  # no test waits so long: it fails after a minute
END = Finished("stop", Receipt(prompt_tokens=1, reused_tokens=0, new_tokens=2))


async def _taken(inbox: Inbox, gather_s: float) -> list[tuple[int, Event]]:
    return await asyncio.wait_for(inbox.take(gather_s), 60)


async def _gathered() -> None:
    inbox = Inbox()
    inbox.put(0, NewToken(5))
    assert await _taken(inbox, LONG_S) == [(0, NewToken(5))], "the first event comes at once"
    inbox.put(0, NewToken(6))
    inbox.put(1, NewToken(7))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(inbox.take(LONG_S), 0.1)
    inbox.put(0, END)
    assert await _taken(inbox, LONG_S) == [(0, NewToken(6)), (1, NewToken(7)), (0, END)]


def test_tokens_are_gathered_until_an_answer_ends() -> None:
    """The first event and an end come at once; tokens wait for the next delivery."""
    asyncio.run(_gathered())


@pytest.mark.parametrize("gather_s", [0.0, 0.001])
def test_no_event_is_lost_between_two_threads(gather_s: float) -> None:
    """A thread that puts events as fast as it can loses none, and none waits for ever."""
    count = 3000

    async def all_of_them() -> list[int]:
        inbox = Inbox()
        events = [NewToken(token) for token in range(count)]
        thread = threading.Thread(target=lambda: [inbox.put(0, event) for event in events])
        thread.start()
        taken: list[int] = []
        while len(taken) < count:
            some = await _taken(inbox, gather_s)
            assert some, "take returns at least one event"
            taken += [event.token for _, event in some if isinstance(event, NewToken)]
        thread.join()
        return taken

    assert asyncio.run(all_of_them()) == list(range(count))
