"""The target and the adapter that --model and --adapter name: the demo, and what comes with the package, by default."""

from __future__ import annotations

import shlex
import sys

import jax
from jax.sharding import Mesh

from kangaroo_jax import DraftConfig, adapters, demo, load_adapter, load_target, paths
from kangaroo_jax.bench import machine
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.errors import InputError


def load_target_of(
    model: str | None,
    dtype: str | None,
    mesh: Mesh | None = None,
    weights: str = "float",
    long_context: bool = False,
) -> Target:
    """The target that --model names, the demo for None. The demo is in float32 on accelerators too, unless --dtype says
    otherwise: it is small, and drafted decoding's tokens are then exactly those of plain decoding. Says in one line
    what int8 weights mean for the output."""
    name = model or str(demo.MODEL)
    if dtype is None and paths.expanded(name).resolve() == demo.MODEL.resolve():
        dtype = "float32"
    target = load_target(name, dtype, mesh, weights=weights, long_context=long_context)
    if target.is_rounded:
        _note(f"{target.title}: the output is that of plain decoding with these, not with the checkpoint's own")
    elif weights == "int8":
        _note(f"{target.name}: its own int8 weights, as they are")
    if long_context:
        original = target.config.rope_scaling.original_max_position_embeddings
        _note(f"{target.name}: longrope's long factors turn all texts, also those of up to {original} tokens")
    return target


def load_adapter_of(target: Target, path: str | None) -> TrainedAdapter:
    """The adapter that --adapter names; for None, the one that comes with the package. Says in one line what a user
    would want to know about which one it is.

    Raises:
      InputError: where none comes with the package for this target, or as `load_adapter`.
    """
    found = path or adapters.find(target)
    if found is None:
        own = ""
        if getattr(target.tokenizer, "chat_template", None):  # it can write its own data
            own = " --config.data.template= --config.data.files=self"
        raise InputError(
            f"--adapter is missing, and none comes with the package for {target.name}; train one with `python train.py "
            f"--config=configs/llama7b.py --config.target={target.name}{own}`, then give its output folder; or decode "
            "without one: --plain"
        )
    adapter = load_adapter(found, target)
    if path is None and found != demo.ADAPTER:
        _note(f"adapter {found.name}, which comes with the package")
    if adapter.other_target is not None:
        _note(
            f"adapter {found} was trained for {adapter.other_target}, which has the same shapes and other weights: the "
            "output stays that of this target, but fewer drafts may be accepted"
        )
    return adapter


def draft_of(draft: DraftConfig, slots: int, weights: str, model: str | None, adapter: str | None) -> DraftConfig:
    """How an engine of so many slots drafts (`DraftConfig.at`). Says which costs of rounds its sequences decide by,
    where those are of another batch size or machine, and how to measure them for what --model, --adapter and --weights
    name."""
    named = [
        f" --{name}={shlex.quote(value)}"
        for name, value in (("model", model), ("adapter", adapter))
        if value is not None
    ]
    named += [f" --weights={weights}"] if weights != "float" else []
    tune = "python -m kangaroo_jax.bench tune" + "".join(named)
    draft = draft.at(slots)
    if draft.decide is None:
        return draft
    if not draft.decide.costs:
        _note(f"costs of rounds are predicted; `{tune} --batch_sizes={slots}` measures them")
        return draft
    costs, here = draft.decide.nearest(slots), machine.name()
    if costs.batch_size != slots or draft.decide.machine != here:
        _note(
            f"how far to draft is decided by costs of batch {costs.batch_size} on {draft.decide.machine}, for batch "
            f"{slots} on {here}; `{tune} --batch_sizes={slots}` measures them"
        )
    return draft


def _note(message: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {message}", file=sys.stderr, flush=True)
