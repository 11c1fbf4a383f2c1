"""A small training run."""

import pathlib
import shutil
import sysconfig

import pytest

from kangaroo_jax.train.loop import train
from tests.reports import Said

from .runs import configured


@pytest.fixture(scope="session")
def settings(tmp_path_factory, target_folder):
    """A run of 20 steps, as overrides of configs/demo.py."""
    text = tmp_path_factory.mktemp("data")
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "textwrap.py", "ast.py"):
        shutil.copy(stdlib / name, text)
    return {
        "target": str(target_folder),
        "exit_layer": 3,
        "adapter.kind": "kangaroo",  # test_memory.py trains the other kind
        "steps": 20,
        "batch_size": 4,
        "sequence_length": 64,
        "loss_chunk": 16,
        "data.files": str(text / "a*.py"),
        "data.evaluation_files": str(text / "textwrap.py"),
        "data.cache": str(tmp_path_factory.mktemp("cache")),
        "optimizer.warmup_steps": 3,
        "optimizer.learning_rate": 3e-3,
        "evaluate_every": 100,
        "save_every": 10,
    }


@pytest.fixture(scope="session")
def run(settings, tmp_path_factory):
    """The folder of the run, never interrupted, its result and what it said."""
    output = tmp_path_factory.mktemp("run") / "whole"
    report = Said()
    result = train(configured(settings, output=str(output)), report=report)
    return output, result, report.text
