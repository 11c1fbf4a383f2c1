"""Llama-3-8B."""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.output = "runs/llama3_8b"
    config.loss_chunk = 64  # its vocabulary is four times as large
    return config
