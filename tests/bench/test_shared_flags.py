"""The rules that bench commands share."""

import jax
import pytest

from kangaroo_jax import InputError
from kangaroo_jax.cli.bench import shared_flags


@pytest.mark.parametrize(
    ("backend", "model", "dtype"),
    [
        ("cpu", "folder", "float32"),
        ("gpu", "folder", "bfloat16"),
        ("tpu", "folder", "bfloat16"),
        ("gpu", None, "float32"),
    ],
)
def test_weights_are_float32_on_cpu_and_for_the_demo(monkeypatch, backend, model, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert shared_flags.default_dtype(model) == dtype


def test_a_model_needs_an_adapter_of_its_own():
    for adapter in (None, []):
        with pytest.raises(InputError, match="--model and --adapter belong together"):
            shared_flags.check_pair("folder", adapter)
    shared_flags.check_pair("folder", "other")
    shared_flags.check_pair(None, "other")
    shared_flags.check_pair(None, None)
