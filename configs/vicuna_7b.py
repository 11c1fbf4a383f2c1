"""Vicuna-7B."""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "lmsys/vicuna-7b-v1.3"
    config.output = "runs/vicuna_7b"
    return config
