"""Adapter checkpoints (Orbax): written by training or `save_adapter`, read by `load_adapter`.

A checkpoint is a folder with the items `adapter` (dotted parameter path -> array) and `metadata` (JSON). Each step of
a training run is such a folder with more items beside them, `optimizer`, `position` and `metrics`, which loading an
adapter never touches. The target's weights are in none of them: of a draft vocabulary, the token ids alone are stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from kangaroo_jax import buckets, json_text, paths
from kangaroo_jax.checkpoint import fingerprint
from kangaroo_jax.checkpoint.target import Target, titled
from kangaroo_jax.checkpoint.upstream import is_upstream, load_upstream
from kangaroo_jax.checks import is_integer
from kangaroo_jax.config import AdapterConfig, DecideConfig, DraftConfig, LookupConfig, RoundCosts, TreeConfig
from kangaroo_jax.errors import InputError, MachineError, one_line
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.model.drafts.kinds import KINDS, abstract_adapter
from kangaroo_jax.model.naming import parameter_paths

# Among the parameters of an adapter that was trained with a draft vocabulary: the tokens that its drafts are made of.
TOKEN_IDS = "draft_vocabulary.token_ids"
# Beside an adapter: how to draft with it, and a draft vocabulary in place of the one it was trained with.
DRAFT_SETTINGS = "decode.json"
_LOOKUP_SETTINGS = ("lookup_tokens", "lookup_min_ngram", "lookup_max_ngram")
_COSTS = ("costs", "acceptance", "machine")
DRAFT_VOCABULARY = "draft_vocabulary.npy"
# In a bucket, the object of a checkpoint that is written last. Orbax calls it so too.
COMMITTED = "commit_success.txt"
_ARRAY_ITEMS = ("adapter", "optimizer")
# The held-out figure by which one step of a run is better than another.
BEST_BY = "expected_acceptance"
_FORMAT = "kangaroo_jax adapter"
_VERSION = 1


class DamagedError(InputError):
    """What was written is not what is read."""


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """A loaded adapter.

    Attributes:
      model: the weights, in the target's dtype, with the draft vocabulary that lies beside them, or else the one that
        they were trained with.
      exit_layer: number of shallow layers it was trained for; None where the checkpoint does not say (the authors').
      name: the folder it came from.
      target_fingerprint: of the target it was loaded for; None where the checkpoint does not say what it was trained
        for.
      other_target: the name of the target it was trained for, where that has the same shapes and other weights (a
        fine-tune, or the same one in float weights, or in int8). Fewer of its drafts may be accepted.
      draft: how to draft with it: what its decode.json says, else the paper's settings.
    """

    model: Adapter
    exit_layer: int | None
    name: str
    target_fingerprint: str | None
    other_target: str | None = None
    draft: DraftConfig = DraftConfig()  # noqa: RUF009 - frozen


def named_leaves(tree: PyTree) -> dict[str, Array]:
    """Dotted path -> leaf, in the order of the leaves: what an array item of a checkpoint holds."""
    return dict(zip(parameter_paths(tree), jax.tree.leaves(tree), strict=True))


def adapter_from_parameters(config: ModelConfig, parameters: dict[str, Array], kind: str = Adapter.kind) -> Adapter:
    """The draft model whose parameters are `parameters` (the inverse of `named_leaves`), whatever their dtype."""
    shape = _adapter_shape({path: x.shape for path, x in parameters.items()}, kind)
    abstract = abstract_adapter(config, jnp.float32, shape)
    return jax.tree.unflatten(jax.tree.structure(abstract), [parameters[path] for path in parameter_paths(abstract)])


def _adapter_shape(shapes: Mapping[str, Sequence[int]], kind: str) -> AdapterConfig:
    """The settings of an adapter of that kind whose parameters have these shapes."""
    numbers = (path.split(".")[1] for path in shapes if path.startswith("layers."))
    num_layers = max((int(number) + 1 for number in numbers if number.isdecimal()), default=1)
    mlp_size, *_ = shapes.get("mlp.mlp.down_proj") or (0,)
    return AdapterConfig(kind, num_layers, mlp_size)


def drafted_tokens(metadata: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`TOKEN_IDS` and its shape, where the checkpoint with this `metadata` item has it among its parameters."""
    shape = metadata["parameters"].get(TOKEN_IDS)
    return {} if shape is None else {TOKEN_IDS: jax.ShapeDtypeStruct(tuple(shape), jnp.int32)}


def adapter_metadata(
    parameters: dict[str, Array], target: Target, exit_layer: int, training: dict[str, Any] | None, kind: str
) -> dict[str, Any]:
    """The `metadata` item: what is stored, what it belongs to, and how it was trained."""
    return {
        "format": _FORMAT,
        "written_by": _written_by(),
        "version": _VERSION,
        "kind": kind,
        "exit_layer": exit_layer,
        "dtype": parameters["norm.weight"].dtype.name,
        "parameters": {path: list(x.shape) for path, x in parameters.items()},
        "target": {
            "name": target.name,
            "fingerprint": target.fingerprint,
            **fingerprint.constants(target.config),
        },
        "training": training,
    }


def check_exit_layer(exit_layer: int, config: ModelConfig) -> None:
    """Raises `InputError` unless both sub-networks get at least one layer."""
    last = config.num_hidden_layers - 1
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or not 1 <= exit_layer <= last:
        raise InputError(f"exit_layer: expected 1 to {last} (the target has {last + 1} layers), found {exit_layer}")


def save_adapter(
    folder: str | pathlib.Path,
    adapter: Adapter,
    *,
    exit_layer: int,
    target: Target,
    training: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint of the adapter alone, in the dtype of its weights. Appears complete or not at all.

    Args:
      folder: must not exist yet (or be empty). A bucket's appears complete or without `COMMITTED`.
      adapter: the weights.
      exit_layer: number of shallow layers the adapter was trained for.
      target: the target it was trained for; its fingerprint goes into the metadata.
      training: how it was trained, JSON values, for the record.

    Raises:
      InputError: for a folder with something in it, or an exit layer that the target does not have.
    """
    check_exit_layer(exit_layer, target.config)
    if buckets.is_bucket(folder):
        with buckets.Copy(buckets.Bucket(str(folder))) as copy:
            if copy.sizes:
                raise InputError(f"{folder}: exists already; remove it or name another output folder")
            save_adapter(copy.path / "adapter", adapter, exit_layer=exit_layer, target=target, training=training)
            send_folder(copy.path / "adapter", copy.bucket)
        return
    folder = paths.expanded(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; remove it or name another output folder")
    parameters = named_leaves(adapter)
    if adapter.draft_vocabulary is not None:
        del parameters["draft_vocabulary.weight"]  # the target's
    arrays = {path: np.asarray(x) for path, x in parameters.items()}
    metadata = adapter_metadata(parameters, target, exit_layer, training, adapter.kind)
    metadata["checksums"] = {path: checksum(x) for path, x in arrays.items()}
    items = ocp.args.Composite(adapter=ocp.args.PyTreeSave(arrays), metadata=ocp.args.JsonSave(metadata))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
        checkpointer.save(folder, items, force=True)  # force: the folder may exist, empty


def load_adapter(path: str | pathlib.Path, target: Target) -> TrainedAdapter:
    """Loads an adapter for `target`, in the target's dtype.

    Args:
      path: a folder that `save_adapter` wrote, a training run (its best step by held-out expected acceptance), one
        step of a run, or the authors' folder (config.json, and pytorch_model.bin or model.safetensors); each may be in
        a bucket, of which the chosen step alone is fetched.
      target: what the adapter is for.

    Raises:
      InputError: for a path that is missing, not an adapter checkpoint, corrupt, or trained for another target, unless
        that differs in weights alone (`TrainedAdapter.other_target`).
    """
    if buckets.is_bucket(path):
        with _fetched(path) as folder:
            return dataclasses.replace(load_adapter(folder, target), name=str(path))
    folder = paths.expanded(path).resolve()
    if not folder.is_dir():
        what = "expected a folder, found a file" if folder.exists() else "no such adapter checkpoint"
        raise InputError(
            f"{path}: {what}; train one with: python train.py --config=configs/demo.py "
            f"--config.target={target.name} --config.output={path}"
        )
    if is_upstream(folder):
        model = load_upstream(folder, target, target.model.dtype)
        return _with_companions(TrainedAdapter(model, None, str(path), None), folder, target)
    step = folder if (folder / "adapter").is_dir() else best_step(folder)
    if step is None:
        found = ", ".join(sorted(x.name for x in folder.iterdir())[:5]) or "an empty folder"
        raise InputError(
            f"{folder}: not an adapter checkpoint; expected 'adapter' and 'metadata', numbered steps of a run, "
            f"or the authors' config.json and weights (pytorch_model.bin or model.safetensors); found {found}"
        )
    return _with_companions(_load(step, target, str(path)), folder, target)


@contextlib.contextmanager
def _fetched(path: str | os.PathLike[str], arrays: bool = True) -> Iterator[pathlib.Path]:
    """A folder with what loading needs of an adapter in a bucket: of a run, all steps' metadata and the best step."""
    with buckets.Copy(buckets.Bucket(str(path))) as copy, copy.bucket.named(copy.path):
        if not copy.sizes:
            raise InputError(f"{copy.bucket}: no such adapter checkpoint; train one with --config.output={copy.bucket}")
        steps, unfinished = stored_steps(copy.sizes)
        if unfinished and not steps:
            raise InputError(
                f"{copy.bucket}: step {unfinished[-1]} has no {COMMITTED}, as if half-written; copy it again, or "
                "run its training again"
            )
        if steps:
            companions = (DRAFT_SETTINGS, DRAFT_VOCABULARY)
            copy.fetch_all(lambda name: name in companions or (of_step(name) in steps and not has_arrays(name)))
            best = best_step(copy.path)
            copy.fetch_all(
                lambda name: arrays and of_step(name) == int(best.name) and not has_arrays(name, "optimizer")
            )
        else:
            copy.fetch_all(lambda name: not has_arrays(f"0/{name}", *(("optimizer",) if arrays else ())))
        yield copy.path


def stored_steps(names: Iterable[str]) -> tuple[list[int], list[int]]:
    """The steps of a run in a bucket, ascending, given the names of its objects: complete ones, and half-written ones,
    which have no `COMMITTED`."""
    names = set(names)
    steps = sorted({of_step(name) for name in names} - {None})
    complete = [step for step in steps if f"{step}/{COMMITTED}" in names]
    return complete, sorted(set(steps) - set(complete))


def of_step(name: str) -> int | None:
    """The step of a run that an object belongs to; None for another object of the run."""
    step, slash, _ = name.partition("/")
    return int(step) if slash and step.isdecimal() else None


def has_arrays(name: str, *items: str) -> bool:
    """Whether an object of a step belongs to one of these items, by default to any that holds arrays."""
    return name.split("/")[1] in (items or _ARRAY_ITEMS)


def send_folder(folder: pathlib.Path, bucket: buckets.Bucket) -> None:
    """Writes a checkpoint's folder into a bucket, `COMMITTED` last.

    Raises:
      InputError, MachineError: as `Bucket`; the checkpoint is then without `COMMITTED`.
    """
    sizes = {str(x.relative_to(folder)): x.stat().st_size for x in folder.rglob("*") if x.is_file()}
    sizes.pop(COMMITTED, None)
    bucket.send(folder, sizes)
    found = bucket.list()
    for name, size in sizes.items():
        if found.get(name) != size:
            raise MachineError(f"{bucket}/{name}: expected {size} bytes after sending it, found {found.get(name)}")
    bucket.write(COMMITTED, b"")


def _with_companions(adapter: TrainedAdapter, folder: pathlib.Path, target: Target) -> TrainedAdapter:
    """With what other files in the adapter's folder say."""
    token_ids = read_draft_vocabulary(folder, target.config)
    if token_ids is not None:
        adapter.model.draft_vocabulary = DraftVocabulary(target.model, jnp.asarray(token_ids))
    return dataclasses.replace(adapter, draft=read_draft_settings(folder))


def read_draft_settings(folder: pathlib.Path) -> DraftConfig:
    """What decode.json in an adapter's folder says; the paper's settings where there is none.

    Raises:
      InputError: for a file that is not an object of `max_draft_len` and `threshold` and, for a tree, `tree_topk` and
        `tree_budget` or, for look-ups, `lookup_tokens`, `lookup_min_ngram` and `lookup_max_ngram` and, to decide how
        far to draft, `costs`, `acceptance`, `machine` and, where few slots do not, `from_slots`, or values out of
        range.
    """
    path = folder / DRAFT_SETTINGS
    if not path.exists():
        return DraftConfig()
    try:
        settings = json_text.parse(path.read_text(encoding="utf-8"))
        tree = lookup = decide = None
        if settings.keys() & {"tree_topk", "tree_budget"}:
            tree = TreeConfig(settings.pop("tree_topk"), settings.pop("tree_budget"))
        if settings.keys() & set(_LOOKUP_SETTINGS):
            lookup = LookupConfig(*map(settings.pop, _LOOKUP_SETTINGS))
        if tree is not None:
            settings.pop("machine", None)  # for the reader of the file
        if settings.keys() & set(_COSTS):
            decide = _read_costs(*map(settings.pop, _COSTS), settings.pop("from_slots", 1))
        gamma, eta = settings.pop("max_draft_len"), settings.pop("threshold")
        return DraftConfig(None, gamma, eta, tree, lookup, decide, **settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{path}: expected an object with max_draft_len and threshold and, for trees, tree_topk and tree_budget "
            f"or, for look-ups, {', '.join(_LOOKUP_SETTINGS[:2])} and {_LOOKUP_SETTINGS[2]} and, to decide how far to "
            "draft, costs, acceptance and machine; "
            "write it again with `python -m kangaroo_jax.bench tune`, or remove it"
        ) from None


def _read_costs(costs: dict[str, Any], acceptance: float, machine: str, from_slots: int) -> DecideConfig:
    """What decode.json says about deciding how far to draft."""
    by_size = [
        RoundCosts(int(size), verification=tuple((int(n), cost) for n, cost in one.pop("verification").items()), **one)
        for size, one in costs.items()
    ]
    return DecideConfig(tuple(by_size), acceptance, machine, from_slots)


def _written_costs(decide: DecideConfig) -> dict[str, Any]:
    """The inverse of `_read_costs`."""
    costs = {
        str(one.batch_size): {
            "draft_step": one.draft_step,
            "shallow": one.shallow,
            "verification": {str(tokens): cost for tokens, cost in one.verification},
        }
        for one in decide.costs
    }
    written = dict(zip(_COSTS, (costs, decide.acceptance, decide.machine), strict=True))
    return written if decide.from_slots == 1 else written | {"from_slots": decide.from_slots}


def read_draft_vocabulary(folder: pathlib.Path, config: ModelConfig) -> np.ndarray | None:
    """The token ids in draft_vocabulary.npy in an adapter's folder; None where there is none.

    Raises:
      InputError: for a file that is damaged, or ids that are not the target's, each once.
    """
    path = folder / DRAFT_VOCABULARY
    if not path.exists():
        return None
    fix = "write it again with `python -m kangaroo_jax.cli.draft_vocabulary`, or remove it"
    try:
        token_ids = np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # mapped: the size is checked first
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise InputError(f"{path}: not a NumPy array ({one_line(error)}); {fix}") from None
    return _checked_tokens(token_ids, config, str(path), fix)


def _checked_tokens(token_ids: np.ndarray, config: ModelConfig, place: str, fix: str) -> np.ndarray:
    if token_ids.ndim != 1 or not len(token_ids) or not np.issubdtype(token_ids.dtype, np.integer):
        raise InputError(
            f"{place}: expected a list of token ids, found shape {list(token_ids.shape)} of {token_ids.dtype}; {fix}"
        )
    wrong = token_ids[(token_ids < 0) | (token_ids >= config.vocab_size)]
    if len(wrong):
        raise InputError(f"{place}: token id {wrong[0]} is outside the vocabulary of {config.vocab_size}; {fix}")
    if len(np.unique(token_ids)) < len(token_ids):
        raise InputError(f"{place}: a token id is in it twice; {fix}")
    return token_ids.astype(np.int32)


def write_draft_vocabulary(folder: str | pathlib.Path, token_ids: Sequence[int] | np.ndarray) -> pathlib.Path | str:
    """Writes draft_vocabulary.npy into an adapter's folder, whole or not at all; returns its path."""
    content = io.BytesIO()
    np.save(content, np.asarray(token_ids, np.int32))
    return _write_companion(folder, DRAFT_VOCABULARY, content.getvalue())


def write_draft_settings(
    folder: str | pathlib.Path, draft: DraftConfig, machine: str | None = None
) -> pathlib.Path | str:
    """Writes decode.json into an adapter's folder, whole or not at all; returns its path. `machine`: that a tree's
    settings are for; to decide how far to draft, `draft` says it."""
    settings = {"max_draft_len": draft.max_draft_len, "threshold": draft.threshold}
    if draft.tree is not None:
        settings |= {"tree_topk": draft.tree.topk, "tree_budget": draft.tree.budget}
        settings |= {} if machine is None else {"machine": machine}
    if draft.lookup is not None:
        settings |= dict(zip(_LOOKUP_SETTINGS, dataclasses.astuple(draft.lookup), strict=True))
    if draft.decide is not None:
        settings |= _written_costs(draft.decide)
    return _write_companion(folder, DRAFT_SETTINGS, f"{json.dumps(settings)}\n".encode())


def _write_companion(folder: str | pathlib.Path, name: str, content: bytes) -> pathlib.Path | str:
    if buckets.is_bucket(folder):
        bucket = buckets.Bucket(str(folder))
        bucket.write(name, content)
        return f"{bucket}/{name}"
    path = paths.expanded(folder).resolve() / name
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def newest_step(run: pathlib.Path) -> pathlib.Path | None:
    """The newest finished checkpoint of a training run, or None."""
    return max(_steps(run), key=lambda step: int(step.name), default=None)


def best_step(run: pathlib.Path) -> pathlib.Path | None:
    """The finished checkpoint of a training run with the highest held-out expected acceptance, the newest of equals;
    None where there is no checkpoint. One that was saved without being evaluated is the last choice."""

    def rank(step: pathlib.Path) -> tuple[float, int]:
        held_out = (read_metadata(step)["training"] or {}).get("held_out") or {}
        acceptance = held_out.get(BEST_BY, -1.0)
        return (acceptance if math.isfinite(acceptance) else -2.0), int(step.name)

    return max(_steps(run), key=rank, default=None)


def metadata_of(path: str | pathlib.Path) -> dict[str, Any]:
    """`read_metadata` of the adapter that `load_adapter` finds in a folder of this format. Its "training" is how it was
    trained: settings and held-out figures, JSON values; None where that is not recorded.

    Raises:
      InputError: as `read_metadata`.
    """
    if buckets.is_bucket(path):
        with _fetched(path, arrays=False) as folder:
            return metadata_of(folder)
    folder = paths.expanded(path).resolve()
    step = folder if (folder / "adapter").is_dir() else best_step(folder)
    return read_metadata(folder if step is None else step)


def _steps(run: pathlib.Path) -> list[pathlib.Path]:
    if not run.is_dir():
        return []
    # Orbax gives a step its final name when it is complete, so a bare number is a finished checkpoint.
    return [step for step in run.iterdir() if step.name.isdigit() and step.is_dir()]


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """The `metadata` item of a checkpoint.

    Raises:
      InputError: where it is missing, damaged, of another format, or of a kind of draft model that is not known.
    """
    metadata = read_json(folder, "metadata")
    check_format(metadata, folder)
    return metadata


def check_format(metadata: Any, folder: pathlib.Path) -> None:
    """Raises `InputError` for a `metadata` item of another format, or of a kind of draft model that is not known."""
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        found = (
            f"{metadata.get('format')!r} {metadata.get('version')!r}" if isinstance(metadata, dict) else repr(metadata)
        )
        raise InputError(f"{folder}: metadata: expected format {_FORMAT!r} {_VERSION}, found {found}")
    target, parameters = metadata.get("target"), metadata.get("parameters")
    texts = [target.get(key) for key in ("name", "fingerprint")] if isinstance(target, dict) else [None]
    shapes = list(parameters.values()) if isinstance(parameters, dict) else [None]
    complete = {
        "target": all(isinstance(text, str) for text in texts),
        "parameters": all(isinstance(x, list) and all(is_integer(size) for size in x) for x in shapes),
        "exit_layer": is_integer(metadata.get("exit_layer")),
        "training": isinstance(metadata.get("training"), dict | None),
    }
    for name, right in complete.items():
        if not right:
            raise InputError(
                f"{folder}: metadata: {name} is missing or of a wrong type, found {metadata.get(name)!r:.60}; "
                "copy or train the adapter again"
            )
    kind = kind_of(metadata)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"{folder}: metadata: a draft model of kind {kind!r}, written by "
            f"{metadata.get('written_by', 'another version of kangaroo_jax')}, is not supported by {_written_by()}; "
            f"supported: {', '.join(map(repr, KINDS))}; load it with the version that wrote it"
        )


def _written_by() -> str:
    """This package and its version, where it is installed."""
    try:
        return f"kangaroo_jax {importlib.metadata.version('kangaroo_jax')}"
    except importlib.metadata.PackageNotFoundError:
        return "kangaroo_jax"


def kind_of(metadata: dict[str, Any]) -> str:
    """What drafts. Checkpoints from before it was recorded hold the paper's adapter."""
    return metadata.get("kind", Adapter.kind)


def is_for(metadata: dict[str, Any], target: Target) -> bool:
    """Whether a checkpoint's adapter was trained for this very target."""
    return target.has_fingerprint(metadata["target"]["fingerprint"])


def is_for_checkpoint_of(metadata: dict[str, Any], target: Target) -> bool:
    """Whether a checkpoint's adapter was trained for this target, or the same one in float weights or in int8."""
    return target.has_checkpoint(metadata["target"]["fingerprint"])


def is_for_shapes_of(metadata: dict[str, Any], target: Target) -> bool:
    """Whether a checkpoint's adapter was trained for a target that differs from this one in weights alone. False where
    the checkpoint is from before all constants were recorded."""
    trained_for = {name: value for name, value in metadata["target"].items() if name not in ("name", "fingerprint")}
    return fingerprint.same_constants(trained_for, target.config)


def check_target(metadata: dict[str, Any], target: Target, folder: pathlib.Path) -> None:
    """Raises `InputError` where a checkpoint's adapter was trained for another target."""
    trained_for = metadata["target"]
    if not is_for(metadata, target):
        raise InputError(
            f"{folder}: trained for another target; expected {target.name} (fingerprint {target.fingerprint}), found "
            f"{trained_for['name']} (fingerprint {trained_for['fingerprint']}); train an adapter for this target, or "
            "load the one it was trained for"
        )


def read_arrays(folder: pathlib.Path, item: str, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """An array item of a checkpoint, on the host: it may come from a machine with other devices.

    Args:
      folder: the checkpoint.
      item: "adapter" or "optimizer".
      expected: path -> anything with a shape.

    Raises:
      DamagedError: where the item cannot be read.
      InputError: where its paths and shapes are not those expected.
    """
    found = {}
    # One at a time: Orbax closes its event loop at the first array that cannot be read, and reads of others that are
    # still under way then print "Event loop is closed" with a traceback each.
    for path, leaf in expected.items():
        restore = ocp.args.PyTreeRestore(
            item={path: leaf},
            restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        found |= _read(folder, **{item: restore})[item]
    check_parameters({path: x.shape for path, x in found.items()}, expected, folder)
    return found


def read_json(folder: pathlib.Path, item: str) -> Any:
    """A JSON item of a checkpoint: "metadata", or "position" of a step of a training run.

    Raises:
      DamagedError: where it cannot be read.
    """
    return _read(folder, **{item: ocp.args.JsonRestore()})[item]


def check_parameters(found: dict[str, tuple[int, ...]], expected: dict[str, Any], folder: pathlib.Path) -> None:
    """Compares stored parameters (path -> shape) with those expected (path -> anything with a shape).

    Raises:
      InputError: naming the first that is missing, surplus, or of another shape.
    """
    for path, leaf in expected.items():
        if path not in found:
            raise InputError(f"{folder}: parameter {path} is missing; expected shape {list(leaf.shape)}, found nothing")
        if tuple(found[path]) != leaf.shape:
            raise InputError(
                f"{folder}: parameter {path} has the wrong shape; expected {list(leaf.shape)}, "
                f"found {list(found[path])}"
            )
    if surplus := sorted(set(found) - set(expected)):
        raise InputError(f"{folder}: parameter {surplus[0]} is surplus; expected nothing of that name")


def _load(folder: pathlib.Path, target: Target, name: str) -> TrainedAdapter:
    metadata = read_metadata(folder)
    exact, same_checkpoint = is_for(metadata, target), is_for_checkpoint_of(metadata, target)
    if not same_checkpoint and not is_for_shapes_of(metadata, target):
        check_target(metadata, target, folder)
    try:
        check_exit_layer(metadata["exit_layer"], target.config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    kind = kind_of(metadata)
    shape = _adapter_shape(metadata["parameters"], kind)
    expected = named_leaves(abstract_adapter(target.config, target.model.dtype, shape))
    tokens = drafted_tokens(metadata)
    # The list first: it names a mismatch where the arrays themselves would only fail to be read.
    check_parameters(metadata["parameters"], expected | tokens, folder)
    found = read_arrays(folder, "adapter", expected | tokens)
    check_arrays(found, _checksums(folder, metadata), folder / "adapter")
    parameters = {path: found[path].astype(leaf.dtype) for path, leaf in expected.items()}
    if target.mesh is None:
        parameters = jax.tree.map(jnp.asarray, parameters)
    else:
        parameters = sharding.put(parameters, sharding.shardings(parameters, target.mesh))
    parameters = {path: sharding.arranged(path, x) for path, x in parameters.items()}
    model = adapter_from_parameters(target.config, parameters, kind)
    if tokens:
        place = f"{folder}: parameter {TOKEN_IDS}"
        token_ids = _checked_tokens(found[TOKEN_IDS], target.config, place, "copy or train it again")
        model.draft_vocabulary = DraftVocabulary(target.model, jnp.asarray(token_ids))
    other_target = None if exact else titled(metadata["target"]["name"], metadata["target"]["fingerprint"])
    if same_checkpoint and not exact and target.is_rounded:
        other_target += " (float weights)"
    return TrainedAdapter(model, metadata["exit_layer"], name, target.fingerprint, other_target)


def checksum(x: np.ndarray) -> int:
    """Sum of the array's 32-bit words (padded with zeros), each times an odd number that depends on its place, modulo
    2**32: a change of any one word changes it. Orbax's arrays have no checksums of their own."""
    content = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    words = np.pad(content, (0, -len(content) % 4)).view(np.uint32)
    return int((words * (2 * np.arange(words.size, dtype=np.uint32) + 1)).sum(dtype=np.uint32))


def check_arrays(arrays: dict[str, np.ndarray], checksums: dict[str, int], item: pathlib.Path) -> None:
    """Raises `DamagedError` where an array of a checkpoint's item is not as it was written. Those that `checksums`
    lacks are not looked at."""
    for path, array in arrays.items():
        if path in checksums and checksum(array) != checksums[path]:
            raise DamagedError(f"{item}: damaged ({path} is not as it was written); copy or train it again")


def _checksums(folder: pathlib.Path, metadata: dict[str, Any]) -> dict[str, int]:
    """Of a checkpoint's arrays: a training run's are beside its place in the data. Those of earlier versions have none
    where they are no run's."""
    found = metadata.get("checksums", {})
    if (folder / "position").is_dir():
        position = read_json(folder, "position")
        found = position.get("checksums", {}).get("adapter", {}) if isinstance(position, dict) else None
    if not isinstance(found, dict):
        raise DamagedError(f"{folder}: damaged (its checksums are not as they were written); copy or train it again")
    return found


def _read(folder: pathlib.Path, **items: Any) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
            return checkpointer.restore(folder, ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise bare exceptions of many kinds for damaged files
        item = folder / next(iter(items))
        raise DamagedError(
            f"{item}: damaged or not an adapter checkpoint ({reason(error)}); copy or train it again"
        ) from None


def reason(error: Exception) -> str:
    """What happened, of an error of Orbax or TensorStore."""
    # TensorStore appends its whole specification, in brackets.
    return one_line(error).split(" [tensorstore_spec")[0]


def item_handlers() -> dict[str, ocp.CheckpointHandler]:
    """Orbax's handler for each item of a checkpoint. All are always given: it warns of items it has none for."""
    arrays, values = ocp.PyTreeCheckpointHandler, ocp.JsonCheckpointHandler
    return {
        "adapter": arrays(),
        "metadata": values(),
        "optimizer": arrays(),
        "position": values(),
        "metrics": values(),
    }
