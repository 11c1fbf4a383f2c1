"""Answers a file of prompts into a file of answers, by one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kangaroo_jax import json_text, resumable
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, EngineConfig, SamplingConfig
from kangaroo_jax.engine import answer_file
from kangaroo_jax.engine.engine import Engine, resolve_exit_layer
from kangaroo_jax.engine.prompt_file import Prompt
from kangaroo_jax.engine.prompts import encode_prompt, user_turn
from kangaroo_jax.engine.requests import Answer, Finished, Request
from kangaroo_jax.errors import InputError


@dataclasses.dataclass
class Tally:
    """What a run has done so far; of several processes' runs, what this one has.

    Attributes:
      total: prompts of this process, those of earlier runs included.
      before: answered by earlier runs.
      prompts: answered now.
      errors: prompts that could not be answered; at the end, in process 0, all processes'.
      new_tokens: of the prompts answered now.
      committed: tokens that rounds committed.
      rounds: of decoding.
      compile_seconds: of compilation, in no other figure.
    """

    total: int
    before: int
    prompts: int = 0
    errors: int = 0
    new_tokens: int = 0
    committed: int = 0
    rounds: int = 0
    compile_seconds: float = 0.0
    start: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, answer: Answer, compile_seconds: float) -> None:
        """One more answer. `compile_seconds` is all of the run so far."""
        self.prompts += 1
        self.new_tokens += len(answer.tokens)
        self.committed += sum(answer.accept_lengths)
        self.rounds += len(answer.accept_lengths)
        self.compile_seconds = compile_seconds

    @property
    def seconds(self) -> float:
        """Wall-clock since the beginning, without compilation."""
        return max(time.monotonic() - self.start - self.compile_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def mean_accept_length(self) -> float:
        """Tokens per round; plain decoding has 1.0."""
        return self.committed / self.rounds if self.rounds else 1.0

    def as_json(self) -> dict[str, int | float]:
        """The figures that a report shows."""
        names = ("prompts", "before", "errors", "new_tokens", "seconds", "compile_seconds", "mean_accept_length")
        return {name: getattr(self, name) for name in names}


def answer_prompts(
    target: Target,
    adapter: TrainedAdapter | None,
    prompts: list[Prompt],
    output: pathlib.Path,
    *,
    source: str,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    stop: list[str] | tuple[str, ...] = (),
    as_user_turns: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Tally], None] = lambda _: None,
    on_error: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Answers all prompts that `output` has no answer to yet, each with a line as soon as it is done.

    A prompt that is empty or does not fit, or whose answer fails (`Answer.error`), gets a line with its error, and is
    tried again by the next run. An answer that would pass the target's context ends there. Of several processes, which
    see the same files, each takes its share with its own devices; process 0 merges.

    Args:
      target: from `load_target`, with a tokenizer.
      adapter: from `load_adapter`; None decodes plainly, but for what `draft.lookup` finds.
      prompts: with ids of their own.
      output: the file of answer_file.
      source: the prompts' file, for messages.
      batch_size: as in `generate_many`, per process; the answers do not depend on it, but for sampled ones where
        sequences decide how far to draft.
      max_new_tokens: of prompts that do not say.
      draft: exit layer, gamma, eta, trees and look-ups.
      sampling: with one seed, for prompts that do not say.
      stop: strings that end an answer.
      as_user_turns: whether prompts that are text are a user's turn of the target's chat template.
      process_index: of this process.
      process_count: how many there are.
      barrier: waits for all processes; called with a name that is the same in all.
      on_progress: called after each prompt.
      on_error: called with a line about each prompt that cannot be answered.

    Raises:
      InputError: for answers of other settings or prompts in `output`, before anything is changed, and as
        `generate_many` does.
    """
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside it")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    settings = _settings(target, adapter, max_new_tokens, draft.at(batch_size), sampling, stop, batch_size)
    if as_user_turns:
        settings["prompts"] = "user turns"
    by_id = {prompt.id: prompt for prompt in prompts}
    first = process_index == 0
    with answer_file.locked(output) if first else contextlib.nullcontext():
        done = answer_file.finished(output, settings, by_id, source)
        barrier("answers read")
        if first:
            answer_file.settle(output, settings, done)
        barrier("answers settled")
        share = [prompt for prompt in prompts if prompt.id not in done][process_index::process_count]
        path = answer_file.part(output, process_index, process_count)
        tally = Tally(len(share) + len(done), len(done))
        on_progress(tally)
        with resumable.LineWriter(path) as writer:

            def fail(prompt: Prompt, error: str) -> None:
                tally.errors += 1
                writer.write(answer_file.record(prompt, None, error))
                on_error(f"{source} id {prompt.id!r}: {error}")
                on_progress(tally)

            engine = Engine(target, adapter, EngineConfig(batch_size), draft)
            by_request = {}
            for prompt in share:
                most = prompt.max_new_tokens or max_new_tokens
                try:
                    content = user_turn(prompt.content) if as_user_turns else prompt.content
                    ids = encode_prompt(target, content, 1, None, "the prompt")
                except InputError as error:
                    fail(prompt, str(error))
                    continue
                request = Request(ids, most, sampling, stop, seed=prompt.seed, stream=False, to_context=True)
                by_request[engine.add(request)] = prompt
            while engine.busy:
                for event in engine.step():
                    if not isinstance(event, Finished):
                        continue
                    prompt, answer = by_request[event.id], event.answer
                    if answer.error is not None:
                        fail(prompt, answer.error)
                        continue
                    writer.write(answer_file.record(prompt, answer))
                    tally.add(answer, engine.compile_seconds)
                    on_progress(tally)
        barrier("answers written")
        if first and process_count > 1:
            tally.errors = _merge(output, settings, by_id, source, process_count)
        barrier("answers merged")
    return tally


def _merge(
    output: pathlib.Path, settings: dict[str, Any], prompts: Mapping[Any, Prompt], source: str, count: int
) -> int:
    """Puts all processes' parts into the output; returns how many errors they hold."""
    for i in range(count):
        part = answer_file.part(output, i, count)
        if not part.exists():
            raise InputError(f"{part}: not there; --output must be in a folder that all processes share")
    answer_file.settle(output, settings, answer_file.finished(output, settings, prompts, source), errors=True)
    return sum("error" in json_text.parse(line) for line in resumable.whole_lines(output))


def _settings(
    target: Target,
    adapter: TrainedAdapter | None,
    max_new_tokens: int,
    draft: DraftConfig,
    sampling: SamplingConfig,
    stop: list[str] | tuple[str, ...],
    batch_size: int,
) -> dict[str, Any]:
    """What an answer depends on, in terms that a message can name: JSON values, as they are read again."""
    settings = {
        "model": f"{pathlib.Path(target.name).name} ({target.fingerprint})",
        "dtype": target.model.arithmetic,
        "max_new_tokens": max_new_tokens,
        **({"adapter": None} if adapter is None else _drafting(target, adapter, draft)),
        "lookup": None if draft.lookup is None else dataclasses.asdict(draft.lookup),
        **dataclasses.asdict(sampling),
        "stop": list(stop),
    }
    if draft.decide is not None and sampling.temperature > 0:
        # A sampled text depends on what a sequence decides, and that on the number of slots.
        settings["decide"] = dataclasses.asdict(draft.decide) | {"slots": batch_size}
    return json.loads(json.dumps(settings))


def _drafting(target: Target, adapter: TrainedAdapter, draft: DraftConfig) -> dict[str, Any]:
    return {
        "adapter": pathlib.Path(adapter.name).name,
        "exit_layer": resolve_exit_layer(target, adapter, draft),
        "max_draft_len": draft.max_draft_len,
        "threshold": draft.threshold,
        "tree": None if draft.tree is None else dataclasses.asdict(draft.tree),
        "draft_vocabulary": _draft_vocabulary(adapter),
    }


def _draft_vocabulary(adapter: TrainedAdapter) -> str | None:
    """Which tokens can be drafted, where they are not all: in sampling, the text depends on it."""
    vocabulary = adapter.model.draft_vocabulary
    if vocabulary is None:
        return None
    token_ids = np.asarray(vocabulary.token_ids[...])
    return f"{len(token_ids)} tokens ({zlib.crc32(token_ids):08x})"
