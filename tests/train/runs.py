"""Configurations of small training runs, and what is in their checkpoints."""

import importlib.util
import pathlib

import numpy as np
import orbax.checkpoint as ocp

from kangaroo_jax.checkpoint.adapter import item_handlers
from kangaroo_jax.train.settings import check_config

ROOT = pathlib.Path(__file__).parents[2]


def demo_config():
    spec = importlib.util.spec_from_file_location("demo_config", ROOT / "configs" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def configured(settings, **overrides):
    """`TrainConfig` of configs/demo.py with other settings, by dotted name."""
    config = demo_config()
    config.update_from_flattened_dict(settings | overrides)
    return check_config(config)


def checkpoint(step_folder):
    """All items of a checkpoint, arrays as numpy."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
        listed = checkpointer.metadata(step_folder).item_metadata
        restore = {"metadata": ocp.args.JsonRestore(), "position": ocp.args.JsonRestore()}
        for item in ("adapter", "optimizer"):
            as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in listed[item].tree}
            restore[item] = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return checkpointer.restore(step_folder, ocp.args.Composite(**restore))


def assert_same(step_folder, other):
    """Whether two checkpoints hold the same state, bit for bit."""
    expected, found = checkpoint(step_folder), checkpoint(other)
    for position in (found["position"], expected["position"]):
        del position["digest"]  # also of the output's name
    assert found["position"] == expected["position"]
    for item in ("adapter", "optimizer"):
        assert found[item].keys() == expected[item].keys()
        for path, array in expected[item].items():
            assert np.array_equal(found[item][path], array), (item, path)
