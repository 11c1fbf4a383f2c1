"""Trains an adapter for the small target that ships with the project, on the Python standard library.

    python train.py --config=configs/demo.py

Hardware: any CPU. Measured on 2 cores of an Intel Xeon with the paper's adapter (--config.adapter.kind=kangaroo): 15
minutes for the 800 steps; held-out expected acceptance from 0.310 before the first step to 0.528, top-1 agreement from
0.227 to 0.441. The adapter that ships was trained with other settings: see kangaroo_jax/demo/README.md.

TrainConfig in kangaroo_jax/config.py describes every setting; here is what differs from its defaults.
"""

import ml_collections

from kangaroo_jax import demo
from kangaroo_jax.train.settings import config_dict


def get_config() -> ml_collections.ConfigDict:
    return config_dict(
        target=str(demo.MODEL),
        output="runs/demo",
        data={"files": "python:kangaroo_jax.demo.corpus.standard_library", "held_out": 0.02},
        dtype="float32",
        steps=800,
        sequence_length=256,
        loss_chunk=64,
        loss="total_variation",  # accepted more than cross_entropy (docs/dev/adapter-ablations.md)
        optimizer={"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine"},
        evaluate_every=100,
        save_every=100,
        keep_checkpoints=2,
    )
