"""SentencePiece's byte-pair encoding (Llama 2, Mistral, Vicuna) as a tokenizer of the tokenizers library.

From a tokenizer.model file, or from the same pieces in another file. transformers' conversion of tokenizer.model takes
a text that begins with spaces otherwise than SentencePiece does; the tests compare this one with SentencePiece.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kangaroo_jax.errors import InputError

# Types of pieces, as SentencePiece counts them, and llama.cpp after it.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6

_SPACE = "▁"


def read_sentencepiece(file: pathlib.Path, legacy: bool = True) -> Tokenizer:
    """The tokenizer in a tokenizer.model file.

    Args:
      file: its path.
      legacy: whether text after a special token begins with a space, as at the beginning of a prompt; otherwise it does
        not, as in transformers with the setting of this name.

    Raises:
      InputError: for a file of another format, or a model that is not byte-pair encoding.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(
            f"{file}: reading it needs the packages sentencepiece and protobuf; pip install sentencepiece protobuf, "
            "or save the tokenizer as tokenizer.json (a fast tokenizer)"
        ) from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception:  # of protobuf, whose class depends on its version
        model.Clear()
    if not model.pieces:
        raise InputError(
            f"{file}: truncated or not a SentencePiece model (Llama 3's tokenizer.model is another format); expected "
            "one, or tokenizer.json beside it"
        )
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise InputError(
            f"{file}: a SentencePiece model of another kind than BPE is not supported; save the tokenizer as "
            "tokenizer.json (a fast tokenizer)"
        )
    rules = model.normalizer_spec
    before: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        before.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        before += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return sentencepiece_bpe(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        before=before,
        prefix=("always" if legacy else "first") if rules.add_dummy_prefix else "never",
    )


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    before: Sequence[normalizers.Normalizer] = (),
    prefix: str = "always",
) -> Tokenizer:
    """A tokenizer that joins the pair with the best score first, and spells what is in no piece in bytes.

    Args:
      pieces: by token id.
      scores: of the pieces.
      types: of the pieces.
      before: what is done to a text first.
      prefix: where a space is put before a text: "always", also after a special token; at the "first" only; "never".
    """
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    pairs = []
    for i, piece in enumerate(pieces):
        if types[i] in (UNKNOWN, CONTROL, UNUSED, BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[i], left, right, (piece[:cut], piece[cut:])))
    pairs.sort()
    unknown = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for *_, pair in pairs],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    steps = list(before)
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(_SPACE)] if prefix == "always" else []
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    spell = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(spell + ([] if prefix == "never" else [decoders.Strip(" ", 1, 0)]))
    add_special(tokenizer, pieces, types)
    return tokenizer


def add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Makes the tokenizer find control and user-defined tokens in a text before it splits it."""
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED) and token
        ]
    )
