"""Data that a run's target writes itself, before the first step: `data.files=self`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax

from kangaroo_jax.buckets import is_bucket
from kangaroo_jax.checkpoint.target import Target, load_target
from kangaroo_jax.config import DataConfig, TrainConfig
from kangaroo_jax.data.synthesize.record_file import check_place
from kangaroo_jax.data.synthesize.run import Tally, write_records
from kangaroo_jax.data.synthesize.sources import choose_source
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding


def check(data: DataConfig, output: str) -> None:
    """Raises `InputError` where the target is to write the data, but cannot in this run, which has this `output`."""
    needed = None
    if jax.process_count() > 1:
        needed = "a run of one process"
    elif is_bucket(output):
        needed = "an output that is not in a bucket"
    if data.is_self and needed is not None:
        raise InputError(
            f"data.files: self needs {needed}; write the data first with `python -m kangaroo_jax.data.synthesize`, and "
            "give its output"
        )


def write(
    config: TrainConfig, target: Target, output: pathlib.Path, on_progress: Callable[[Tally], None]
) -> DataConfig:
    """Has the target write what `config.data.synthesis` asks for, and is not there, beside the run's folder.

    Args:
      config: of the run.
      target: of the run.
      output: the run's folder.
      on_progress: as for `write_records`.

    Returns:
      The settings with the file in place of "self".

    Raises:
      InputError: as `write_records` and its sources, and for a folder that cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {output.parent} cannot be made a folder ({error.strerror}); name another") from None
    file = check_place(output.with_name(f"{output.name}.data.jsonl"), "output")
    settings = config.data.synthesis
    writer = _decoding(target, config)
    groups = 1 if writer.mesh is None else writer.mesh.shape["data"]
    write_records(
        writer,
        None,
        choose_source(writer, settings, config.data.template),
        file,
        settings.conversations,
        batch_size=-(-settings.batch_size // groups) * groups,
        flag="output",
        on_progress=on_progress,
    )
    return dataclasses.replace(config.data, files=str(file))


def _decoding(target: Target, config: TrainConfig) -> Target:
    """The target as decoding takes it. Split over several devices it is loaded again, as decoding splits it in another
    way: each group of `mesh.model` devices holds it, and writes a part of the batch."""
    if target.mesh.size == 1:
        return dataclasses.replace(target, mesh=None)
    devices = jax.local_devices()
    mesh = sharding.decoding_mesh(config.mesh.model, devices, len(devices) // config.mesh.model)
    return load_target(config.target, config.dtype, mesh, weights=config.weights)
