"""Trains an adapter for the small target that ships with the project, on the Python standard library.

    python train.py --config=configs/demo.py

Hardware: any CPU. Measured on 2 cores of an Intel Xeon: 15 minutes for the 800 steps; held-out expected acceptance from
0.310 before the first step to 0.528, top-1 agreement from 0.227 to 0.441. The adapter that ships was trained otherwise:
see kangaroo_jax/demo/README.md.
"""

import pathlib

import ml_collections

import kangaroo_jax


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    # Found beside the package, whatever folder the command runs in.
    config.target = str(pathlib.Path(kangaroo_jax.__file__).parent / "demo" / "model")
    config.dtype = "float32"
    config.exit_layer = 2
    config.teacher = "online"  # or cached: the target's last hidden states are computed once and kept on disk
    config.output = "runs/demo"
    config.seed = 0

    config.steps = 800
    config.batch_size = 16
    config.sequence_length = 256
    config.loss_chunk = 64  # positions of each sequence whose logits exist at once
    config.loss = "total_variation"  # or cross_entropy, as the authors, or both: see docs/adapter.md
    config.initialization = "layer"  # attention of the target's layer exit_layer; or zero_output, or random

    config.data = ml_collections.ConfigDict()
    config.data.files = "stdlib"  # or paths, globs and gs:// paths of text, JSON and JSONL files, separated by commas
    config.data.evaluation_files = ""  # empty: the standard library's held-out modules
    config.data.held_out = 0.02  # share of the records, for other files without evaluation files
    config.data.template = ""  # chat template: empty for the tokenizer's own, or vicuna_v1.1, llama-2, llama-3
    config.data.cache = ""  # folder for the token ids; empty: ~/.cache/kangaroo_jax/data
    config.data.max_bad_share = 0.01  # more bad records than this share of all are refused, fewer are skipped

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 0.5

    config.mesh = ml_collections.ConfigDict()  # devices along each axis; -1 is the rest
    config.mesh.data = 1  # the batch alone is split
    config.mesh.fsdp = -1  # batch and weights; a weight is gathered where it is used
    config.mesh.model = 1  # each layer's heads and width, and the vocabulary

    config.log_every = 10  # steps; TensorBoard
    config.evaluate_every = 100
    config.evaluation_windows = 64  # packed rows
    config.save_every = 100
    config.keep_checkpoints = 2
    return config
