"""Serves a model through OpenAI's API, with a page at / that shows the drafts.

python -m kangaroo_jax.serve                                    the demo, on http://127.0.0.1:8000
python -m kangaroo_jax.serve --model=smollm2-135m --plain       without an adapter
python -m kangaroo_jax.serve --model=FOLDER_OR_HUB_ID --adapter=FOLDER --max_batch=8 --max_length=4096
python -m kangaroo_jax.serve --host=0.0.0.0 --api_key_file=FILE for other machines
"""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import json
import pathlib
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from kangaroo_jax import paths
from kangaroo_jax.cli import command_line
from kangaroo_jax.config import DraftConfig, EngineConfig, ServeConfig
from kangaroo_jax.errors import InputError

if TYPE_CHECKING:
    from kangaroo_jax.checkpoint.adapter import TrainedAdapter
    from kangaroo_jax.checkpoint.target import Target

_MODEL = flags.DEFINE_string(
    "model", None, "Target: a folder in Hugging Face format, a GGUF file or a hub id. Default: the demo."
)
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "Adapter: a folder that train.py wrote. Default: the one that comes with the package for --model."
)
_PLAIN = flags.DEFINE_bool("plain", False, "Decode plainly, without an adapter.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Type of the weights. Default: float32 for the demo and on CPU, else bfloat16.",
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    "float",
    ["float", "int8"],
    "int8: matrices are rounded when they are loaded; --dtype is that of the rest, and of what is computed.",
)
_LONG_CONTEXT = flags.DEFINE_bool(
    "long_context",
    False,
    "For a model with longrope (Phi): texts beyond the context that it was first trained on. Its long factors then "
    "turn all texts.",
)
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices that hold the target together, each layer split.")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 8, "Sequences that are decoded at a time.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 4096, "Maximum number of tokens of a prompt and its answer; the model's context if that is less."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is reached by other machines.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.")
_API_KEY_FILE = flags.DEFINE_string("api_key_file", None, "File of API keys, one per line; a request needs one.")
_ALLOW_ORIGIN = flags.DEFINE_multi_string(
    "allow_origin",
    [],
    "Site whose pages may use the server, or that stands in front of it, like https://chat.example.org; may be given "
    "several times; * allows all.",
)
_QUEUE_SIZE = flags.DEFINE_integer(
    "queue_size", ServeConfig().queue_size, "Sequences that may wait for a place in the batch; more are refused."
)
_DEADLINE = flags.DEFINE_float("deadline", ServeConfig().deadline, "Seconds that a request may take.")
_GRACE = flags.DEFINE_float(
    "grace", ServeConfig().grace, "Seconds that running requests have to end after SIGTERM or Ctrl-C."
)
_DEMO_NAME = "kangaroo-demo"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command = "serve" if argv is None and command_line.name() == "__main__.py" else command_line.name(argv)
    command_line.run(command, _serve, argv, interrupted="stopped", usage=__doc__)


def _serve() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client")):
        message = "the server's packages are not installed; install the project with its extra: pip install '.[serve]'"
        raise InputError(message)
    config, engine = _config(), EngineConfig(_MAX_BATCH.value, _MAX_LENGTH.value)
    if _PLAIN.value and _ADAPTER.value is not None:
        raise InputError("--adapter and --plain do not go together; give one")

    from kangaroo_jax.serve import run

    # The socket first: that it cannot be had is known before a model is loaded.
    with run.listen(_HOST.value, _PORT.value) as socket:
        from kangaroo_jax.serve.app import Server

        # While loading, it ends at once. Later uvicorn ends in order at SIGTERM, and then hands it on to this.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        target, adapter, draft = _load()
        server = Server(target, adapter, engine, draft, config, _log, _report)
        host, port = socket.getsockname()[:2]
        print(f"{target.title} on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
        run.uvicorn_server(server.app, config.grace).run(sockets=[socket])


def _config() -> ServeConfig:
    keys = () if _API_KEY_FILE.value is None else _read_keys(_API_KEY_FILE.value)
    hosts = (*_LOOPBACK, _HOST.value) if _is_loopback(_HOST.value) else ()
    return ServeConfig(_QUEUE_SIZE.value, _DEADLINE.value, _GRACE.value, keys, hosts, tuple(_ALLOW_ORIGIN.value))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_keys(path: str) -> tuple[str, ...]:
    paths.check_not_named_pipe(path, f"--api_key_file={path}")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"--api_key_file={path}: {reason}; give a file with a key per line") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise InputError(f"--api_key_file={path}: has no key; give a file with a key per line")
    return keys


def _load() -> tuple[Target, TrainedAdapter | None, DraftConfig]:
    """Target, adapter and how to draft. The target's name is what clients may know: no folder of this machine."""
    import jax

    from kangaroo_jax import compilation_cache
    from kangaroo_jax.cli.models import draft_of, load_adapter_of, load_target_of
    from kangaroo_jax.model import sharding

    compilation_cache.enable()
    mesh = None
    if _MODEL_PARALLEL.value != 1:
        mesh = sharding.decoding_mesh(_MODEL_PARALLEL.value, jax.local_devices(), 1)
    target = load_target_of(_MODEL.value, _DTYPE.value, mesh, _WEIGHTS.value, _LONG_CONTEXT.value)
    adapter = None if _PLAIN.value else load_adapter_of(target, _ADAPTER.value)
    draft = DraftConfig()
    if adapter is not None:
        draft = draft_of(adapter.draft, _MAX_BATCH.value, _WEIGHTS.value, _MODEL.value, _ADAPTER.value)
    name = _DEMO_NAME
    if _MODEL.value is not None:
        folder = paths.expanded(_MODEL.value)
        name = folder.resolve().name if folder.exists() else _MODEL.value
    return dataclasses.replace(target, name=name), adapter, draft


def _report(failure: str) -> None:
    print(failure, file=sys.stderr, flush=True)


def _log(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
