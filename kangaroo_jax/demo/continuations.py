"""Writes the demo target's own greedy continuations of its training text, as JSONL to train the adapter on.

A draft model is asked about what the target says, not about what people wrote; an adapter trained on the target's own
text agrees with it more often there. `python -m kangaroo_jax.cli.demo_continuations` is the command.
"""

from __future__ import annotations

import json
import pathlib
import random

from kangaroo_jax import demo, generate_plain, load_target
from kangaroo_jax.demo import corpus
from kangaroo_jax.report import SILENT, Report

_BATCH = 16
_PROMPT_TOKENS = 64
_NEW_TOKENS = 191


def write_continuations(output: pathlib.Path, count: int, report: Report = SILENT) -> None:
    """Writes `count` continuations (a multiple of 16) of random places of the training text."""
    target = load_target(demo.MODEL, "float32")
    sources = list(corpus.standard_library(held_out=False).values())
    sizes = [len(text) for text in sources]
    rng = random.Random(0)

    def prompt() -> list[int]:
        """64 tokens from a random place, after the first, which may be half a word."""
        while True:
            (text,) = rng.choices(sources, sizes)
            start = rng.randrange(max(1, len(text) - 500))
            ids = target.tokenizer.encode(text[start : start + 700], verbose=False)[1 : 1 + _PROMPT_TOKENS]
            if len(ids) == _PROMPT_TOKENS:
                return ids

    with output.open("w", encoding="utf-8") as file, report.bar("continuations", count, "continuation") as bar:
        for done in range(0, count, _BATCH):
            bar.show(done)
            prompts = [prompt() for _ in range(_BATCH)]
            out = generate_plain(target, prompts, _NEW_TOKENS, eos_token_ids=())
            for before, after in zip(prompts, out.tokens, strict=True):
                text = target.tokenizer.decode(before + after, clean_up_tokenization_spaces=False)
                file.write(json.dumps({"text": text}) + "\n")
