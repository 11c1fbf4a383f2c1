"""Mistral-7B-Instruct-v0.3: llama7b.py with that target. The paper has no figures for it; exit layer 2 is that of its
7B.

    python train.py --config=configs/mistral_7b.py --config.data.files='data/*.jsonl'

Hardware: sized for a v5e slice of 4x4 (16 chips of 16 GiB), weights and batch split 16 ways. Expected memory, per
device and as compiled by `--preflight=v5e:4x4`: 2.4 GiB at most, of which 0.9 GiB are weights and optimizer. Measured:
these figures of the compiler (docs/preflight.md). Not measured: time, and the acceptance to expect; it has not been run
at this size.
"""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "mistralai/Mistral-7B-Instruct-v0.3"
    config.data.template = ""  # the tokenizer's own
    config.output = "runs/mistral_7b"
    return config
