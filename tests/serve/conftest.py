import pytest

from kangaroo_jax.config import ServeConfig
from tests.serve.servers import serving


@pytest.fixture(scope="module")
def served():
    """The demo with two slots."""
    with serving(ServeConfig(queue_size=6, max_body_bytes=100_000)) as running:
        yield running
        assert running.failures == []
