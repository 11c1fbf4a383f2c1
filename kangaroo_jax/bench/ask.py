"""Asks the target one Spec-Bench question, with Kangaroo and plainly, and times both."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

from kangaroo_jax.bench.answers import METHODS, Answer, Details, Result
from kangaroo_jax.bench.questions import Question
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.decode.autoregressive import generate_plain
from kangaroo_jax.decode.generate import generate
from kangaroo_jax.decode.host_loop import Generation
from kangaroo_jax.errors import InputError

# Tokens. A shorter answer's time is its prompt's, and says nothing about decoding.
_LEAST_ANSWER = 32


def ask(
    target: Target, adapter: TrainedAdapter, question: Question, draft: DraftConfig, max_new_tokens: int, runs: int
) -> Result:
    """Both methods' answers to all turns. Each goes on from its own answers to the turns before.

    Where prompt and answer do not both fit into the context, the answer is allowed what the prompt leaves, for both
    methods alike; a question of which a prompt leaves less than 32 tokens (or `max_new_tokens`, if that is less) is
    skipped as a whole. Spec-Bench itself truncates nothing.

    Args:
      target: with a tokenizer.
      adapter: the target's.
      question: what to ask.
      draft: exit layer, gamma, eta.
      max_new_tokens: most tokens of one turn's answer; EOS ends it earlier.
      runs: timed runs of each method per turn, interleaved; the median of their seconds counts.

    Raises:
      InputError: for a chat template that does not work.
    """
    call = {
        "kangaroo": functools.partial(generate, target, adapter, draft=draft),
        "plain": functools.partial(generate_plain, target),
    }
    context = target.config.max_position_embeddings
    said: dict[str, list[str]] = {method: [] for method in METHODS}
    asked: dict[str, list[int]] = {method: [] for method in METHODS}
    generations: dict[str, list[list[Generation]]] = {method: [] for method in METHODS}
    allowed, cut = [], []
    for turn in question.turns:
        prompts = {method: conversation_ids(target, [*said[method], turn]) for method in METHODS}
        longest = max(map(len, prompts.values()))
        most = min(max_new_tokens, context - longest)
        if most < min(max_new_tokens, _LEAST_ANSWER):
            reason = f"turn {len(allowed) + 1} has a prompt of {longest} tokens, too long for the context of {context}"
            return _skipped(question, reason)
        timed: dict[str, list[Generation]] = {method: [] for method in METHODS}
        for _ in range(runs):
            for method in METHODS:
                timed[method].append(call[method]([prompts[method]], max_new_tokens=most))
        for method in METHODS:
            generations[method].append(timed[method])
            asked[method].append(len(prompts[method]))
            said[method] += [turn, _text(timed[method][0])]
        allowed.append(most)
        cut.append(most < max_new_tokens and any(_ran_out(target, timed[method][0], most) for method in METHODS))
    return Result(
        question.question_id,
        question.category,
        {method: _answer(generations[method]) for method in METHODS},
        Details(
            skipped=None,
            prompt_tokens=asked,
            max_new_tokens=allowed,
            cut=cut,
            draft_lengths=[length for timed in generations["kangaroo"] for length in timed[0].draft_lengths[0]],
            seconds={method: [list(map(_seconds, timed)) for timed in generations[method]] for method in METHODS},
            compile_seconds=sum(
                run.seconds.compile for turns in generations.values() for timed in turns for run in timed
            ),
        ),
    )


def conversation_ids(target: Target, said: Sequence[str]) -> list[int]:
    """Token ids of a conversation that ends with the user's turn, up to where the answer starts.

    In the tokenizer's chat template where it has one; else what was said, a blank line after each.

    Args:
      target: with a tokenizer.
      said: the user's and the model's words, in turns.

    Raises:
      InputError: for a chat template that does not work.
    """
    tokenizer = target.tokenizer
    if not tokenizer.chat_template:
        return tokenizer.encode("".join(f"{words}\n\n" for words in said), verbose=False)
    messages = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(said)]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except ImportError:
        raise InputError("jinja2 is not installed, and chat templates need it; pip install jinja2") from None
    except Exception as error:  # whatever a template may raise
        raise InputError(f"{target.name}: its chat template does not work: {error}") from error
    # The template has written the special tokens itself.
    return tokenizer.encode(prompt, add_special_tokens=False, verbose=False)


def _answer(turns: list[list[Generation]]) -> Answer:
    """From the runs of each turn, which differ in their seconds alone."""
    return Answer(
        turns=[_text(runs[0]) for runs in turns],
        decoding_steps=[len(runs[0].accept_lengths[0]) for runs in turns],
        new_tokens=[len(runs[0].tokens[0]) for runs in turns],
        wall_time=[statistics.median(map(_seconds, runs)) for runs in turns],
        accept_lengths=[length for runs in turns for length in runs[0].accept_lengths[0]],
    )


def _text(out: Generation) -> str:
    return out.texts[0].strip()  # as Spec-Bench does, before the text goes into the next turn's prompt


def _seconds(out: Generation) -> float:
    return out.seconds.prefill + out.seconds.decode


def _ran_out(target: Target, out: Generation, most: int) -> bool:
    return len(out.tokens[0]) == most and out.tokens[0][-1] not in target.eos_token_ids


def _skipped(question: Question, reason: str) -> Result:
    nothing = Details(reason, {method: [] for method in METHODS}, [], [], [], {method: [] for method in METHODS}, 0.0)
    return Result(question.question_id, question.category, {}, nothing)
