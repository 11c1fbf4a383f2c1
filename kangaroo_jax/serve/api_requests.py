"""Request bodies of OpenAI's API, checked field by field: what is not supported is refused by name."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from kangaroo_jax.checks import is_integer, is_number
from kangaroo_jax.config import SamplingConfig, ServeConfig
from kangaroo_jax.engine.prompts import Prompt
from kangaroo_jax.errors import InputError
from kangaroo_jax.serve.api_error import ApiError

_COMMON = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
    "ignore_eos",
    "user",  # names a client's user, and asks for nothing
    "kangaroo",
}
_CHAT = _COMMON | {"messages", "max_completion_tokens"}
_COMPLETION = _COMMON | {"prompt"}
# Fields of OpenAI's API, and of other servers', that are not supported, with the values that ask for nothing. So does
# null.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's answer may fill the context
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 1000


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      prompts: text, token ids or messages.
      n: answers to each.
      max_tokens: of an answer; None: as many as the context holds.
      sampling: with the seed of the first answer; the others' are the next ones.
      stop: strings that end an answer.
      stream: whether the answer is sent as it comes.
      include_usage: whether the counts of tokens end the stream.
      ignore_eos: whether an answer goes on to `max_tokens`.
      drafts: whether the answer says who drafted what.
      plain: whether it is to be decoded plainly, to compare.
    """

    prompts: Sequence[Prompt]
    n: int
    max_tokens: int | None
    sampling: SamplingConfig
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool
    drafts: bool
    plain: bool

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    def sampling_of(self, answer: int) -> SamplingConfig:
        """Of answer 0 to n - 1 to a prompt. Equal seeds would give equal answers."""
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + answer) % 2**32)


def parse_chat(body: Any, model: str, limits: ServeConfig) -> Asked:
    """The body of /v1/chat/completions.

    Args:
      body: a JSON value.
      model: the name of the model that is served.
      limits: of messages and answers.

    Raises:
      ApiError: for what is wrong or not supported.
    """
    fields = _fields(body, _CHAT, model)
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise _wrong("max_completion_tokens", "max_tokens and max_completion_tokens are the same; give one")
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", 'messages must be a list like [{"role": "user", "content": "..."}]')
    if len(messages) > limits.max_messages:
        raise _wrong("messages", f"messages must be at most {limits.max_messages}, found {len(messages)}")
    prompt = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return _asked(fields, [prompt], _count(fields, name, None), limits)


def parse_completion(body: Any, model: str, limits: ServeConfig) -> Asked:
    """The body of /v1/completions; arguments and errors as for `parse_chat`."""
    fields = _fields(body, _COMPLETION, model)
    prompt = fields.get("prompt")
    prompts = [prompt]
    if isinstance(prompt, list) and prompt and not is_integer(prompt[0]):
        prompts = prompt
    for each in prompts:
        ids = isinstance(each, list) and bool(each) and all(map(is_integer, each))
        if not ids and not (isinstance(each, str) and each):
            raise _wrong("prompt", "prompt must be a text, a list of token ids, or a list of those; and not empty")
    return _asked(fields, prompts, _count(fields, "max_tokens", _COMPLETION_TOKENS), limits)


def _fields(body: Any, known: set[str], model: str) -> dict[str, Any]:
    """The fields that ask for something. Refuses those that are not supported, and other models."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in list(fields.items()):
        if name in known:
            continue
        if name not in _NOTHING:
            raise _unknown(name, name)
        if not any(isinstance(value, bool) == isinstance(each, bool) and value == each for each in _NOTHING[name]):
            raise _unsupported(name, name)
        del fields[name]
    if fields.get("model", model) != model:
        raise ApiError(
            404, f"the model {str(fields['model'])[:60]!r} is not here; this is {model!r}", "model_not_found", "model"
        )
    return fields


def _asked(fields: Mapping[str, Any], prompts: list[Any], max_tokens: int | None, limits: ServeConfig) -> Asked:
    n = _count(fields, "n", 1)
    if n * len(prompts) > limits.max_choices:
        raise _wrong("n", f"n times the prompts must be at most {limits.max_choices}, found {n * len(prompts)}")
    options = _object(fields, "stream_options", ("include_usage", "include_obfuscation"))
    if options and not _flag(fields, "stream"):
        raise _wrong("stream_options", "stream_options needs stream; give that, or leave it out")
    own = _object(fields, "kangaroo", ("drafts", "plain"))
    asked = Asked(
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        stop=_stop(fields.get("stop", [])),
        stream=_flag(fields, "stream"),
        include_usage=_flag(options, "include_usage"),
        ignore_eos=_flag(fields, "ignore_eos"),
        drafts=_flag(own, "drafts"),
        plain=_flag(own, "plain"),
    )
    if asked.drafts and not asked.stream:
        raise _wrong("kangaroo", "kangaroo.drafts comes with a stream alone; give stream as well")
    if asked.drafts and asked.plain:
        raise _wrong("kangaroo", "kangaroo.drafts and kangaroo.plain do not go together; give one")
    return asked


def _sampling(fields: Mapping[str, Any]) -> SamplingConfig:
    values = {"temperature": fields.get("temperature", 1.0), "top_p": fields.get("top_p", 1.0)}
    for name, value in values.items():
        if not is_number(value):
            raise _wrong(name, f"{name} must be a number, found {value!r:.60}")
        try:
            values[name] = float(value)
        except OverflowError:
            raise _wrong(name, f"{name} is too large") from None
    for name, value in (("top_k", fields.get("top_k", 0)), ("seed", fields.get("seed", secrets.randbelow(2**32)))):
        if not is_integer(value) or not 0 <= value < 2**32:
            raise _wrong(name, f"{name} must be an integer from 0 to 2**32 - 1, found {value!r:.60}")
        values[name] = value
    try:
        return SamplingConfig(**values)
    except InputError as error:
        raise _wrong(str(error).split()[0], str(error)) from None


def _stop(stop: Any) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise _wrong("stop", "stop must be a text or a list of texts, none of them empty")
    if len(strings) > _MAX_STOPS or any(len(string) > _MAX_STOP_CHARACTERS for string in strings):
        raise _wrong(
            "stop", f"stop must be at most {_MAX_STOPS} texts of at most {_MAX_STOP_CHARACTERS} characters each"
        )
    return tuple(strings)


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _wrong("messages", f'{name} must be like {{"role": "user", "content": "..."}}')
    for field, value in message.items():
        if field not in ("role", "content", "name") and value not in (None, [], {}):
            raise _unsupported(f"{name}.{field[:60]}", "messages")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(role, str) or not isinstance(content, str):
        raise _wrong("messages", f"{name} must have a role and a text as content")
    # What OpenAI's newer models call it.
    made = {"role": "system" if role == "developer" else role, "content": content}
    if isinstance(message.get("name"), str):
        made["name"] = message["name"]
    return made


def _part(part: Any, name: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _unsupported(f'{name}, which is not like {{"type": "text", "text": "..."}},', "messages")
    return part["text"]


def _count(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name, default)
    if value is not default and (not is_integer(value) or not 1 <= value < 2**31):
        raise _wrong(name, f"{name} must be an integer, 1 or above, found {value!r:.60}")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, f"{name} must be true or false, found {value!r:.60}")
    return value


def _object(fields: Mapping[str, Any], name: str, known: Sequence[str]) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise _wrong(name, f"{name} must be an object, found {value!r:.60}")
    for inner in value:
        if inner not in known:
            raise _unknown(f"{name}.{inner}", name)
    return value


def _unknown(what: str, param: str) -> ApiError:
    return ApiError(400, f"the field {what[:60]!r} is not known here; leave it out", "unknown_parameter", param[:60])


def _unsupported(what: str, param: str) -> ApiError:
    return ApiError(400, f"{what} is not supported; leave it out", "unsupported_parameter", param)


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", param)
