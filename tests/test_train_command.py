"""train.py as a command, with what users get wrong: one line on stderr, exit code 2, no traceback, nothing written.

What a right command does is tested in tests/train/test_loop.py.
"""

import concurrent.futures
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MISTAKES = {
    "missing target": (
        ["--config=configs/llama7b.py", "--config.target=/missing"],
        "train.py: error: /missing: no such folder; expected a target in Hugging Face format or a hub id",
    ),
    "unknown setting": (
        ["--config=configs/demo.py", "--config.optimizer.learning_rat=1e-3"],
        'Did you mean "learning_rate" instead of "learning_rat"?',
    ),
    "wrong type": (
        ["--config=configs/demo.py", "--config.steps=many"],
        "--config.steps=many: invalid literal for int()",
    ),
    "wrong value": (
        ["--config=configs/demo.py", "--config.steps=-5"],
        "steps: expected a number that is more than zero",
    ),
    "missing config": (["--config=configs/missing.py"], "No such file or directory: 'configs/missing.py'"),
    "no config": ([], "--config is missing"),
    "stray argument": (["--config=configs/demo.py", "steps=5"], "unexpected argument 'steps=5'"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The commands' results, run two at a time: most of each is Python's imports."""

    def run(name):
        output = tmp_path_factory.mktemp("run") / "output"
        flags = [*MISTAKES[name][0], *([f"--config.output={output}"] if name not in ("no config",) else [])]
        done = subprocess.run([sys.executable, ROOT / "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
        return done, output

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(run, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(results, name):
    done, output = results[name]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("train.py: error: ")
    assert done.stderr.count("\n") == 1
    assert MISTAKES[name][1] in done.stderr
    assert not output.exists()


def test_a_configuration_imports_its_neighbours_from_any_folder(tmp_path):
    """As where the package is installed: the repository is not on the path, only kangaroo_jax is."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "kangaroo_jax").symlink_to(ROOT / "kangaroo_jax")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kangaroo_jax.cli.train",
            f"--config={ROOT / 'configs' / 'vicuna_7b.py'}",
            "--config.target=/missing",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "packages")},
        capture_output=True,
        text=True,
    )
    assert "/missing: no such folder" in done.stderr  # the settings were read
    assert done.returncode == 2
