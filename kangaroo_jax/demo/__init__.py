"""The small target and adapter that ship with the project (see README.md beside this file)."""

import pathlib

from kangaroo_jax.config import DraftConfig

MODEL = pathlib.Path(__file__).parent / "model"
ADAPTER = pathlib.Path(__file__).parent / "adapter"
# The fastest of a few on held-out prompts, on a CPU; the adapter is less sure of itself than the paper's.
DRAFT = DraftConfig(max_draft_len=6, threshold=0.3)
PROMPT = '''\
class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item):'''
