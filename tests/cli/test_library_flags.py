"""What holds for modules of the library: they define no flags and print nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

import kangaroo_jax

_PACKAGE = pathlib.Path(kangaroo_jax.__file__).parent
_IMPORT_ALL = """
import importlib, sys
import grain, ml_collections, orbax.checkpoint  # whose flags are not the library's
from absl import flags

before = set(flags.FLAGS)
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert set(flags.FLAGS) == before, (name, set(flags.FLAGS) - before)
"""


def _modules():
    for path in sorted(_PACKAGE.rglob("*.py")):
        parts = path.relative_to(_PACKAGE).with_suffix("").parts
        if parts[0] not in ("cli", "bench") and parts[-1] != "__main__":  # those are commands
            yield ".".join(("kangaroo_jax", *parts)).removesuffix(".__init__")


@pytest.mark.long
def test_no_module_of_the_library_defines_a_flag():
    modules = list(_modules())
    assert {"kangaroo_jax", "kangaroo_jax.preflight.machines", "kangaroo_jax.distributed"} <= set(modules)
    subprocess.run([sys.executable, "-c", _IMPORT_ALL, *modules], check=True)


def test_a_mistake_in_a_flag_is_named_without_importing_jax():
    script = """
import sys
import kangaroo_jax.cli.decode
found = {"jax", "flax", "orbax", "transformers", "huggingface_hub", "torch"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_listed_and_imported_when_they_are_used():
    script = """
import sys
import kangaroo_jax
from kangaroo_jax import DraftConfig
assert "jax" not in sys.modules, "importing a setting imported JAX"
for name in kangaroo_jax.__all__:
    assert getattr(kangaroo_jax, name).__name__ == name
    assert name in dir(kangaroo_jax)
assert set(kangaroo_jax.__all__) == set(kangaroo_jax._MODULES)
assert not hasattr(kangaroo_jax, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_nothing_below_cli_prints():
    for path in sorted(_PACKAGE.rglob("*.py")):
        if path.relative_to(_PACKAGE).parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert named != "print", f"{path}:{node.lineno}"
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert "tqdm" not in imported, f"{path}:{node.lineno}"
