"""The server over the loopback interface, beside `generate_many` with the same slots and requests.

    python -m kangaroo_jax.bench serve
    python -m kangaroo_jax.bench serve --beside=http://127.0.0.1:8001 --beside_model=NAME    another server, in turn

Held-out prompts, answers of different lengths, greedy; EOS ends nothing. Each client sends its next request as soon as
its last answer is complete; there are as many slots as clients, up to --max_batch. Runs are interleaved, and their
medians do not count compilation. "Overhead" is what the server takes more than `generate_many`, per token. Another
server with OpenAI's API, started before with the same model, gets the same prompts and limits; its EOS may end answers.
"""

from __future__ import annotations

import importlib.util
import urllib.parse

from absl import flags

from kangaroo_jax import DraftConfig, compilation_cache
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.batch_speed import ragged_lengths, requests_of
from kangaroo_jax.bench.benchmark_prompts import held_out_functions
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.errors import InputError

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_PLAIN = flags.DEFINE_bool("plain", False, "Decode plainly, without an adapter.")
_CLIENTS = flags.DEFINE_list("clients", ["1", "4", "8", "16"], "Numbers of clients, separated by commas.")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 8, "Most slots.")
_REQUESTS = flags.DEFINE_integer("requests", 64, "Number of requests.")
_SHORTEST = flags.DEFINE_integer("shortest", 16, "New tokens of the shortest answer.")
_LONGEST = flags.DEFINE_integer("longest", 256, "New tokens of the longest.")
_BESIDE = flags.DEFINE_string("beside", None, "Address of another server, such as http://127.0.0.1:8001.")
_BESIDE_MODEL = flags.DEFINE_string("beside_model", "default", "What requests to it name as their model.")
_RUNS = shared_flags.define_runs()
_DTYPE = shared_flags.define_dtype()


def main() -> None:
    clients = shared_flags.counts(_CLIENTS)
    shared_flags.check_positive(_MAX_BATCH, _REQUESTS, _SHORTEST, _RUNS)
    if _LONGEST.value < _SHORTEST.value:
        raise InputError(f"--longest: expected at least --shortest ({_SHORTEST.value}), found {_LONGEST.value}")
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client")):
        raise InputError("the server's packages are not installed; pip install '.[serve]'")
    from kangaroo_jax.bench.serve_speed import Other, measure  # here: only this needs them

    other = None if _BESIDE.value is None else Other(*_address(_BESIDE.value), _BESIDE_MODEL.value)
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, _DTYPE.value)
    adapter = None if _PLAIN.value else load_adapter_of(target, _ADAPTER.value)
    draft = DraftConfig() if adapter is None else adapter.draft
    lengths = ragged_lengths(_REQUESTS.value, _SHORTEST.value, _LONGEST.value)
    requests = requests_of(held_out_functions(_REQUESTS.value), lengths)
    print(machine.describe())
    print(f"{target.name}, {'plain' if adapter is None else draft.at(_MAX_BATCH.value)}, {target.model.dtype}, greedy")
    print(f"{len(requests)} requests, answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} together)\n")
    print(
        f"{'clients':>7}{'slots':>7}{'tokens/s':>10}{'many':>10}{'ratio':>8}{'overhead, ms':>14}"
        f"{'first, ms':>11}{'95 %, ms':>10}{'identical':>12}"
        + ("" if other is None else f"{'beside':>10}{'first, ms':>11}{'identical':>11}")
    )
    for count in clients:
        row = measure(target, adapter, draft, requests, count, _MAX_BATCH.value, _RUNS.value, other)
        print(
            f"{row.clients:7}{row.slots:7}{row.tokens / row.seconds:10.1f}{row.tokens / row.many_seconds:10.1f}"
            f"{row.many_seconds / row.seconds:8.3f}{1000 * row.overhead:14.3f}{1000 * row.first_seconds:11.1f}"
            f"{1000 * row.first_seconds_95:10.1f}{f'{row.identical} of {row.answers}':>12}",
            end="",
        )
        if row.other is not None:
            beside = row.other
            print(f"{beside.tokens_per_second:10.1f}{1000 * beside.first_seconds:11.1f}{beside.identical:11}", end="")
        print(flush=True)


def _address(url: str) -> tuple[str, int]:
    """Host and port."""
    try:
        found = urllib.parse.urlsplit(url)
        if found.scheme == "http" and found.hostname and found.port and not found.path.strip("/"):
            return found.hostname, found.port
    except ValueError:
        pass
    raise InputError(f"--beside: expected an address such as http://127.0.0.1:8001, found {url!r}")
