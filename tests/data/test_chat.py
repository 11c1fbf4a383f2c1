"""What counts in the loss, read back: the tokens that are learned must spell the assistant's answers, and no more.

For every template, with three tokenizers: bytes, byte-level BPE (GPT-2, Llama-3) and SentencePiece's BPE as Llama-2
has it. The token that ends a turn is learned with its answer.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kangaroo_jax.checkpoint.tokenizer import vocabulary_digest
from kangaroo_jax.data.encode import Encoder, Tokens
from kangaroo_jax.data.records import BadRecord, Conversation, Place, Source, Spelling, Text, Turn, tidy
from kangaroo_jax.errors import InputError
from tests.tokens import byte_tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " | trim + '<|eot_id|>' }}{% endfor %}"
)
# Strict about the order of roles, puts the system text into the user's turn and spaces around the answer.
STRICT = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# template: what is between header and answer, what ends a turn, whether answers lose white space at their ends
TEMPLATES = {
    "vicuna_v1.1": (" ", "</s>", False),
    "llama-2": (" ", " </s>", True),
    "llama-3": ("", "<|eot_id|>", True),
    CHATML: ("", "<|im_end|>", False),
    MARKED: ("", "<|im_end|>", False),
    HEADERS: ("", "<|eot_id|>", True),
    STRICT: (" ", " </s>", True),
}
NAMES = {CHATML: "ChatML", MARKED: "generation-marked", HEADERS: "headers", STRICT: "strict"}

CONVERSATIONS = {
    "one turn": [("user", "Say yes."), ("assistant", "yes")],
    "the answer is in the question": [
        ("user", "yes yes ASSISTANT: yes"),
        ("assistant", "yes"),
        ("user", "yes"),
        ("assistant", "yes"),
    ],
    "system": [
        ("system", "Be brief."),
        ("user", "Why?"),
        ("assistant", "Because."),
        ("user", "?"),
        ("assistant", "So."),
    ],
    "same role twice": [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")],
    "empty turns": [("user", "a"), ("assistant", ""), ("user", " "), ("user", "b"), ("assistant", "c"), ("user", "")],
    "emoji": [("user", "👩‍👩‍👧‍👦 Zoë?"), ("assistant", "🙂 你好 👩🏽‍🚀!🙂"), ("user", "🙂"), ("assistant", "🏳️‍🌈")],
    "line ends": [("user", "a\r\nb"), ("assistant", "c\r\nd\n\n\te  f\n")],
    "code": [("user", "write f"), ("assistant", "```python\ndef f(x):\n    return x['a']  # {{ x }}\n```")],
}
TEXT = [
    "the quick brown fox says yes and no, because it is so brief. def f(x): return x 'a' [/INST] [INST] USER: "
    "ASSISTANT:"
] * 20


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT + ["🙂 🙂 yes 🙂"] * 20, trainer)
    return wrapped(tokenizer)


def sentencepiece():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    tokenizer.decoder = decoders.Sequence(space)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(f"▁{word}" for word in text.split()) for text in TEXT], trainer)
    made = Tokenizer.from_str(tokenizer.to_str())
    made.no_truncation()
    return wrapped(made)


def wrapped(tokenizer):
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bytes": lambda: byte_tokenizer(*SPECIAL), "byte-level": byte_level, "sentencepiece": sentencepiece}


def encode(target, template, *contents):
    encoder = Encoder(target, template)
    return encoder.encode([Place(0, 1)] * len(contents), contents, [Source("a.json")])


def learned(tokenizer, tokens):
    """The runs of learned tokens, as text. A position counts for the token that follows it."""
    runs, ids = [], tokens.ids[1:]
    for counts, group in itertools.groupby(range(len(ids)), lambda i: tokens.counts[i]):
        if counts:
            runs.append(tokenizer.decode(ids[list(group)], clean_up_tokenization_spaces=False))
    assert not tokens.counts[-1]
    return runs


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param](), request.param


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: NAMES.get(template, template))
def test_what_is_learned_is_the_answers_and_their_ends(tokenizer, template, target_with):
    tokenizer, kind = tokenizer
    named = template not in NAMES
    tokenizer.chat_template = None if named else template
    gap, end, trims = TEMPLATES[template]
    conversations = [Conversation(tidy([Turn(*turn) for turn in turns])) for turns in CONVERSATIONS.values()]
    target = target_with(tokenizer)
    for content, tokens in zip(conversations, encode(target, template if named else "", *conversations), strict=True):
        answers = [turn.text for turn in content.turns if turn.role == "assistant"]
        expected = [(answer.strip() if trims else answer) + end for answer in answers]
        runs = learned(tokenizer, tokens)
        if kind == "byte-level" and gap:
            # The header's space and the answer's first letter are one token.
            runs = [run.removeprefix(" ") for run in runs]
        if kind == "sentencepiece":
            # It writes a space before each special token, and before the word that follows one.
            runs = [run.replace(" </s>", "</s>").replace(" <|", "<|") for run in runs]
            expected = [run.replace(" </s>", "</s>") for run in expected]
        assert runs == expected, content
        assert tokens.ids.dtype == np.int32


def test_named_templates_are_what_the_models_were_tuned_with(target_with):
    """Prompts as FastChat's and Meta's code write them."""
    turns = [Turn("user", "Hi"), Turn("assistant", "Yo"), Turn("user", "A?"), Turn("assistant", "B.")]
    vicuna = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Yo</s>USER: A? ASSISTANT: B.</s>"
    )
    llama_2 = "[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] A? [/INST] B. </s>"
    llama_3 = "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
        for role, text in (("system", "S"), ("user", "Hi"), ("assistant", "Yo"), ("user", "A?"), ("assistant", "B."))
    )
    tokenizer = wrapped(byte_tokenizer(*SPECIAL).backend_tokenizer)
    for name, system, expected in (
        ("vicuna_v1.1", [], vicuna),
        ("llama-2", ["S"], llama_2),
        ("llama-3", ["S"], llama_3),
    ):
        content = Conversation((*(Turn("system", text) for text in system), *turns))
        (tokens,) = encode(target_with(tokenizer), name, content)
        assert tokenizer.decode(tokens.ids) == "<s>" + expected


def test_a_conversation_of_100_000_tokens(target_with):
    tokenizer = byte_tokenizer(*SPECIAL)
    tokenizer.chat_template = CHATML
    turns = [Turn(("user", "assistant")[i % 2], f"{i} 🙂" + "x" * 1000) for i in range(100)]
    (tokens,) = encode(target_with(tokenizer), "", Conversation(tuple(turns)))
    assert len(tokens.ids) > 100_000
    assert learned(tokenizer, tokens) == [f"{turn.text}<|im_end|>" for turn in turns[1::2]]


def test_all_of_a_text_is_learned(target_with):
    tokenizer = wrapped(byte_tokenizer().backend_tokenizer)
    parts = [Text("whole"), Text("be", ends=False), Text("ginning 🙂", begins=False)]
    whole, first, last = encode(target_with(tokenizer), "", *parts)
    assert whole.ids.tolist() == [256, *b"whole", 257]
    assert whole.counts.tolist() == [True] * 6 + [False]
    assert first.ids.tolist() == [256, *b"be"]
    assert first.counts.all()  # another part follows the last position
    assert last.ids.tolist() == [*"ginning 🙂".encode(), 257]
    assert last.counts.tolist() == [True] * (len(last.ids) - 1) + [False]


def test_of_a_completion_the_prompt_is_not_learned(target_with):
    tokenizer = wrapped(byte_tokenizer().backend_tokenizer)
    (tokens,) = encode(target_with(tokenizer), "", Text("ab 🙂cd", prompt=4))
    assert tokens.ids.tolist() == [256, *"ab 🙂cd".encode(), 257]
    assert learned(tokenizer, tokens) == ["cd</s>"]
    # What a target wrote is taken as it wrote it, whatever the text would give; of another tokenizer, the text is.
    spelled = Spelling(vocabulary_digest(tokenizer), "", (256, 97, 98, 99, 100, 258), ((2, 3), (4, 6)))
    contents = [Text("abcd", prompt=2, spelling=spelled)]
    for change in ({"tokenizer": "other"}, {"template": "llama-2"}):
        contents.append(dataclasses.replace(contents[0], spelling=dataclasses.replace(spelled, **change)))
    own, *others = encode(target_with(tokenizer), "", *contents)
    assert own.ids.tolist() == [256, 97, 98, 99, 100, 258]
    assert own.counts.tolist() == [False, True, False, True, True, False]
    for tokens in others:
        assert learned(tokenizer, tokens) == ["cd</s>"]


@pytest.mark.parametrize("template", [*TEMPLATES], ids=lambda name: NAMES.get(name, name))
def test_answers_that_are_not_to_be_learned_are_not(target_with, template):
    tokenizer = byte_tokenizer(*SPECIAL)
    named = template in ("vicuna_v1.1", "llama-2", "llama-3")
    tokenizer.chat_template = None if named else template
    turns = [Turn("user", "a"), Turn("assistant", "yes"), Turn("user", "b"), Turn("assistant", "no")]
    for kept in ((True, False), (False, True)):
        some = [turns[0], turns[1]._replace(learned=kept[0]), turns[2], turns[3]._replace(learned=kept[1])]
        both, one = encode(
            target_with(tokenizer), template if named else "", Conversation(tuple(turns)), Conversation(tuple(some))
        )
        runs = learned(tokenizer, both)
        assert learned(tokenizer, one) == [runs[kept.index(True)]]
        assert one.counts.tolist() == (both.counts & one.counts).tolist()
        assert one.ids.tolist() == both.ids.tolist()


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (STRICT, [("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d")], "roles must alternate"),
        ("vicuna_v1.1", [("user", "a"), ("tool", "b"), ("assistant", "d")], "a turn of tool where the template allows"),
        ("llama-2", [("user", "a"), ("system", "b"), ("user", "d")], "a turn of system where the template allows"),
        ("{{ messages[0].content }}", [("user", "a"), ("assistant", "b")], "leaves out or changes answer 0"),
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
            [("user", "a"), ("assistant", "<think>b</think>c")],
            "leaves out '<think>b</think>' at the beginning of answer 0",
        ),
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] + '</s>' }}{% endfor %}",
            [("user", "a"), ("assistant", "<think>\nadd\n</think>\n\n4"), ("user", "b"), ("assistant", "c")],
            r"leaves out '<think>\nadd\n</think>' at the beginning of answer 0",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            [("user", "a"), ("assistant", "b")],
            "leaves out or changes answer 0",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
            [("user", "a"), ("assistant", "b")],
            "leaves out the assistant's turns",
        ),
    ],
)
def test_conversations_that_a_template_cannot_show_are_bad_records(target_with, template, turns, expected):
    tokenizer = byte_tokenizer(*SPECIAL)
    named = template in ("vicuna_v1.1", "llama-2")
    tokenizer.chat_template = None if named else template
    good = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    bad, other = encode(
        target_with(tokenizer), template if named else "", Conversation(tuple(Turn(*turn) for turn in turns)), good
    )
    assert isinstance(bad, BadRecord)
    assert expected in str(bad)
    if named or template == STRICT:
        assert isinstance(other, Tokens)


def test_what_a_target_lacks_is_named(target_with):
    conversation = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    target = target_with(byte_tokenizer())
    with pytest.raises(InputError, match=r"a.json:1: a conversation, but .* no chat template; set data.template to"):
        encode(target, "", conversation)
    with pytest.raises(InputError, match="has no tokenizer"):
        Encoder(target_with(None), "")
    target.eos_token_ids, target.tokenizer.eos_token = (), None
    with pytest.raises(InputError, match="names an EOS token"):
        Encoder(target, "")


@pytest.mark.parametrize(("name", "end"), [("</s>", 257), ("<s>", 256), ("<beyond>", 257)])
def test_a_text_ends_with_the_tokenizers_eos_where_the_model_has_it(name, end, target_with):
    tokenizer = byte_tokenizer("<beyond>")
    tokenizer.eos_token = name
    (tokens,) = encode(target_with(tokenizer, vocab_size=258), "", Text("a"))
    assert tokens.ids.tolist() == [97, end]


def test_a_record_with_a_token_that_the_model_lacks_is_bad_and_others_are_not(target_with):
    target = target_with(byte_tokenizer("<pad>"), vocab_size=258)
    spelled = Spelling(vocabulary_digest(target.tokenizer), "", (97, 258), ((0, 2),))
    bad, good, numbered = encode(target, "", Text("a<pad>b"), Text("ab"), Text("a", spelling=spelled))
    for record in (bad, numbered):
        assert isinstance(record, BadRecord)
        assert str(record).startswith("the token '<pad>' (id 258) is outside the vocabulary of 258; leave it out")
    assert good.ids.tolist() == [97, 98, 257]
