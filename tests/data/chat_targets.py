"""A tiny random target with a chat template: it asks and answers in letters, of few tokens, often the same."""

import dataclasses
import functools

import jax
import tokenizers
from flax import nnx
from transformers import PreTrainedTokenizerFast

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.model.target import TargetModel
from tests.decode.models import CONFIG, LETTERS, VOCABULARY

ENDS = 9
TEMPLATE = (
    "{{ '<b>' }}{% for m in messages %}{{ ('<u>' if m.role == 'user' else '<a>' if m.role == 'assistant' else '') }}"
    "{{ m.content + '<e>' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


@functools.cache
def chat_target(template=TEMPLATE):
    """Letters, and special tokens at the vocabulary's end: <b>, <u>, <a>, and several that end a turn, of which the
    template uses <e>."""
    special = ["<b>", "<u>", "<a>", "<e>", *(f"<e{i}>" for i in range(1, ENDS))]
    letters = LETTERS[: VOCABULARY - len(special)]
    vocabulary = {token: i for i, token in enumerate([*letters, *special])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<b>", eos_token="<e>", additional_special_tokens=special[1:]
    )
    made.chat_template = template
    ends = tuple(range(VOCABULARY - ENDS, VOCABULARY))
    return Target(model=_model(), tokenizer=made, name="chat", fingerprint="chat", eos_token_ids=ends)


@functools.cache
def _model():
    """Two random layers, whose weights are large enough that greedy text wanders."""
    model = TargetModel(dataclasses.replace(CONFIG, num_hidden_layers=2), rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, model)
