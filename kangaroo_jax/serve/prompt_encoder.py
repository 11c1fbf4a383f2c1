"""Prompts of requests as token ids, made on a thread of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.engine.prompts import answer_room, prompt_ids
from kangaroo_jax.engine.requests import Request
from kangaroo_jax.errors import InputError
from kangaroo_jax.serve.api_error import ApiError
from kangaroo_jax.serve.api_requests import Asked


class PromptEncoder:
    """Makes engine requests of what clients ask for.

    Args:
      target: whose tokenizer and chat template are used. The tokenizer is copied: the engine's thread has its own.
      max_length: of prompt and answer together.
    """

    def __init__(self, target: Target, max_length: int):
        self._target = dataclasses.replace(target, tokenizer=copy.deepcopy(target.tokenizer))
        self._max_length = max_length
        # One thread: a tokenizer that two threads encode with at a time may refuse.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "prompts")

    async def requests(self, asked: Asked) -> tuple[list[list[int]], list[Request]]:
        """Token ids of each prompt, and the requests for all answers to the first prompt, to the second, ...

        Raises:
          ApiError: for a prompt that the target cannot take, or that does not fit with its answer.
        """
        ids = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, asked)
        return ids, [self._request(asked, each, i) for each in ids for i in range(asked.n)]

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, asked: Asked) -> list[list[int]]:
        return [self._fitting(prompt, asked.max_tokens) for prompt in asked.prompts]

    def _fitting(self, prompt: object, max_tokens: int | None) -> list[int]:
        chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        param = "messages" if chat else "prompt"
        try:
            ids = prompt_ids(self._target, prompt, "the prompt")
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value", param) from None
        room = answer_room(self._target, ids, self._max_length)
        problem = None
        if room < 1:
            problem = f"the prompt has {len(ids)} tokens, and the context is {self._max_length}; shorten it"
        elif max_tokens is not None and max_tokens > room:
            problem = (
                f"the prompt has {len(ids)} tokens and {max_tokens} may be added, but the context is "
                f"{self._max_length}; shorten the prompt, or ask for at most {room}"
            )
        if problem is not None:
            raise ApiError(400, problem, "context_length_exceeded", param)
        return ids

    def _request(self, asked: Asked, ids: list[int], answer: int) -> Request:
        return Request(
            ids,
            max_new_tokens=asked.max_tokens or answer_room(self._target, ids, self._max_length),
            sampling=asked.sampling_of(answer),
            stop=asked.stop,
            eos_token_ids=() if asked.ignore_eos else None,
            drafts=asked.drafts,
        )
