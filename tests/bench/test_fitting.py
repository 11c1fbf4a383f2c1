"""Which of several machines decoding fits, where some cannot be compiled for."""

import types

from kangaroo_jax.bench.fitting import first_that_fits
from kangaroo_jax.errors import MachineError


class Work:
    """Fits the machine called "large"; the compiler fails for "broken"."""

    def on(self, machine, batch_size, prompt_tokens):
        if machine == "broken":
            raise MachineError("broken: no tile sizes")
        return types.SimpleNamespace(name=machine, fits=machine == "large")


def test_a_compiler_that_fails_for_one_machine_does_not_end_the_search():
    report, failures = first_that_fits(Work(), ["small", "broken", "large", "never asked"], 1, 8)
    assert (report.name, failures) == ("large", ["broken: no tile sizes"])
    assert first_that_fits(Work(), ["broken", "small"], 1, 8) == (None, ["broken: no tile sizes"])
    assert first_that_fits(Work(), ["small"], 1, 8) == (None, [])
