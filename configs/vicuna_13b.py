"""Vicuna-13B: llama7b.py with that target and the paper's exit layer for 13B, 3.

    python train.py --config=configs/vicuna_13b.py --config.data.files='sharegpt/*.jsonl'

Its checkpoint is in PyTorch's format: pip install torch, or convert it to safetensors, which several processes read in
parts.

Hardware: sized for a v5e slice of 4x4 (16 chips of 16 GiB), weights and batch split 16 ways. Expected memory, per
device and as compiled by `--preflight=v5e:4x4`: 4.2 GiB at most, of which 1.7 GiB are weights and optimizer. Measured:
these figures of the compiler (docs/preflight.md). Not measured: time, and the acceptance to expect; it has not been run
at this size.
"""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "lmsys/vicuna-13b-v1.3"
    config.data.template = "vicuna_v1.1"  # its tokenizer has none
    config.exit_layer = 3  # the paper's for 13B
    config.output = "runs/vicuna_13b"
    return config
