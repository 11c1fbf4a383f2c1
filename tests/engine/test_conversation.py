"""Turns of a conversation as prompts, and what the engine prefills of them.

Truth: each prompt in an engine of its own; transformers' `apply_chat_template`.
"""

import dataclasses
import functools

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from kangaroo_jax import DraftConfig, Engine, EngineConfig, Finished, InputError, Request
from kangaroo_jax.engine.conversation import Conversation
from tests.chat_templates import CHATML, LLAMA_2, TEMPLATES, WITH_SYSTEM
from tests.decode.models import LETTERS, VOCABULARY, tiny_adapter, tiny_target

MARKS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
# Leaves out what earlier answers begin with, up to z.
FORGETFUL = CHATML.replace("m.content +", "(m.content.split('z')[-1] if m.role == 'assistant' else m.content) +")


@functools.cache
def chat_target(template=CHATML, eos="<|im_end|>"):
    """The tiny target with letters as tokens; "ab" and "abc" are one token each where text is encoded. The marks of the
    template are the vocabulary's end; all other characters are the letter a."""
    letters = LETTERS[: VOCABULARY - len(MARKS) - 2]
    vocabulary = {name: i for i, name in enumerate([*letters, "ab", "abc"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b"), ("ab", "c")], unk_token="a"))
    made.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(MARKS[:2])
    )
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids(eos)
    assert max(tokenizer.get_vocab().values()) < VOCABULARY
    return dataclasses.replace(tiny_target(), tokenizer=tokenizer, eos_token_ids=(end,))


def answer(engine, ids, most=24):
    id = engine.add(Request(ids, most, stream=False))
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                assert event.id == id
                found = event.answer
    return found


def new_engine(target):
    return Engine(target, tiny_adapter(2), EngineConfig(1), DraftConfig(2, 4, 0.1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ChatML" else [pytest.mark.long]) for name in TEMPLATES]
)
def test_three_turns_with_reuse_equal_three_without(name):
    target = chat_target(TEMPLATES[name], "</s>")
    conversation = Conversation(target, [{"role": "system", "content": "brief"}] if name in WITH_SYSTEM else [])
    engine, before, held = new_engine(target), [], 0
    for turn, text in enumerate(["tell me of the quick brown fox", "and what of it", "so"]):
        ids = conversation.ask(text)
        assert ids[: len(before)] == before  # as the model read and wrote it
        with_reuse, without = answer(engine, ids), answer(new_engine(target), ids)
        assert with_reuse.tokens == without.tokens
        assert with_reuse.text == without.text
        assert without.reused_tokens == 0
        # All but what is new and the last two tokens, which the caches may lack.
        assert with_reuse.reused_tokens == (held - 2 if turn else 0)
        conversation.answered(with_reuse.tokens, with_reuse.text)
        tokens = with_reuse.tokens
        held = len(ids) + len(tokens)
        # EOS gives way to what the template ends an answer with.
        before = ids + (tokens[:-1] if tokens[-1] in target.eos_token_ids else tokens)
    assert [message["role"] for message in conversation.messages[-4:]] == ["user", "assistant"] * 2


def ids_of(target, messages):
    return target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_the_answers_own_tokens_are_kept():
    """The model wrote a, b, c; the tokenizer would make one token of it."""
    target = chat_target()
    conversation = Conversation(target)
    first = conversation.ask("hi")
    end = target.eos_token_ids[0]
    conversation.answered([0, 1, 2, end], "abc")
    second = conversation.ask("so")
    assert second[: len(first) + 4] == [*first, 0, 1, 2, end]
    encoded = ids_of(target, conversation.messages)
    assert encoded[: len(first) + 4] != second[: len(first) + 4]
    rest = encoded[encoded.index(end, len(first)) + 1 :]
    assert second[len(first) + 4 :] == rest


@pytest.mark.parametrize("template", [CHATML, LLAMA_2])
def test_an_answer_that_was_cut_is_ended_by_the_template(template):
    target = chat_target(template, "</s>" if template == LLAMA_2 else "<|im_end|>")
    conversation = Conversation(target)
    first = conversation.ask("hi")
    conversation.answered([3, 4], "de")
    second = conversation.ask("so")
    assert second[: len(first) + 2] == [*first, 3, 4]
    rest = second[len(first) + 2 :]
    assert target.eos_token_ids[0] in rest[:2]  # Llama-2 puts a space before it
    assert ids_of(target, conversation.messages)[-len(rest) :] == rest


def test_another_end_than_the_templates_is_replaced_by_it():
    target = chat_target(CHATML, "</s>")
    conversation = Conversation(target)
    conversation.ask("hi")
    conversation.answered([3, 4, target.eos_token_ids[0]], "de")
    assert conversation.ask("so") == ids_of(target, conversation.messages)


@pytest.mark.parametrize(
    ("template", "tokens", "text", "complete"),
    [(FORGETFUL, [25, 0, 1], "zab", True), (CHATML, [0, 1, 2], "a", False)],
    ids=["the template shows less", "a stop string was cut off"],
)
def test_what_is_not_shown_as_it_was_is_encoded_again(template, tokens, text, complete):
    target = chat_target(template)
    conversation = Conversation(target)
    conversation.ask("hi")
    conversation.answered([*tokens, target.eos_token_ids[0]], text, complete)
    assert conversation.ask("so") == ids_of(target, conversation.messages)


def test_special_tokens_in_a_later_turn_stay_text():
    target = chat_target()
    conversation = Conversation(target)
    conversation.ask("hi")
    end = target.eos_token_ids[0]
    conversation.answered([3, end], "d")
    assert conversation.ask("x<|im_end|>y").count(end) == 4  # of system, user, assistant and user


def test_no_answer_takes_the_turn_back_and_reset_forgets():
    system = {"role": "system", "content": "brief"}
    conversation = Conversation(chat_target(), [system])
    first = conversation.ask("hi")
    conversation.answered([], "")
    assert conversation.messages == [system]
    assert conversation.ask("hi") == first
    conversation.answered([3], "d")
    conversation.ask("so")
    conversation.reset()
    assert conversation.messages == [system]
    assert conversation.ask("hi") == first


def test_messages_that_the_template_refuses_are_named_before_the_first_turn():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    with pytest.raises(InputError, match="no system turn"):
        Conversation(chat_target(refusing), [{"role": "system", "content": "Be brief."}])
    assert Conversation(chat_target(refusing)).ask("hello")


def test_bad_turns_leave_the_conversation_as_it_was():
    with pytest.raises(InputError, match="has no tokenizer"):
        Conversation(tiny_target())
    with pytest.raises(InputError, match="message 0 is of the unknown role 'robot'"):
        Conversation(chat_target(), [{"role": "robot", "content": "a"}])
    with pytest.raises(InputError, match="end with a user's turn, which nothing answers"):
        Conversation(chat_target(), [{"role": "user", "content": "a"}])
    conversation = Conversation(chat_target(), max_length=90)
    first = conversation.ask("hi")
    conversation.answered([3] * 4, "dddd")
    before = list(conversation.messages)
    with pytest.raises(InputError, match=r"the conversation has .* tokens, but the context is 90"):
        conversation.ask("x" * 80)
    with pytest.raises(InputError, match="not valid Unicode"):
        conversation.ask("\ud800")
    assert conversation.messages == before
    assert conversation.ask("so")[: len(first) + 4] == [*first, 3, 3, 3, 3]
