"""OpenAI's requests for text, read strictly: every legal field is honoured, harmless and ignored, or refused by name.

No HTTP, no models, no tokens: a JSON object in, a `Call` out. What happens to each field:

    honoured   the fields of `Sampling`, `Chat` and `Completion` below, `messages`, `prompt`, `stop`, `logit_bias`,
               `stream_options.include_usage`, those of `serve.tools`, `service_tier` (an order among requests of one
               owner); and, beyond OpenAI: `top_k`, `min_p`, `repetition_penalty`
    ignored    those of `Ignored`: they cannot change the answer; their types are checked
    refused    REFUSED: unless the value asks for nothing, such as null or `modalities: ["text"]`
    unknown    everything else
"""

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneloom.errors import InvalidRequest, InvalidType, MissingParameter, UnknownParameter, UnsupportedParameter
from tuneloom.generation import (
    ChatPrompt,
    Prompt,
    ResponseFormat,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)
from tuneloom.serve.body import json_type
from tuneloom.serve.messages import read_messages
from tuneloom.serve.tools import read_response_format, read_tool_choice, read_tools


class Ignored(BaseModel):
    """What is said beside a request, in OpenAI's types and limits."""

    model_config = ConfigDict(strict=True)
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    user: str | None = None


IGNORED = frozenset(Ignored.model_fields)

# Field -> the values that ask for nothing, besides null.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# What to send instead of a refused field.
_INSTEAD = {"functions": "tools", "function_call": "tool_choice"}

# Service tier -> priority among the requests of one owner.
TIERS = {"auto": 0, "default": 0, "scale": 0, "flex": -1, "priority": 1, "fast": 1}

MAX_CHOICES = 2048
MAX_N = 128
MAX_STOPS = 4
TOKEN_ID_LIMIT = 1 << 31


@dataclass(frozen=True)
class Call:
    """A parsed request: what to compute and how to answer. Choice `p * n + i` is sample `i` of prompt `p`.

    `num_best`: so many samples of each prompt are the answer, the likeliest by token; None: all.
    `shows_logprobs`: they were asked for, and are not only computed to find the best.
    """

    model: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    response_format: ResponseFormat | None = None
    priority: int = 0
    num_best: int | None = None
    shows_logprobs: bool = True

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n


class Sampling(BaseModel):
    """The scalar fields that both requests share; null means the default."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str = Field(min_length=1)
    stream: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=TOKEN_ID_LIMIT)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1, lt=TOKEN_ID_LIMIT)


class Chat(Sampling):
    max_completion_tokens: int | None = Field(None, ge=1, lt=TOKEN_ID_LIMIT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class Completion(Sampling):
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=128)


def parse_chat(body: dict[str, Any], model: str | None = None) -> Call:
    """Read a body of `POST /v1/chat/completions`. `model`: the one in the URL, which the body must not contradict."""
    rest = _known(body, model)
    messages, stop, bias = rest.pop("messages", None), rest.pop("stop", None), rest.pop("logit_bias", None)
    options = rest.pop("stream_options", None)
    tools, choice = rest.pop("tools", None), rest.pop("tool_choice", None)
    parallel, form = rest.pop("parallel_tool_calls", None), rest.pop("response_format", None)
    priority = _read_tier(rest.pop("service_tier", None))
    fields = _validate(Chat, rest)
    if messages is None:
        raise MissingParameter("Missing required parameter: `messages`.", param="messages")
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` mean the same. Send only `max_completion_tokens`.",
            param="max_tokens",
        )
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    params = _params(
        fields,
        stop=stop,
        bias=bias,
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    tool_choice, allowed = read_tool_choice(choice, parallel, read_tools(tools))
    return Call(
        model=fields.model,
        prompts=(ChatPrompt(read_messages(messages), allowed, tool_choice if allowed else ToolChoice()),),
        params=params,
        stream=bool(fields.stream),
        include_usage=_include_usage(options, fields.stream),
        response_format=read_response_format(form),
        priority=priority,
    )


def parse_completion(body: dict[str, Any], model: str | None = None) -> Call:
    """Read a body of `POST /v1/completions`. `model` as in `parse_chat`."""
    rest = _known(body, model)
    if "prompt" not in rest:
        raise MissingParameter("Missing required parameter: `prompt`.", param="prompt")
    prompt, stop, bias = rest.pop("prompt"), rest.pop("stop", None), rest.pop("logit_bias", None)
    options, priority = rest.pop("stream_options", None), _read_tier(rest.pop("service_tier", None))
    fields = _validate(Completion, rest)
    num_best = _read_best_of(fields)
    if fields.echo and fields.logprobs is not None:
        raise UnsupportedParameter(
            "`echo` with `logprobs` is not supported: there are no log-probabilities of the prompt. Send one of them.",
            param="echo",
        )
    params = _params(fields, stop=stop, bias=bias, max_tokens=fields.max_tokens or 16, logprobs=fields.logprobs)
    if num_best is not None:
        params = replace(params, n=fields.best_of or 1, logprobs=params.logprobs or 0)
    prompts = _read_prompts(prompt)
    if len(prompts) * params.n > MAX_CHOICES:
        name = "n" if num_best is None else "best_of"
        raise InvalidRequest(
            f"{len(prompts)} prompts times `{name}` {params.n} is over {MAX_CHOICES} choices.", param=name
        )
    return Call(
        model=fields.model,
        prompts=prompts,
        params=params,
        stream=bool(fields.stream),
        include_usage=_include_usage(options, fields.stream),
        echo=bool(fields.echo),
        priority=priority,
        num_best=num_best,
        shows_logprobs=fields.logprobs is not None,
    )


def _read_best_of(fields: Completion) -> int | None:
    """How many of `best_of` samples are wanted, None if that is all of them."""
    n = fields.n or 1
    if fields.best_of is None or fields.best_of == n:
        return None
    if fields.best_of < n:
        raise InvalidRequest(f"`best_of` is {fields.best_of}, less than `n` {n}. Send at least `n`.", param="best_of")
    if fields.stream:
        raise InvalidRequest(
            "`best_of` more than `n` cannot be streamed: the best are known at the end. Send `stream: false`.",
            param="best_of",
        )
    return n


def _known(body: dict[str, Any], model: str | None) -> dict[str, Any]:
    """The fields that have an effect; refuses those that ask for something we do not do."""
    _validate(Ignored, {name: value for name, value in body.items() if name in IGNORED})
    rest = {}
    for name, value in body.items():
        if name in REFUSED:
            if value is not None and value not in REFUSED[name]:
                hint = f"Send `{_INSTEAD[name]}` instead." if name in _INSTEAD else "Leave it out."
                raise UnsupportedParameter(f"`{name}` is not supported by this server. {hint}", param=name)
        elif name not in IGNORED:
            rest[name] = value
    if model is not None and rest.setdefault("model", model) != model:
        raise InvalidRequest("`model` differs from the model in the URL. Leave it out of the body.", param="model")
    return rest


def _validate(kind: type[Any], fields: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from error


def _explain(error: ValidationError) -> InvalidRequest:
    # An unknown name first: it is often the misspelling of what else is wrong.
    problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    # A key that is wrong itself is no place.
    place = problem["loc"][:1] if problem["loc"][-1] == "[key]" else problem["loc"]
    name, value = ".".join(map(str, place)), problem["input"]
    name = name[:80]
    if problem["type"] == "extra_forbidden":
        return UnknownParameter(f"Unknown parameter: `{name}`.", param=name)
    if problem["type"] == "missing":
        return MissingParameter(f"Missing required parameter: `{name}`.", param=name)
    if problem["type"].endswith(("_type", "_from_float")):
        expected = problem["msg"].removeprefix("Input should be ")
        return InvalidType(f"Invalid type for `{name}`: expected {expected}, got {json_type(value)}.", param=name)
    return InvalidRequest(
        f"Invalid `{name}`: {json.dumps(value, ensure_ascii=False)[:80]}. {problem['msg']}.", param=name
    )


def _params(fields: Sampling, *, stop: Any, bias: Any, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    given = {
        name: value
        for name in (
            "n",
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
        )
        if (value := getattr(fields, name)) is not None
    }
    return SamplingParams(
        **given,
        top_k=max(fields.top_k or 0, 0),
        max_tokens=max_tokens,
        stop=_read_stop(stop),
        logit_bias=_read_bias(bias),
        logprobs=logprobs,
    )


def _read_stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        stops = [stop]
    elif isinstance(stop, list):
        stops = stop
    else:
        raise InvalidType(
            f"Invalid type for `stop`: expected a string or an array of strings, got {json_type(stop)}.", param="stop"
        )
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"`stop` has {len(stops)} sequences; the most is {MAX_STOPS}.", param="stop")
    for index, text in enumerate(stops):
        if not isinstance(text, str):
            param = f"stop[{index}]"
            raise InvalidType(f"Invalid type for `{param}`: expected a string, got {json_type(text)}.", param=param)
        if not text:
            raise InvalidRequest("A `stop` sequence is empty. Leave it out.", param="stop")
    return tuple(dict.fromkeys(stops))


def _read_bias(bias: Any) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, dict):
        raise InvalidType(
            f"Invalid type for `logit_bias`: expected an object, got {json_type(bias)}.", param="logit_bias"
        )
    read = {}
    for token, value in bias.items():
        param = f"logit_bias.{token[:20]}"
        if not (token.isascii() and token.isdigit() and int(token[:12]) < TOKEN_ID_LIMIT):
            raise InvalidRequest(
                f"Invalid key in `logit_bias`: {token[:20]!r}. Keys are token ids.", param="logit_bias"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidType(f"Invalid type for `{param}`: expected a number, got {json_type(value)}.", param=param)
        if not -100 <= value <= 100:
            raise InvalidRequest(f"Invalid `{param}`: {value}. It must be from -100 to 100.", param=param)
        read[int(token)] = float(value)
    return read


def _include_usage(options: Any, stream: bool | None) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidType(
            f"Invalid type for `stream_options`: expected an object, got {json_type(options)}.", param="stream_options"
        )
    if not stream:
        raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
    for name, value in options.items():
        param = f"stream_options.{name[:80]}"
        # Obfuscation pads chunks against traffic analysis; it is no part of the answer.
        if name not in ("include_usage", "include_obfuscation"):
            raise UnknownParameter(f"Unknown parameter: `{param}`.", param=param)
        if value is not None and not isinstance(value, bool):
            raise InvalidType(f"Invalid type for `{param}`: expected a boolean, got {json_type(value)}.", param=param)
    return bool(options.get("include_usage"))


def _read_tier(tier: Any) -> int:
    if tier is None:
        return 0
    if not isinstance(tier, str):
        raise InvalidType(
            f"Invalid type for `service_tier`: expected a string, got {json_type(tier)}.", param="service_tier"
        )
    if tier not in TIERS:
        raise InvalidRequest(
            f"Invalid `service_tier`: {tier[:80]!r}. Use one of {', '.join(TIERS)}.", param="service_tier"
        )
    return TIERS[tier]


def _read_prompts(prompt: Any) -> tuple[Prompt, ...]:
    """All four forms: text, texts, token ids, lists of token ids. Null is the empty text."""
    if prompt is None or isinstance(prompt, str):
        return (TextPrompt(prompt or ""),)
    if not isinstance(prompt, list):
        raise InvalidType(
            f"Invalid type for `prompt`: expected a string or an array, got {json_type(prompt)}.", param="prompt"
        )
    if not prompt:
        raise InvalidRequest("`prompt` is an empty array. Send at least one prompt.", param="prompt")
    if len(prompt) > MAX_CHOICES and not _is_token(prompt[0]):
        raise InvalidRequest(f"`prompt` has {len(prompt)} entries; the most is {MAX_CHOICES}.", param="prompt")
    if isinstance(prompt[0], str):
        return tuple(TextPrompt(_of_type(text, str, "a string", f"prompt[{i}]")) for i, text in enumerate(prompt))
    if isinstance(prompt[0], list):
        return tuple(
            _token_prompt(_of_type(ids, list, "an array", f"prompt[{i}]"), f"prompt[{i}]")
            for i, ids in enumerate(prompt)
        )
    return (_token_prompt(prompt, "prompt"),)


def _token_prompt(ids: list[Any], param: str) -> TokenPrompt:
    if not ids:
        raise InvalidRequest(f"`{param}` is an empty array. Send at least one token id.", param=param)
    for index, token in enumerate(ids):
        if not _is_token(token):
            where = f"{param}[{index}]"
            what = token if isinstance(token, int) and not isinstance(token, bool) else json_type(token)
            raise InvalidType(f"Invalid `{where}`: expected a token id, got {what}.", param=where)
    return TokenPrompt(tuple(ids))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < TOKEN_ID_LIMIT


def _of_type(value: Any, kind: type, expected: str, param: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidType(f"Invalid type for `{param}`: expected {expected}, got {json_type(value)}.", param=param)
    return value
