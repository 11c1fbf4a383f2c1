"""Vicuna-13B."""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "lmsys/vicuna-13b-v1.3"
    config.exit_layer = 3  # the paper's for 13B
    config.output = "runs/vicuna_13b"
    return config
