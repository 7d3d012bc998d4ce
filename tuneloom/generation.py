"""What tuneloom computes: a request for text and the pieces of its answer. Pickled across the replica boundary.

Ingress -> replica: `GenerationRequest`. Replica -> ingress: a stream of `Frame`s, first `Started` (or an error is
raised), then batches of `Delta`, last `Finished`. The unary answer is the same stream, folded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from tuneloom.domain import AdapterRef

FinishReason = Literal["stop", "length", "tool_calls", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Defaults are neutral; `temperature` 0 is greedy. `max_tokens` None: up to the context.

    `logprobs`: None for none, else the number of alternatives to return beside the chosen token (0..20).
    `seed` None: a random one. With `n` > 1, choice `i` uses `seed + i`.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may (`auto`), must (`required`) or must not (`none`) call tools; `name`: this one it must."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    is_parallel: bool = True


@dataclass(frozen=True)
class ResponseFormat:
    """The answer must be JSON: an object of any form, or what the JSON schema in `schema` (as text) allows."""

    schema: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """Messages as on the wire, already checked: dicts with `role`, `content` (str) and what the role allows."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: ToolChoice = ToolChoice()


@dataclass(frozen=True)
class TextPrompt:
    text: str


@dataclass(frozen=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True)
class GenerationRequest:
    """One call: choice `p * n + i` is sample `i` of prompt `p`. `deadline_s` is the time it may take in all.

    `echo`: the prompt's text comes first in each choice (completions only). `priority`: the higher goes first among
    requests of one owner. `is_streamed`: deltas are wanted as they come; else they may all come at the end.
    `key_id` and `model` are what its use is counted under: a name that never changes its meaning, not that of the call.
    """

    id: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    owner: str
    adapter: AdapterRef | None = None
    echo: bool = False
    deadline_s: float = 600.0
    priority: int = 0
    response_format: ResponseFormat | None = None
    is_streamed: bool = True
    key_id: str = ""
    model: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """One token's text, bytes and log-probability (natural log, before temperature), and its best alternatives."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a request has taken. `device_s`: its share of the time of the device."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    device_s: float = 0.0


@dataclass(frozen=True)
class Started:
    """The request is admitted: nothing about its form can fail any more."""

    prompt_tokens: int


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of the answer's `index`-th tool call: `id` and `name` come first, `arguments` (JSON text) in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """New text of one choice, never splitting a character. `finish_reason` is set on the choice's last delta."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True)
class Finished:
    usage: Usage


Frame = Started | list[Delta] | Finished
