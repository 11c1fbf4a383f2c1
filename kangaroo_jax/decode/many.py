"""Many prompts through a few slots: `generate_many`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, SamplingConfig
from kangaroo_jax.decode.autoregressive import PLAIN
from kangaroo_jax.decode.generate import kangaroo
from kangaroo_jax.decode.host_loop import Answer, Ending, Job, run_many
from kangaroo_jax.decode.prompts import encode_prompt
from kangaroo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt with settings of its own.

    Attributes:
      prompt: text, or token ids.
      max_new_tokens: None means the call's.
      seed: of sampling; None means the call's.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int | None = None
    seed: int | None = None


def generate_many(
    target: Target,
    adapter: TrainedAdapter | None,
    requests: Sequence[str | Sequence[int] | Request],
    batch_size: int = 8,
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Answer]:
    """Decodes any number of prompts, `batch_size` at a time: as soon as one ends, the next takes its place.

    Each answer's tokens are those that `generate` gives its prompt alone.

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`; None decodes plainly, one token per pass.
      requests: prompts (strings, or lists of token ids), or `Request`s, begun in this order.
      batch_size: sequences on the device at a time. The caches have room for this many times the longest prompt with
        its answer.
      max_new_tokens: most tokens per answer, where a request does not say.
      draft: exit layer, gamma, eta.
      sampling: temperature, top-p, top-k, and a seed for all or one per request; greedy by default.
      eos_token_ids: tokens that end a sequence, kept in its tokens; None means the target's own.
      max_length: most tokens of prompt and answer together; None means the target's max_position_embeddings.
      stop: strings that end a sequence, as in `generate`.

    Returns:
      An iterator over the answers, in the order in which they are done.

    Raises:
      InputError: at once, before anything is decoded: as `generate` does, and for a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")
    requests = [request if isinstance(request, Request) else Request(request) for request in requests]
    method = PLAIN if adapter is None else kangaroo(target, adapter, draft)
    ending = Ending.create(target, eos_token_ids, stop, streams=False)
    seeds = [sampling.seed] * len(requests) if isinstance(sampling.seed, int) else sampling.seed
    if len(seeds) != len(requests):
        raise InputError(f"seed must be one integer or one per request, found {len(seeds)} for {len(requests)}")
    jobs = []
    for i, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
        most = max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        seed = seed if request.seed is None else request.seed
        dataclasses.replace(sampling, seed=seed)  # checks it
        jobs.append(Job(i, encode_prompt(target, request.prompt, most, max_length, f"request {i}"), most, seed))
    if not jobs:
        return iter(())
    return run_many(target, method, jobs, min(batch_size, len(jobs)), ending, sampling)
