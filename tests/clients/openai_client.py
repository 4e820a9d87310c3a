"""What the ``openai`` package makes of a server. Runs in the environment of the clients; prints a line for whatever happens.

It reads lines: ``SCENARIO BASE_URL``, and what the scenario wants to be told. It says "done" behind each scenario.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import openai

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "say é"}]}
GIVEN: dict[str, Any] = {"api_key": "sk-of-nobody", "max_retries": 0, "timeout": 60}


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def told() -> str:
    return sys.stdin.readline().strip()


def stream() -> None:
    """Each token when it comes."""
    with openai.OpenAI(**GIVEN) as client:
        for event in client.chat.completions.create(stream=True, **CHAT):
            say(event.choices[0].delta.content)


def stream_async() -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(**GIVEN) as client:
            async for event in await client.chat.completions.create(stream=True, **CHAT):
                say(event.choices[0].delta.content)

    asyncio.run(run())


def leave() -> None:
    """Leaves the stream behind its third token; stays alive until it is told to go."""
    with openai.OpenAI(**GIVEN) as client:
        with client.chat.completions.create(stream=True, **CHAT) as events:
            for number, event in enumerate(events):
                say(event.choices[0].delta.content)
                if number == 2:
                    break
        say("left")
        told()


def leave_async() -> None:
    """The task is cancelled behind the third token."""

    async def run() -> None:
        async with openai.AsyncOpenAI(**GIVEN) as client:
            third = asyncio.Event()

            async def read() -> None:
                number = 0
                async for event in await client.chat.completions.create(stream=True, **CHAT):
                    say(event.choices[0].delta.content)
                    number += 1
                    if number == 3:
                        third.set()

            reading = asyncio.create_task(read())
            await third.wait()
            reading.cancel()
            await asyncio.wait([reading])
            say("left")
            await asyncio.to_thread(told)

    asyncio.run(run())


def leave_before_the_answer() -> None:
    """Is told when; no byte of the answer has come then."""

    async def run() -> None:
        async with openai.AsyncOpenAI(**GIVEN) as client:
            asking = asyncio.create_task(client.chat.completions.create(**CHAT))
            await asyncio.to_thread(told)
            asking.cancel()
            await asyncio.wait([asking])
            say("left")
            await asyncio.to_thread(told)

    asyncio.run(run())


def answers() -> None:
    """As many whole answers as it is told to ask for, each with its request id; errors by name."""
    with openai.OpenAI(**GIVEN) as client:
        while told() == "ask":
            try:
                answer = client.chat.completions.create(**CHAT)
            except openai.APIStatusError as error:
                kept = {name: error.response.headers.get(name) for name in ("retry-after", "content-type")}
                say([type(error).__name__, error.status_code, error.request_id, error.body, kept])
            else:
                say(["answer", 200, answer._request_id, answer.choices[0].message.content, answer.usage.total_tokens])


def retries() -> None:
    with openai.OpenAI(**{**GIVEN, "max_retries": 2}) as client:
        say(client.chat.completions.create(**CHAT).choices[0].message.content)


def broken() -> None:
    """A stream that breaks off is an error, not an end."""
    with openai.OpenAI(**GIVEN) as client:
        try:
            for event in client.chat.completions.create(stream=True, **CHAT):
                say(event.choices[0].delta.content)
        except Exception as error:  # noqa: BLE001  # of httpx, or of whatever took its place
            say([one.__name__ for one in type(error).__mro__])


SCENARIOS: tuple[Callable[[], None], ...] = (
    stream,
    stream_async,
    leave,
    leave_async,
    leave_before_the_answer,
    answers,
    retries,
    broken,
)
BY_NAME = {scenario.__name__: scenario for scenario in SCENARIOS}

while line := told():
    name, GIVEN["base_url"] = line.split(" ")
    BY_NAME[name]()
    say("done")
