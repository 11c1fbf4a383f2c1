"""Answers a file of prompts into a file of answers, by one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kangaroo_jax import resumable
from kangaroo_jax.batch import answers
from kangaroo_jax.batch.progress import Progress
from kangaroo_jax.batch.prompts import Prompt
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, SamplingConfig
from kangaroo_jax.engine.engine import resolve_exit_layer
from kangaroo_jax.engine.generate import generate_many
from kangaroo_jax.engine.prompts import encode_prompt
from kangaroo_jax.engine.requests import Request
from kangaroo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did; of several processes' runs, what this one did.

    Attributes:
      prompts: answered now.
      before: answered by earlier runs.
      errors: prompts that could not be answered; in process 0, all processes'.
      new_tokens: of the prompts answered now.
      seconds: wall-clock, compilation apart.
      compile_seconds: of compilation.
      mean_accept_length: tokens per round.
    """

    prompts: int
    before: int
    errors: int
    new_tokens: int
    seconds: float
    compile_seconds: float
    mean_accept_length: float


def answer_prompts(
    target: Target,
    adapter: TrainedAdapter,
    prompts: list[Prompt],
    output: pathlib.Path,
    *,
    source: str,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    stop: list[str] | tuple[str, ...] = (),
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Answers all prompts that `output` has no answer to yet, each with a line as soon as it is done.

    A prompt that is empty or does not fit gets a line with its error, and is tried again by the next run. Of several
    processes, which see the same files, each takes its share with its own devices; process 0 merges.

    Args:
      target: from `load_target`, with a tokenizer.
      adapter: from `load_adapter`.
      prompts: with ids of their own.
      output: the file of answers.
      source: the prompts' file, for messages.
      batch_size: as in `generate_many`, per process; the answers do not depend on it.
      max_new_tokens: of prompts that do not say.
      draft: exit layer, gamma, eta.
      sampling: with one seed, for prompts that do not say.
      stop: strings that end an answer.
      process_index: of this process.
      process_count: how many there are.
      barrier: waits for all processes; called with a name that is the same in all.

    Raises:
      InputError: for answers of other settings or prompts in `output`, before anything is changed, and as
        `generate_many` does.
    """
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside it")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    settings = _settings(target, adapter, max_new_tokens, draft, sampling, stop)
    by_id = {prompt.id: prompt for prompt in prompts}
    first = process_index == 0
    with answers.locked(output) if first else contextlib.nullcontext():
        done = answers.finished(output, settings, by_id, source)
        barrier("answers read")
        if first:
            answers.settle(output, settings, done)
        barrier("answers settled")
        share = [prompt for prompt in prompts if prompt.id not in done][process_index::process_count]
        path = answers.part(output, process_index, process_count)
        with resumable.LineWriter(path) as writer, Progress(len(share) + len(done), len(done)) as progress:
            try:
                good, errors = _encode(target, share, max_new_tokens, source, writer, progress)
                requests = [Request(ids, prompt.max_new_tokens, prompt.seed) for prompt, ids in good]
                for answer in generate_many(
                    target, adapter, requests, batch_size, max_new_tokens, draft, sampling, stop=stop
                ):
                    writer.write(answers.record(good[answer.index][0], answer))
                    progress.add(len(answer.tokens), answer.accept_lengths, answer.compile_seconds)
            except KeyboardInterrupt:
                progress.say(f"{len(done) + progress.prompts} answers are in {path}; the same command does the rest")
                raise
        barrier("answers written")
        if first and process_count > 1:
            errors = _merge(output, settings, by_id, source, process_count)
        barrier("answers merged")
    return Summary(
        prompts=len(good),
        before=len(done),
        errors=errors,
        new_tokens=progress.new_tokens,
        seconds=progress.seconds,
        compile_seconds=progress.compile_seconds,
        mean_accept_length=progress.mean_accept_length,
    )


def _encode(
    target: Target,
    prompts: list[Prompt],
    max_new_tokens: int,
    source: str,
    writer: resumable.LineWriter,
    progress: Progress,
) -> tuple[list[tuple[Prompt, list[int]]], int]:
    """The prompts that can be answered, with their token ids, and how many cannot; those get their lines here."""
    good = []
    for prompt in prompts:
        most = prompt.max_new_tokens or max_new_tokens
        try:
            ids = encode_prompt(target, prompt.text, most, None, "the prompt")
        except InputError as error:
            writer.write(answers.record(prompt, None, str(error)))
            progress.fail(f"{source} id {prompt.id!r}: {error}")
        else:
            good.append((prompt, ids))
    return good, len(prompts) - len(good)


def _merge(
    output: pathlib.Path, settings: dict[str, Any], prompts: Mapping[Any, Prompt], source: str, count: int
) -> int:
    """Puts all processes' parts into the output; returns how many errors they hold."""
    for i in range(count):
        if not answers.part(output, i, count).exists():
            raise InputError(
                f"{answers.part(output, i, count)}: not there; --output must be in a folder that all processes share"
            )
    answers.settle(output, settings, answers.finished(output, settings, prompts, source), errors=True)
    return sum("error" in json.loads(line) for line in resumable.whole_lines(output))


def _settings(
    target: Target,
    adapter: TrainedAdapter,
    max_new_tokens: int,
    draft: DraftConfig,
    sampling: SamplingConfig,
    stop: list[str] | tuple[str, ...],
) -> dict[str, Any]:
    """What an answer depends on, in terms that a message can name."""
    return {
        "model": f"{pathlib.Path(target.name).name} ({target.fingerprint})",
        "adapter": pathlib.Path(adapter.name).name,
        "dtype": str(target.model.dtype),
        "max_new_tokens": max_new_tokens,
        "exit_layer": resolve_exit_layer(target, adapter, draft),
        "max_draft_len": draft.max_draft_len,
        "threshold": draft.threshold,
        "tree": None if draft.tree is None else dataclasses.asdict(draft.tree),
        "draft_vocabulary": _draft_vocabulary(adapter),
        **dataclasses.asdict(sampling),
        "stop": list(stop),
    }


def _draft_vocabulary(adapter: TrainedAdapter) -> str | None:
    """Which tokens can be drafted, where they are not all: in sampling, the text depends on it."""
    vocabulary = adapter.model.draft_vocabulary
    if vocabulary is None:
        return None
    token_ids = np.asarray(vocabulary.token_ids[...])
    return f"{len(token_ids)} tokens ({zlib.crc32(token_ids):08x})"
