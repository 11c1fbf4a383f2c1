"""Vicuna-7B, the model of the paper's main results: llama7b.py with that target.

    python train.py --config=configs/vicuna_7b.py --config.data.files='sharegpt/*.jsonl'

Its checkpoint is in PyTorch's format: pip install torch, or convert it to safetensors, which several processes read in
parts.

Hardware, expected memory, what is measured and what is not: as in llama7b.py, the shape being the same.
"""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "lmsys/vicuna-7b-v1.3"
    config.data.template = "vicuna_v1.1"  # its tokenizer has none
    config.output = "runs/vicuna_7b"
    return config
