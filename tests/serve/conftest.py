import pytest

from kangaroo_jax.config import ServeConfig
from tests.serve.servers import serving


@pytest.fixture(scope="module")
def served():
    """A server with one slot: its programs are those that `generate` has compiled, or will use."""
    with serving(ServeConfig(queue_size=6, max_body_bytes=100_000)) as running:
        yield running
        assert running.failures == []
