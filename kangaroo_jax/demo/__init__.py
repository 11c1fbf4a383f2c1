"""The small target and adapter that ship with the project (see README.md beside this file)."""

import pathlib

MODEL = pathlib.Path(__file__).parent / "model"
ADAPTER = pathlib.Path(__file__).parent / "adapter"
PROMPT = '''\
class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item):'''
