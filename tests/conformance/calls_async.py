"""Calls of the asynchronous client: each is a coroutine that the driver runs in a loop of its own."""

import asyncio
import time
from typing import Any

import openai
from openai.types import FileObject
from openai.types.chat import ChatCompletion

from tests.conformance.session import QUESTION, TIMEOUT_S, Session, Unmet, holds, is_a, rows, same, user

TOGETHER = 16


async def async_chat(session: Session) -> None:
    async with _client(session) as client:
        answer = await _ask(client, session)
    is_a(answer, ChatCompletion)
    same("text", answer.choices[0].message.content, session.ask().choices[0].message.content)


async def async_stream(session: Session) -> None:
    async with _client(session) as client:
        stream = await _ask(client, session, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = session.ask()
    same("text", text, whole.choices[0].message.content)
    same("usage", chunks[-1].usage.total_tokens, whole.usage.total_tokens)


async def async_parallel(session: Session) -> None:
    lengths = range(1, TOGETHER + 1)
    async with _client(session) as client:
        asked = [_ask(client, session, logit_bias=session.always, max_completion_tokens=n) for n in lengths]
        answers = await asyncio.gather(*asked)
    texts = [answer.choices[0].message.content for answer in answers]
    same("answers", texts, [session.token * n for n in lengths])


async def async_paging(session: Session) -> None:
    async with _client(session) as client:
        ids = [file.id async for file in client.files.list(limit=1)]
    same("ids", ids, [file.id for file in session.client.files.list()])


async def async_files(session: Session) -> None:
    data = rows(10)
    async with _client(session) as client:
        file = await client.files.create(file=("async.jsonl", data), purpose="fine-tune")
        is_a(file, FileObject)
        same("status", (await client.files.wait_for_processing(file.id, poll_interval=0.2)).status, "processed")
        same("bytes", (await client.files.content(file.id)).content, data)
        same("deleted", (await client.files.delete(file.id)).deleted, True)


async def async_jobs(session: Session) -> None:
    async with _client(session) as client:
        jobs = [job.id async for job in client.fine_tuning.jobs.list(limit=2)]
        events = [event.id async for event in client.fine_tuning.jobs.list_events(session.earlier("job").id, limit=3)]
    same("jobs", jobs, [job.id for job in session.client.fine_tuning.jobs.list()])
    holds("events, each once", len(events) > 3 and len(set(events)) == len(events), events)


async def async_error(session: Session) -> None:
    async with _client(session) as client:
        try:
            await _ask(client, session, model="no-such-model")
        except openai.NotFoundError as error:
            same("code", error.code, "model_not_found")
            return
    raise Unmet("no NotFoundError")


async def async_abort(session: Session) -> None:
    async with _client(session) as client:
        options: Any = {"logit_bias": session.always, "max_completion_tokens": 200}
        task = asyncio.ensure_future(_ask(client, session, **options))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.wait({task})
        holds("it was cancelled", task.cancelled())
        before = time.monotonic()
        answer = await _ask(client, session, logit_bias=session.always, max_completion_tokens=3)
    same("the next answer", answer.choices[0].message.content, session.token * 3)
    holds("the next answer comes soon", time.monotonic() - before < 30)


def _client(session: Session) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=session.base_url, api_key=session.key, timeout=TIMEOUT_S)


async def _ask(client: openai.AsyncOpenAI, session: Session, text: str = QUESTION, **options: Any) -> Any:
    options = {"model": session.base, "temperature": 0, "max_completion_tokens": 8, **options}
    return await client.chat.completions.create(messages=user(text), **options)
