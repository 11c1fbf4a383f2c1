"""The rules that bench commands share."""

import pytest

from kangaroo_jax import InputError
from kangaroo_jax.cli.bench import shared_flags


def test_a_model_needs_an_adapter_of_its_own():
    for adapter in (None, []):
        with pytest.raises(InputError, match="--model and --adapter belong together"):
            shared_flags.check_pair("folder", adapter)
    shared_flags.check_pair("folder", "other")
    shared_flags.check_pair(None, "other")
    shared_flags.check_pair(None, None)
