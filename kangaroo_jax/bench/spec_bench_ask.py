"""Asks the target one Spec-Bench question, with Kangaroo and with plain decoding, and times both."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

from kangaroo_jax import DraftConfig, Generation, SamplingConfig, generate, generate_plain
from kangaroo_jax.bench.spec_bench_answers import METHODS, QuestionDetails, QuestionResult, SpecBenchAnswer
from kangaroo_jax.bench.spec_bench_questions import Question
from kangaroo_jax.checkpoint import chat_template
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.chat_template import TemplateRefusal
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.errors import InputError

# Tokens. The time of a shorter answer is mostly its prompt's, and says nothing about decoding.
_MIN_ANSWER = 32


def ask_question(
    target: Target,
    adapter: TrainedAdapter,
    question: Question,
    draft: DraftConfig,
    max_new_tokens: int,
    runs: int,
    sampling: SamplingConfig,
) -> QuestionResult:
    """Both methods' answers to all turns. Each method's conversation contains its own earlier answers.

    Where prompt and answer do not both fit into the context, the answer's limit is what the prompt leaves, the same for
    both methods; a question with a prompt that leaves less than 32 tokens (or `max_new_tokens`, if that is less) is
    skipped with all its turns. Spec-Bench itself truncates nothing.

    Args:
      target: with a tokenizer.
      adapter: one for the target.
      question: what to ask.
      draft: exit layer, gamma, eta, tree.
      max_new_tokens: maximum tokens of one turn's answer; EOS ends it earlier.
      runs: timed runs of each method per turn, interleaved; the median of their seconds counts.
      sampling: greedy, or how both methods sample; all runs of a turn by the same seed.

    Raises:
      InputError: for a chat template that does not work.
    """
    call = {
        "kangaroo": functools.partial(generate, target, adapter, draft=draft, sampling=sampling),
        "plain": functools.partial(generate_plain, target, sampling=sampling),
    }
    context = target.config.context
    conversation: dict[str, list[str]] = {method: [] for method in METHODS}
    prompt_tokens: dict[str, list[int]] = {method: [] for method in METHODS}
    generations: dict[str, list[list[Generation]]] = {method: [] for method in METHODS}
    allowed, cut = [], []
    for turn in question.turns:
        prompts = {method: conversation_ids(target, [*conversation[method], turn]) for method in METHODS}
        longest = max(map(len, prompts.values()))
        limit = min(max_new_tokens, context - longest)
        if limit < min(max_new_tokens, _MIN_ANSWER):
            reason = f"turn {len(allowed) + 1} has a prompt of {longest} tokens, too long for the context of {context}"
            return _skipped(question, reason)
        timed: dict[str, list[Generation]] = {method: [] for method in METHODS}
        for _ in range(runs):
            for method in METHODS:
                timed[method].append(call[method]([prompts[method]], max_new_tokens=limit))
        for method in METHODS:
            generations[method].append(timed[method])
            prompt_tokens[method].append(len(prompts[method]))
            conversation[method] += [turn, _text(timed[method][0])]
        allowed.append(limit)
        cut.append(limit < max_new_tokens and any(_reached(target, timed[method][0], limit) for method in METHODS))
    return QuestionResult(
        question.question_id,
        question.category,
        {method: _answer(generations[method]) for method in METHODS},
        QuestionDetails(
            skipped=None,
            prompt_tokens=prompt_tokens,
            max_new_tokens=allowed,
            cut=cut,
            draft_lengths=[length for timed in generations["kangaroo"] for length in timed[0].draft_lengths[0]],
            seconds={method: [list(map(_seconds, timed)) for timed in generations[method]] for method in METHODS},
            compile_seconds=sum(
                run.seconds.compile for turns in generations.values() for timed in turns for run in timed
            ),
        ),
    )


def conversation_ids(target: Target, texts: Sequence[str]) -> list[int]:
    """Token ids of a conversation that ends with the user's turn, up to where the answer starts.

    By the tokenizer's chat template if it has one; else the texts with a blank line after each.

    Args:
      target: with a tokenizer.
      texts: of the user and the model, in turns.

    Raises:
      InputError: for a chat template that does not work.
    """
    tokenizer = target.tokenizer
    if not tokenizer.chat_template:
        return tokenizer.encode("".join(f"{text}\n\n" for text in texts), verbose=False)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    try:
        return chat_template.prompt_ids(messages, tokenizer)
    except TemplateRefusal as error:
        raise InputError(f"{target.name}: {error}") from None


def _answer(turns: list[list[Generation]]) -> SpecBenchAnswer:
    """From the runs of each turn, which differ only in their seconds."""
    return SpecBenchAnswer(
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


def _reached(target: Target, out: Generation, limit: int) -> bool:
    return len(out.tokens[0]) == limit and out.tokens[0][-1] not in target.eos_token_ids


def _skipped(question: Question, reason: str) -> QuestionResult:
    details = QuestionDetails(
        reason, {method: [] for method in METHODS}, [], [], [], {method: [] for method in METHODS}, 0.0
    )
    return QuestionResult(question.question_id, question.category, {}, details)
