"""Kangaroo beside plain decoding and transformers' `generate` (torch) in three modes: greedy, early exit
(`assistant_early_exit`, at the adapter's exit layer) and prompt lookup (`prompt_lookup_num_tokens`).

Same weights, prompts, dtype (float32) and threads, interleaved. EOS ends nothing. Needs torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kangaroo_jax import DraftConfig, Generation, generate, generate_plain
from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.benchmark_prompts import held_out_tokens
from kangaroo_jax.bench.interleaved import time_interleaved
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.hub import find_checkpoint
from kangaroo_jax.checkpoint.target import Target

_VALID_TOKENS = 256
_CAPACITIES = (512, 4096)


@dataclasses.dataclass(frozen=True)
class PeerOutput:
    """What one way of decoding made of one prompt.

    Attributes:
      tokens: new token ids.
      seconds: prefill and decoding, without compilation.
      mean_accept_length: tokens per round; 1 without drafting.
    """

    tokens: list[int]
    seconds: float
    mean_accept_length: float


Decoder = Callable[[list[int]], PeerOutput]


@dataclasses.dataclass(frozen=True)
class PromptSpeeds:
    """All ways of decoding one prompt.

    Attributes:
      prompt: its name.
      tokens_per_second: by name of the way; "kangaroo" and "plain" first.
      mean_accept_length: Kangaroo's.
      identical: whether all gave the same tokens.
    """

    prompt: str
    tokens_per_second: dict[str, float]
    mean_accept_length: float
    identical: bool

    @property
    def speedup(self) -> float:
        """Kangaroo's speed over plain decoding's."""
        return self.tokens_per_second["kangaroo"] / self.tokens_per_second["plain"]


@dataclasses.dataclass(frozen=True)
class StepSpeed:
    """One plain step in caches of `capacity` positions, against the machine's read bandwidth in bytes per second."""

    capacity: int
    seconds: float
    num_bytes: int
    read_bandwidth: float


def decoders(
    target: Target, adapter: TrainedAdapter, draft: DraftConfig, max_new_tokens: int, threads: int
) -> dict[str, Decoder]:
    """The ways to compare, by name. transformers reads the target's files again; torch gets `threads` threads."""

    def ours(out: Generation) -> PeerOutput:
        return PeerOutput(out.tokens[0], out.seconds.prefill + out.seconds.decode, out.mean_accept_length)

    return {
        "kangaroo": lambda ids: ours(generate(target, adapter, [ids], max_new_tokens, draft, eos_token_ids=())),
        "plain": lambda ids: ours(generate_plain(target, [ids], max_new_tokens, eos_token_ids=())),
        **_transformers_decoders(target, adapter, max_new_tokens, threads),
    }


def compare(by_name: Mapping[str, Decoder], prompts: Mapping[str, list[int]], runs: int) -> Iterator[PromptSpeeds]:
    """Times every way on each prompt (name -> token ids), interleaved."""
    for name, ids in prompts.items():
        timings = time_interleaved(list(by_name.values()), [ids], runs, lambda output: output.seconds)
        outputs = dict(zip(by_name, (found[0] for found in timings.outputs), strict=True))
        speeds = {
            way: len(output.tokens) / seconds
            for (way, output), seconds in zip(outputs.items(), timings.seconds[:, 0].tolist(), strict=True)
        }
        identical = len({tuple(output.tokens) for output in outputs.values()}) == 1
        yield PromptSpeeds(name, speeds, outputs["kangaroo"].mean_accept_length, identical)


def plain_step_speeds(target: Target, adapter: TrainedAdapter) -> Iterator[StepSpeed]:
    """The plain step with 256 valid tokens in caches of two sizes: a step that copied its cache would be slower by the
    ratio of the two."""
    for capacity in _CAPACITIES:
        tokens = held_out_tokens(target, _VALID_TOKENS)[None]
        context = parts.Context(target.model, adapter.model, adapter.exit_layer or 1, tokens, capacity)
        read = context.bytes.plain_step
        bandwidth = machine.read_bandwidth(read, target.model.dtype)
        yield StepSpeed(capacity, parts.plain_step_seconds(context), read, bandwidth)


def _transformers_decoders(
    target: Target, adapter: TrainedAdapter, max_new_tokens: int, threads: int
) -> dict[str, Decoder]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    path = find_checkpoint(target.name)
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent if where else path, dtype=torch.float32, trust_remote_code=False, **where
    )
    model.generation_config.eos_token_id = None

    def decoder(**mode: Any) -> Decoder:
        def run(ids: list[int]) -> PeerOutput:
            prompt = torch.tensor([ids])
            start = time.perf_counter()
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                **mode,
            )
            return PeerOutput(out[0, len(ids) :].tolist(), time.perf_counter() - start, 1.0)

        return run

    return {
        "transformers": decoder(),
        "early exit": decoder(assistant_early_exit=adapter.exit_layer),
        "prompt lookup": decoder(prompt_lookup_num_tokens=10),
    }
