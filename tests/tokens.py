"""Small tokenizers: bytes as tokens, and letters the way SentencePiece has them."""

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Token id = byte; 256 is BOS and 257 EOS, as the golden targets were trained. `special` tokens follow."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet: these stand for themselves
    moved = [byte for byte in range(256) if byte not in kept]
    vocabulary = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}
    vocabulary |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(special)
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's: a space is part of the word behind it, the first one of a text is left out when it is decoded, and
    what is not in the vocabulary is bytes. A letter, and a space with a letter, is a token."""
    letters = [*string.ascii_letters, *string.punctuation]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    names += ["▁" + letter for letter in letters]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [("▁", letter) for letter in letters]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
