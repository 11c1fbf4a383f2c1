"""The text of Gemma-3-12B-it: llama7b.py with that target. The paper has no figures for it; exit layer 3 is that of its
13B.

The hub's checkpoint has a vision tower, which is refused. Save its text alone, once (56 GB of host memory):

    import transformers as t
    both = t.Gemma3ForConditionalGeneration.from_pretrained("google/gemma-3-12b-it", dtype="bfloat16")
    text = t.Gemma3ForCausalLM(both.config.text_config)
    text.model, text.lm_head = both.model.language_model, both.lm_head
    text.generation_config = both.generation_config  # which says what ends a turn
    text.save_pretrained("gemma-3-12b-it-text")
    t.AutoTokenizer.from_pretrained("google/gemma-3-12b-it").save_pretrained("gemma-3-12b-it-text")

    python train.py --config=configs/gemma3_12b.py --config.data.files='data/*.jsonl'

Hardware: sized for a v5e slice of 4x4 (16 chips of 16 GiB), weights and batch split 16 ways. Expected memory, per
device and as compiled by `--config.target=gemma3_12b --preflight=v5e:4x4`, which needs no weights: 6.9 GiB at most, of
which 1.5 GiB are weights and optimizer. Measured: these figures of the compiler (docs/preflight.md). Not measured:
time, and the acceptance to expect; it has not been run at this size.
"""

import ml_collections

from configs import llama7b


def get_config() -> ml_collections.ConfigDict:
    config = llama7b.get_config()
    config.target = "./gemma-3-12b-it-text"
    config.exit_layer = 3
    config.data.template = ""  # the tokenizer's own
    config.output = "runs/gemma3_12b"
    config.loss_chunk = 32  # its vocabulary is eight times as large
    return config
