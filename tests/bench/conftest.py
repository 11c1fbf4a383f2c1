"""What the tests of the benchmarks share."""

import pytest

from tests.bench.commands import Commands
from tests.bench.models import save_model


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    running = Commands(tmp_path_factory.mktemp("commands") / "cache")
    yield running
    running.close()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folders of a target and an adapter."""
    return save_model(tmp_path_factory.mktemp("saved"))
