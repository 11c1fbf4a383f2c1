"""The paper's recipe for a 7B model of the Llama family (Llama-2-7B, or another by --config.target): arXiv 2404.18911,
section 4.

    python train.py --config=configs/llama7b.py --config.data.files='data/*.jsonl'

Learning rate, warm-up, clipping, sequence length and exit layer are those of the authors' code; they trained for ten
epochs of ShareGPT, about 24 hours on 8 V100.

Hardware: sized for a v5e slice of 4x4 (16 chips of 16 GiB), weights and batch split 16 ways. Expected memory, per
device and as compiled by `--preflight=v5e:4x4`: 2.3 GiB at most, of which 0.8 GiB are weights and optimizer. One device
of 24 GiB or more does with --config.batch_size=8: 15.7 GiB. Measured: these figures of the compiler
(docs/preflight.md). Not measured: the step's time, how long a run takes, and the acceptance to expect; it has not been
run at this size.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.target = "meta-llama/Llama-2-7b-hf"  # a folder in Hugging Face format, or a hub id
    config.dtype = "bfloat16"
    config.exit_layer = 2
    config.teacher = "online"  # or cached: the target's last hidden states are computed once and kept on disk
    config.output = "runs/llama7b"
    config.seed = 0

    config.steps = 100_000
    config.batch_size = 16
    config.sequence_length = 2048
    config.loss_chunk = 128  # positions of each sequence whose logits exist at once
    config.loss = "cross_entropy"  # as the authors; or total_variation, or both: see docs/adapter.md
    config.initialization = "layer"  # attention of the target's layer exit_layer; or zero_output, or random

    config.data = ml_collections.ConfigDict()
    # Conversations (ShareGPT, OpenAI messages) and texts: paths, globs and gs:// paths, separated by commas.
    config.data.files = "data/*.jsonl"
    config.data.evaluation_files = ""  # empty: a share of the records, held out
    config.data.held_out = 0.005
    # Chat template: llama-2, llama-3, vicuna_v1.1, or empty for the tokenizer's own. A base model has none.
    config.data.template = "llama-2"
    config.data.cache = ""  # folder for the token ids; empty: ~/.cache/kangaroo_jax/data. On a cluster, a shared one
    config.data.max_bad_share = 0.01  # more bad records than this share of all are refused, fewer are skipped

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 0.5

    config.mesh = ml_collections.ConfigDict()  # devices along each axis; -1 is the rest
    config.mesh.data = 1  # the batch alone is split
    config.mesh.fsdp = -1  # batch and weights; a weight is gathered where it is used
    config.mesh.model = 1  # each layer's heads and width, and the vocabulary

    config.log_every = 10
    config.evaluate_every = 2000
    config.evaluation_windows = 64  # packed rows
    config.save_every = 2000
    config.keep_checkpoints = 3
    return config
