"""Targets in Hugging Face format: config.json and weights in, `TargetModel` out, and back.

The rule between the two namings is `parameter_rule`: module and parameter names are Hugging Face's, but projections
that read the same input are one matrix here, stored input axis first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from huggingface_hub.errors import HFValidationError
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from kangaroo_jax.checkpoint import fingerprint
from kangaroo_jax.config import ModelConfig, token_ids
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.target import TargetModel

# As safetensors spells them. ml_dtypes gives numpy the bfloat16 that safetensors asks it for.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_HUB_TIMEOUT = 10.0  # seconds


Index = tuple[slice, ...]  # a part of an array: one slice per dimension, with start and stop
Pieces = tuple[Index, ...]  # parts to be joined along their first axis


@dataclasses.dataclass(frozen=True)
class Target:
    """A loaded target.

    Attributes:
      model: the weights.
      tokenizer: a transformers tokenizer, or None if the folder has none.
      name: the folder or hub id it came from.
      fingerprint: identifies the weights whatever dtype they were loaded in; adapters record it.
      eos_token_ids: from generation_config.json where there is one, else config.json.
      mesh: what the weights are split over; None where they are on one device.
      bytes_read: of weights, from files, by this process.
      earlier_fingerprints: what earlier versions of this package recorded for the same weights.
    """

    model: TargetModel
    tokenizer: Any
    name: str
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    mesh: Mesh | None = None
    bytes_read: int = 0
    earlier_fingerprints: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def has_fingerprint(self, recorded: str) -> bool:
        """Whether what recorded this fingerprint was made for this target."""
        return recorded == self.fingerprint or recorded in self.earlier_fingerprints


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """How one of our parameters is made from Hugging Face tensors.

    Attributes:
      names: the tensors, without a leading "model.".
      shapes: their shapes.
      join: tensors -> our array. The rule of a part's shape joins the parts that `locate` names.
      split: our array -> tensors.
      locate: a part of our array -> for each tensor, the pieces (runs of rows) that it is made of.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    locate: Callable[[Index], tuple[Pieces, ...]]


def parameter_rule(path: str, shape: tuple[int, ...]) -> ParameterRule:
    """The rule for our parameter at `path` ("layers.0.self_attn.qkv_proj") of `shape`."""
    parent, _, name = path.rpartition(".")
    if name in ("qkv_proj", "qkv_bias"):
        kind = "weight" if name == "qkv_proj" else "bias"
        *inputs, kv_heads, rows, head_dim = shape
        groups = rows - 2
        counts = (kv_heads * groups, kv_heads, kv_heads)

        def join(*parts: np.ndarray) -> np.ndarray:
            parts = [x.reshape(kv_heads, -1, head_dim, *inputs) for x in parts]
            fused = np.concatenate(parts, axis=1)
            return np.moveaxis(fused, -1, 0) if inputs else fused

        def split(fused: np.ndarray) -> tuple[np.ndarray, ...]:
            fused = np.moveaxis(fused, 0, -1) if inputs else fused
            parts = (fused[:, :groups], fused[:, groups : groups + 1], fused[:, groups + 1 :])
            return tuple(x.reshape(-1, *inputs) for x in parts)

        def locate(index: Index) -> tuple[Pieces, ...]:
            *columns, heads, whole, dims = index
            if (whole.start, whole.stop) != (0, rows):
                raise ValueError(f"{path}: queries, keys and values of a head stay together")

            def runs(count: int) -> Pieces:  # `count` heads of this tensor per key/value head
                if dims.stop - dims.start == head_dim:
                    size = count * head_dim
                    return ((slice(heads.start * size, heads.stop * size), *columns),)
                starts = (head * head_dim for head in range(heads.start * count, heads.stop * count))
                return tuple((slice(start + dims.start, start + dims.stop), *columns) for start in starts)

            return tuple(runs(count) for count in (groups, 1, 1))

        names = tuple(f"{parent}.{letter}_proj.{kind}" for letter in "qkv")
        return ParameterRule(names, tuple((count * head_dim, *inputs) for count in counts), join, split, locate)
    if name in ("gate_up_proj", "gate_up_bias"):
        kind = "weight" if name == "gate_up_proj" else "bias"
        *inputs, _, width = shape
        names = tuple(f"{parent}.{part}_proj.{kind}" for part in ("gate", "up"))
        axis = len(inputs)  # where gate and up sit side by side
        return ParameterRule(
            names,
            ((width, *inputs),) * 2,
            lambda gate, up: np.stack([gate.T, up.T], axis=axis),
            lambda fused: tuple(x.T for x in np.moveaxis(fused, axis, 0)),
            lambda index: (((index[-1], *index[:axis]),),) * 2,
        )
    if name.endswith(("o_proj", "down_proj")):
        return ParameterRule(
            (f"{path}.weight",), (shape[::-1],), lambda x: x.T, lambda x: (x.T,), lambda i: ((i[::-1],),)
        )
    if name.endswith("_bias"):
        same = f"{path.removesuffix('_bias')}_proj.bias"
    else:
        same = path if name == "weight" else f"{path}.weight"
    return ParameterRule((same,), (shape,), lambda x: x, lambda x: (x,), lambda i: ((i,),))


def parameter_paths(module: PyTree) -> list[str]:
    """Dotted names of a module's parameters, in the order of its leaves."""
    paths = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(module))
    return [path.removesuffix(".value") for path in paths]


def fill_module(
    abstract: PyTree,
    read: Callable[[str, Pieces], np.ndarray],
    dtype: jnp.dtype,
    prefix: str = "",
    files: Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
) -> PyTree:
    """Builds a module from tensors read one parameter at a time, each put on the device in `dtype` before the next
    is read.

    Args:
      abstract: the module from `nnx.eval_shape`.
      read: tensor name and pieces of it -> those, joined.
      dtype: of the weights on the device.
      prefix: of the tensor names.
      files: tensor name -> file, for messages.
      mesh: to split the weights over; only the parts of this process's devices are then read.

    Raises:
      InputError: if a value is beyond the range of `dtype`.
    """

    def cast(name: str, pieces: Pieces) -> np.ndarray:
        tensor = read(name, pieces)
        if tensor.dtype == dtype:
            return tensor
        with np.errstate(over="ignore"):
            converted = tensor.astype(dtype)
        # float16 alone has a smaller range than the others: an overflow would decode nonsense without a word.
        if dtype == np.float16 and np.isinf(converted).any():
            raise InputError(
                f"{(files or {}).get(name, 'checkpoint')}: tensor {name} has values beyond float16; "
                f"expected at most {np.finfo(np.float16).max}, "
                f"found {np.abs(tensor.astype(np.float32)).max():.6g}; load in bfloat16 or float32"
            )
        return converted

    def part(path: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
        index = tuple(slice(*x.indices(size)[:2]) for x, size in zip(index, shape, strict=True))
        rule = parameter_rule(path, shape)
        pieces = zip(rule.names, rule.locate(index), strict=True)
        of_part = parameter_rule(path, tuple(x.stop - x.start for x in index))
        return of_part.join(*(cast(_full_name(name, prefix), where) for name, where in pieces))

    leaves, structure = jax.tree.flatten(abstract)
    for i, path in enumerate(parameter_paths(abstract)):
        shape = leaves[i].shape
        if mesh is None:
            array = jnp.asarray(part(path, shape, (slice(None),) * len(shape)), dtype)
        else:
            # Devices that hold the same part share one reading of it.
            parts = functools.cache(lambda *bounds, path=path, shape=shape: part(path, shape, _slices(bounds)))
            array = jax.make_array_from_callback(
                shape,
                NamedSharding(mesh, sharding.partition(path, shape, mesh)),
                lambda index, parts=parts: parts(*((x.start, x.stop) for x in index)),
            )
        leaves[i] = jax.block_until_ready(sharding.arranged(path, array))
    return jax.tree.unflatten(structure, leaves)


def join_pieces(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _slices(bounds: Iterable[tuple[int | None, int | None]]) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)


def _full_name(name: str, prefix: str) -> str:
    return name if name.startswith("lm_head") else prefix + name


def check_tensors(
    abstract: PyTree, found: Mapping[str, tuple[tuple[int, ...], str]], files: Mapping[str, str], prefix: str = ""
) -> None:
    """Compares a checkpoint's tensors with what a module needs, before anything is read.

    Args:
      abstract: the module.
      found: tensor name -> (shape, dtype name as safetensors spells it).
      files: tensor name -> file, for messages.
      prefix: of the tensor names.

    Raises:
      InputError: one line naming file, tensor, expected and found.
    """
    where = ", ".join(sorted(set(files.values()))[:3]) or "checkpoint"
    expected = {}
    for path, leaf in zip(parameter_paths(abstract), jax.tree.leaves(abstract), strict=True):
        rule = parameter_rule(path, leaf.shape)
        expected |= {_full_name(n, prefix): shape for n, shape in zip(rule.names, rule.shapes, strict=True)}
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{where}: tensor {name} is missing; expected shape {list(shape)}, found nothing")
        if tuple(found[name][0]) != tuple(shape):
            raise InputError(
                f"{files[name]}: tensor {name} has the wrong shape; "
                f"expected {list(shape)}, found {list(found[name][0])}"
            )
        if found[name][1] not in _DTYPES:
            raise InputError(
                f"{files[name]}: tensor {name} has an unsupported dtype; expected {', '.join(_DTYPES)}, "
                f"found {found[name][1]}"
            )
    # Old checkpoints store the rotary frequencies, which follow from the config; tied ones may repeat the head.
    ignored = re.compile(r"\.rotary_emb\.inv_freq$|^lm_head\.weight$")
    surplus = [name for name in found if name not in expected and not ignored.search(name)]
    if surplus:
        name = sorted(surplus)[0]
        raise InputError(
            f"{files[name]}: tensor {name} is surplus ({len(surplus)} in all); expected nothing of that name, "
            f"found shape {list(found[name][0])}"
        )


def load_target(name: str | os.PathLike[str], dtype: str | jnp.dtype = "bfloat16", mesh: Mesh | None = None) -> Target:
    """Loads a target from a local folder or a Hugging Face hub id.

    Args:
      name: a folder with config.json and weights (*.safetensors, or pytorch_model*.bin where torch is installed),
        or a hub id.
      dtype: of the weights on the device: float32, bfloat16 or float16. One parameter at a time is on the host.
      mesh: splits the weights over its devices (model/sharding.py says how). Each process reads only the parts of
        its own devices, from safetensors; None keeps all on the default device.

    Raises:
      InputError: for a missing or corrupt file, an unknown architecture, or tensors that do not fit the config.
    """
    name = os.fspath(name)
    dtype = _weights_dtype(dtype)
    folder = _local_folder(name)
    config_file = folder / "config.json"
    raw = read_json(config_file, "a folder in Hugging Face format has one")
    config = ModelConfig.from_hf(raw, str(config_file))
    eos = _eos_token_ids(folder, config)
    abstract = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0), dtype=dtype))
    weights = _weights(folder)
    check_tensors(abstract, weights.found, weights.files, prefix="model.")
    bytes_read = 0

    def read(tensor_name: str, pieces: Pieces) -> np.ndarray:
        nonlocal bytes_read
        tensor = weights.read(tensor_name, pieces)
        bytes_read += tensor.nbytes
        return tensor

    samples = {}
    for path, leaf in zip(parameter_paths(abstract), jax.tree.leaves(abstract), strict=True):
        for tensor_name in parameter_rule(path, leaf.shape).names:
            full = _full_name(tensor_name, "model.")
            rows = read(full, (fingerprint.sample_index(weights.found[full][0]),))
            samples[tensor_name] = fingerprint.sample(rows)
    current, *earlier = fingerprint.fingerprints(config, samples)
    model = fill_module(abstract, read, dtype, prefix="model.", files=weights.files, mesh=mesh)
    return Target(
        model=model,
        tokenizer=_tokenizer(folder, config),
        name=name,
        fingerprint=current,
        eos_token_ids=eos,
        mesh=mesh,
        bytes_read=bytes_read,
        earlier_fingerprints=tuple(earlier),
    )


def _weights_dtype(dtype: str | jnp.dtype) -> jnp.dtype:
    supported = [np.dtype(x) for x in _DTYPES.values()]
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in supported:
        raise InputError(f"dtype must be one of {', '.join(x.name for x in supported)}, found {dtype!r}")
    return found


def _eos_token_ids(folder: pathlib.Path, config: ModelConfig) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    if not file.exists():
        return config.eos_token_ids
    try:
        return token_ids(read_json(file, "remove it if it is not needed"), "eos_token_id") or config.eos_token_ids
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def save_target(model: TargetModel, folder: str | pathlib.Path, dtype: jnp.dtype) -> None:
    """Writes `config.json` and `model.safetensors` (in `dtype`) that transformers and `load_target` read."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, leaf in zip(parameter_paths(model), jax.tree.leaves(model), strict=True):
        rule = parameter_rule(path, leaf.shape)
        for name, part in zip(rule.names, rule.split(np.asarray(leaf)), strict=True):
            tensors[_full_name(name, "model.")] = np.ascontiguousarray(part.astype(dtype))
    temporary = folder / "model.safetensors.tmp"
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config_to_hf(model.config, jnp.dtype(dtype).name), indent=2) + "\n")


def read_json(path: pathlib.Path, mend: str) -> dict[str, Any]:
    """A JSON object from a file, or `InputError` naming the file and `mend`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {mend}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of thousands of digits
        raise InputError(f"{path}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _one_line(error: BaseException) -> str:
    """The first line of what a library said, or its exception's name where it said nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _local_folder(name: str) -> pathlib.Path:
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name}: expected a folder in Hugging Face format, found a file")
    # Not *.safetensors: some repositories hold the same weights a second time under another name.
    patterns = ["*.json", "*.jinja", "merges.txt", "tokenizer.model", "model*.safetensors"]
    try:
        files = [file.rfilename for file in huggingface_hub.model_info(name, timeout=_HUB_TIMEOUT).siblings or ()]
        if not any(file.startswith("model") and file.endswith(".safetensors") for file in files):
            patterns.append("pytorch_model*.bin")
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(
            f"{name}: no such folder, and not a Hugging Face hub id; give the folder of a checkpoint"
        ) from None
    except Exception as hub_error:  # the hub's errors and those of the HTTP library under it share no base class
        try:  # offline: what an earlier run downloaded
            patterns.append("pytorch_model*.bin")
            return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except Exception:
            reason = f"{type(hub_error).__name__}: {_one_line(hub_error)}"
            raise InputError(
                f"{name}: no such folder, and it could not be had from the Hugging Face hub ({reason}); "
                "check the name, or download it elsewhere and give its folder"
            ) from None


@dataclasses.dataclass(frozen=True)
class _Weights:
    """A checkpoint's tensors: what there is, where, and how to read a part of one."""

    found: dict[str, tuple[tuple[int, ...], str]]
    files: dict[str, str]
    read: Callable[[str, Pieces], np.ndarray]


def _weights(folder: pathlib.Path) -> _Weights:
    # In transformers' order of preference.
    for single, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_torch)):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return _read_headers([folder / single], opener)
        if index.exists():
            weight_map = _weight_map(index)
            weights = _read_headers([folder / shard for shard in sorted(set(weight_map.values()))], opener)
            for name, shard in weight_map.items():
                found = weights.files.get(name)
                if found != str(folder / shard):
                    raise InputError(
                        f"{folder / shard}: tensor {name} is missing; expected there by {index.name}, "
                        f"found {f'in {pathlib.Path(found).name}' if found else 'nowhere'}"
                    )
            return weights
    raise InputError(
        f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or either's .index.json and shards"
    )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded checkpoint; every file is there."""
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected an object under 'weight_map', found {weight_map!r}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise InputError(f"{index}: tensor {name}: expected the name of a file beside the index, found {shard!r}")
        if not (index.parent / shard).is_file():
            raise InputError(
                f"{index.parent / shard}: no such file; expected by {index.name} for tensor {name}; "
                "fetch the checkpoint again"
            )
    return weight_map


def _read_headers(shards: list[pathlib.Path], opener: Callable[..., Any]) -> _Weights:
    found, files = {}, {}
    for shard in shards:
        with opener(shard) as tensors:
            for name in tensors.names():
                if name in files:
                    raise InputError(f"{shard}: tensor {name}: expected in one file, found in {files[name]} too")
                found[name], files[name] = tensors.describe(name), str(shard)

    def read(name: str, pieces: Pieces) -> np.ndarray:
        # Opened anew each time, so that the pages of a mapped file do not stay in memory.
        with opener(pathlib.Path(files[name])) as tensors:
            return join_pieces([tensors.read(name, piece) for piece in pieces])

    return _Weights(found, files, read)


@dataclasses.dataclass(frozen=True)
class _TensorFile:
    names: Callable[[], list[str]]
    describe: Callable[[str], tuple[tuple[int, ...], str]]
    read: Callable[[str, Index], np.ndarray]


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[_TensorFile]:
    try:
        with safetensors.safe_open(path, framework="np") as file:

            def describe(name: str) -> tuple[tuple[int, ...], str]:
                part = file.get_slice(name)
                return tuple(part.get_shape()), part.get_dtype()

            yield _TensorFile(lambda: list(file.keys()), describe, lambda name, index: file.get_slice(name)[index])
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({_one_line(error)}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from None


@contextlib.contextmanager
def _open_torch(path: pathlib.Path) -> Iterator[_TensorFile]:
    tensors = load_torch(path)
    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    yield _TensorFile(
        lambda: list(tensors),
        lambda name: (tuple(tensors[name].shape), names.get(str(tensors[name].dtype), str(tensors[name].dtype))),
        lambda name, index: torch_to_numpy(tensors[name][index]),
    )


def load_torch(path: pathlib.Path) -> dict[str, Any]:
    """A PyTorch state dict, memory-mapped, with weights_only=True; torch is needed for this alone.

    Raises:
      InputError: where torch is not installed, or the file is not a state dict.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path}: reading PyTorch weights needs torch; pip install torch, or convert the checkpoint to safetensors"
        )
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        if path.is_file() and path.stat().st_size and not zipfile.is_zipfile(path):
            reason = "not the zip format of torch 1.6 and later"
        else:
            reason = _one_line(error)
        raise InputError(f"{path}: truncated or not a PyTorch state dict ({reason}); fetch it again") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: expected a PyTorch state dict, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: entry {name!r}: expected a tensor of a PyTorch state dict, found {type(tensor).__name__}"
            )
    return tensors


def torch_to_numpy(tensor: Any) -> np.ndarray:
    """A copy of a torch tensor (numpy has no bfloat16 of its own, so those go through their bits)."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.contiguous().numpy().copy()


def _tokenizer(folder: pathlib.Path, config: ModelConfig) -> Any:
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    # transformers would say at import that torch is missing, which its tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # seconds to import, and not needed for token ids

    try:
        # Said, not left out: transformers would ask on the terminal whether to run code that lies in the folder.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "custom code" not in str(error):
            raise InputError(f"{folder}: the tokenizer could not be read ({_one_line(error)})") from None
        raise InputError(
            f"{folder}: the tokenizer comes with code of its own, which is never run; save the tokenizer as "
            "tokenizer.json (a fast tokenizer), and remove auto_map from tokenizer_config.json"
        ) from None
    except Exception as error:  # transformers raises bare exceptions of many kinds here
        raise InputError(f"{folder}: the tokenizer could not be read ({_one_line(error)})") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has token id {largest}, but the model's vocabulary ends at "
            f"{config.vocab_size - 1}; use the tokenizer the weights were trained with"
        )
    return tokenizer


def _config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope = None
    if scaling is not None:
        fields = dataclasses.asdict(scaling)
        kind = fields.pop("kind")
        rope = {"rope_type": kind} | (fields if kind == "llama3" else {"factor": scaling.factor})
    architecture = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    eos = config.eos_token_ids
    hf = {
        "architectures": [architecture[config.model_type]],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "rope_scaling": rope,
        "torch_dtype": dtype,
    }
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
    ):
        hf[name] = getattr(config, name)
    if config.model_type == "llama":
        hf |= {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    if config.model_type == "mistral":
        hf["sliding_window"] = None
    return hf
