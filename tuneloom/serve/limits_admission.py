"""An admitted request: what it holds, and what it gives back when its true length is known. No rule of who may what."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from tuneloom.generation import ChatPrompt, Finished, Frame, GenerationRequest, Started, TokenPrompt
from tuneloom.serve.limits_window import Charge, Correction, Counters, Place, Taken
from tuneloom.serve.openai import Call
from tuneloom.serve.upstream import BaseHandle, Bases

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
# What an answer is taken for whose length nobody has bounded.
UNSAID_TOKENS = 256
# Of the place that is left at the first token.
WAITING = "waiting for a first token"


def estimate(call: Call, most_per_answer: int) -> tuple[int, int]:
    """The tokens of a call's prompts and of its answers, before anything has been read; at least one of each."""
    prompt = sum(_prompt_tokens(each) for each in call.prompts)
    wanted = UNSAID_TOKENS if call.params.max_tokens is None else call.params.max_tokens
    return max(1, prompt), min(wanted, most_per_answer) * call.num_choices


def _prompt_tokens(prompt: object) -> int:
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids)
    if isinstance(prompt, ChatPrompt):
        parts = [part for message in prompt.messages for part in message.values()]
        texts = [part if isinstance(part, str) else json.dumps(part) for part in parts]
        size = sum(map(len, texts)) + sum(len(json.dumps(tool)) for tool in prompt.tools)
        return math.ceil(size / CHARACTERS_PER_TOKEN) + TOKENS_PER_MESSAGE * len(prompt.messages)
    return math.ceil(len(prompt.text) / CHARACTERS_PER_TOKEN)


class Admission:
    """What one request was given. `settle` carries out corrections and the leaving of places, beside the request."""

    def __init__(
        self,
        counters: Counters,
        charges: Sequence[Charge],
        places: Sequence[Place],
        taken: Taken,
        holder: str,
        settle: "Callable[[Admission, Sequence[Correction], Sequence[Place]], asyncio.Task[None] | None]",
    ) -> None:
        self.counters = counters
        self.charges = charges
        self.taken = taken
        self.holder = holder
        # Those that are held still.
        self.places = list(places) if taken.is_admitted else []
        self._settle = settle
        # Nobody else gets in until this one leaves.
        self.has_last_place = any(held + 1 >= place.limit for held, place in zip(taken.held, places, strict=True))
        self._is_finished = not taken.is_admitted
        self._prompt_tokens = 0
        self._characters = 0
        self._used = 0

    def finish(self) -> "asyncio.Task[None] | None":
        """Give back what was not used and leave all places; the first call counts. None: nobody need wait for it."""
        if self._is_finished:
            return None
        self._is_finished = True
        corrections = [
            Correction(charge, level.start_ms, self._used - charge.cost)
            for charge, level in zip(self.charges, self.taken.levels, strict=True)
            # Requests stay counted, whatever became of them.
            if charge.kind == "tokens" and self._used != charge.cost
        ]
        places, self.places = self.places, []
        return self._settle(self, corrections, places) if corrections or places else None

    def watch(self, bases: Bases) -> Bases:
        """The same bases, whose answers tell this admission how long they are."""
        return lambda base: Watched(bases(base), self)

    async def saw(self, frame: Frame) -> None:
        if isinstance(frame, Started):
            self._used = self._prompt_tokens = frame.prompt_tokens
        elif isinstance(frame, Finished):
            self._used = frame.usage.prompt_tokens + frame.usage.completion_tokens
            settling = self.finish()
            if settling is not None and self.has_last_place:
                # Before the client hears the end and sends its next request.
                await asyncio.shield(settling)
        else:
            # What the client has when it leaves early: the usage of an answer is known only at its end.
            self._characters += sum(len(delta.text) for delta in frame)
            self._used = self._prompt_tokens + math.ceil(self._characters / CHARACTERS_PER_TOKEN)
            if self.places and self.places[0].what == WAITING:
                self._settle(self, (), [self.places.pop(0)])


class Watched:
    """One base, whose answers an admission sees."""

    def __init__(self, base: BaseHandle, admission: Admission) -> None:
        self._base = base
        self.stats, self.wake, self.is_cold = base.stats, base.wake, base.is_cold
        self.on_each_replica = base.on_each_replica
        self._admission = admission

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        async with aclosing(self._base.generate(request)) as stream:
            async for frame in stream:
                await self._admission.saw(frame)
                yield frame
