"""Which of several machines decoding fits, by prompt and batch, and how fast it would be there; none need be attached.

    python -m kangaroo_jax.bench fit --model=llama7b --machines=v5e:1x1,v5e:2x2,v5e:2x4
    python -m kangaroo_jax.bench fit --model=llama3_8b --machines=h100,h100:2 --prompt_tokens=8000 --batch_sizes=1,8

A line for each batch size and length of prompts, of the first of the machines that has room: memory of a device; the
predicted time of a plain step, and how much of it is reading weights, reading caches, and starting kernels; whether
reading or multiplying bounds verification; what a round costs in plain steps, by the machine's limits and by the
compiler's cycles; and the speed-up over plain decoding at each of --accept_lengths, from all drafts always made to
drafting that ends at the first token that the target rejects. Each is a preflight (docs/preflight.md), and takes as
long.
"""

from __future__ import annotations

import itertools

from absl import flags

from kangaroo_jax.bench.fitting import Decoding, first_that_fits
from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.errors import InputError
from kangaroo_jax.preflight import machines
from kangaroo_jax.preflight.report import Report

_MODEL = flags.DEFINE_string("model", None, "Target, of whose weights nothing is read: as for decode.py --preflight.")
_MACHINES = flags.DEFINE_list("machines", None, "Machines, in the order to try, by the names of decode.py --preflight.")
_PROMPT_TOKENS = flags.DEFINE_list("prompt_tokens", ["1900"], "Tokens of each prompt.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Sequences decoded together.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Of each answer.")
_DTYPE = shared_flags.define_dtype(("float32", "bfloat16", "float16"), "bfloat16")
_WEIGHTS = shared_flags.define_weights()
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", 2, "Shallow layers.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", 6, "gamma.")
_ACCEPT_LENGTHS = flags.DEFINE_list("accept_lengths", ["2", "3"], "Mean accept lengths to give the speed-up of.")


def main() -> None:
    shared_flags.check_positive(_MAX_NEW_TOKENS, _EXIT_LAYER, _MAX_DRAFT_LEN)
    batches, prompts = shared_flags.counts(_BATCH_SIZES), shared_flags.counts(_PROMPT_TOKENS)
    lengths = shared_flags.numbers(_ACCEPT_LENGTHS)
    if not all(1 <= length <= _MAX_DRAFT_LEN.value + 1 for length in lengths):
        raise InputError(f"--accept_lengths: expected 1 to {_MAX_DRAFT_LEN.value + 1}, gamma and one more")
    if not _MODEL.value or not _MACHINES.value:
        raise InputError("expected --model and --machines, such as --model=llama7b --machines=v5e:1x1,v5e:2x2")
    if machines.LOCAL in _MACHINES.value:
        raise InputError("--machines: what this machine is like is not known beforehand; see bench roofline")
    room = model_config(_MODEL.value).context - _MAX_NEW_TOKENS.value
    if max(prompts) > room:  # named before any of the others is compiled
        raise InputError(
            f"--prompt_tokens: {max(prompts)} and {_MAX_NEW_TOKENS.value} new tokens are more than the target's "
            f"context; give at most {room}"
        )
    found = [machines.find_machine(name) for name in _MACHINES.value]
    draft = DraftConfig(_EXIT_LAYER.value, _MAX_DRAFT_LEN.value)
    work = Decoding(_MODEL.value, _DTYPE.value, _WEIGHTS.value, draft, _MAX_NEW_TOKENS.value)
    print(
        f"{_MODEL.value}, {_DTYPE.value}, exit layer {_EXIT_LAYER.value}, gamma {_MAX_DRAFT_LEN.value}, "
        f"{_MAX_NEW_TOKENS.value} new tokens; predicted, not measured (docs/preflight.md has the model)"
    )
    print(
        f"{'batch':>5}{'prompt':>8}  {'machine':10}{'GiB':>7}{'of':>5}{'plain ms':>10}{'weights':>9}{'caches':>8}"
        f"{'kernels':>9}  {'verified by':12}{'round':>6}{'by cycles':>11}"
        + "".join(f"{f'at {length:g}':>15}" for length in lengths)
    )
    for prompt_tokens, batch in itertools.product(prompts, batches):
        report, failures = first_that_fits(work, found, batch, prompt_tokens)
        rows = failures if report is None else [*failures, _row(report, lengths)]
        for row in rows or ["does not fit"]:
            print(f"{batch:5}{prompt_tokens:8}  {row}", flush=True)


def _row(report: Report, lengths: list[float]) -> str:
    prediction, machine = report.prediction, report.machine
    limits, plain = prediction.limits, prediction.parts[0]
    gamma = prediction.max_draft_len
    reading = limits.share * limits.bandwidth
    spent = (plain.num_bytes - prediction.cached) / reading, prediction.cached / reading, plain.kernels * limits.launch
    weights, caches, kernels = (seconds / plain.seconds for seconds in spent)
    verification = next(part for part in prediction.parts if part.name == f"verification of {gamma + 1}")
    multiplies = verification.operations / limits.products[prediction.dtype] > verification.num_bytes / reading
    row = f"{machine.name:10}{report.peak / 2**30:7.2f}{machine.memory / 2**30:5.0f}{plain.seconds * 1e3:10.2f}"
    row += f"{weights:9.0%}{caches:8.0%}{kernels:9.0%}  {'multiplying' if multiplies else 'reading':12}"
    row += f"{prediction.times.round_cost(gamma):6.2f}"
    row += f"{'' if prediction.cycles is None else format(prediction.cycles.round_cost(gamma), '.2f'):>11}"
    for length in lengths:
        always, fewest = (length / prediction.times.round_cost(count) for count in (gamma, min(length, gamma)))
        row += f"{f'{always:.2f} to {fewest:.2f}':>15}"
    return row
