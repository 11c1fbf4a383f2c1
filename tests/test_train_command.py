"""train.py as a command, with what users get wrong: one line on stderr, exit code 2, no traceback, nothing written.

What a right command does is tested in tests/train/test_loop.py.
"""

import concurrent.futures
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
        "--config.optimizer.learning_rat: there is no such setting; did you mean optimizer.learning_rate?",
    ),
    "setting without its section": (
        ["--config=configs/demo.py", "--config.learning_rate=1e-3"],
        "--config.learning_rate: there is no such setting; did you mean optimizer.learning_rate?",
    ),
    "one value for a section": (
        ["--config=configs/demo.py", "--config.optimizer=adam"],
        "--config.optimizer: there is no such setting; expected one of optimizer.learning_rate, ",
    ),
    "wrong type": (
        ["--config=configs/demo.py", "--config.steps=many"],
        "--config.steps=many: invalid literal for int()",
    ),
    "wrong value": (
        ["--config=configs/demo.py", "--config.steps=-5"],
        "steps: expected a number that is more than zero",
    ),
    "unknown setting in the file": (
        ["--config=FILE"],
        "train.py: error: config: data.file is not a setting; did you mean data.files?\n",
    ),
    "missing config": (["--config=configs/missing.py"], "No such file or directory: 'configs/missing.py'"),
    "no config": ([], "--config is missing"),
    "stray argument": (["--config=configs/demo.py", "steps=5"], "unexpected argument 'steps=5'"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The commands' results, run two at a time: most of each is Python's imports."""
    file = tmp_path_factory.mktemp("config") / "mistaken.py"
    file.write_text(
        "from kangaroo_jax.train.settings import config_dict\n\n\n"
        "def get_config():\n    return config_dict(target='a', output='b', data={'file': 'c'})\n"
    )

    def run(name):
        output = tmp_path_factory.mktemp("run") / "output"
        flags = [word.replace("FILE", str(file)) for word in MISTAKES[name][0]]
        flags = [*flags, *([f"--config.output={output}"] if name not in ("no config",) else [])]
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
