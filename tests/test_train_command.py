"""train.py as a command, with what users get wrong: one line on stderr, exit code 2, no traceback, nothing written.

What a right command does is tested in tests/train/test_loop.py.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MISTAKES = {
    "missing target": (
        ["--config=configs/llama7b.py", "--config.target=/missing"],
        "train.py: error: /missing: no such folder; expected a target in Hugging Face format, a GGUF file or a hub id",
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
    **{
        f"a file that ends in {reason}": ([f"--config=FAILS{i}"], f"fails{i}.py: the configuration could not be read: ")
        for i, reason in enumerate(("1 / 0", "undefined", "exec('raise RuntimeError')", "[][1]", "{}['a']", "int('a')"))
    },
    "a home that is not there": (
        ["--config=configs/demo.py", "--config.target=~nosuchuser/x"],
        "~nosuchuser/x: the home folder ~nosuchuser is not known here",
    ),
    "missing config": (["--config=configs/missing.py"], "No such file or directory: 'configs/missing.py'"),
    "no config": ([], "--config is missing"),
    "stray argument": (["--config=configs/demo.py", "steps=5"], "unexpected argument 'steps=5'"),
}


# Imports what the command does, which takes most of its time, and then runs train.py in a process of its own for each
# command line.
_RUN_ALL = """
import json, os, runpy, sys
import ml_collections.config_flags
import kangaroo_jax.train.loop

for argv, out, err in json.load(sys.stdin):
    if os.fork() == 0:
        for descriptor, path in (1, out), (2, err):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv, code = argv, 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        os._exit(code)  # an ordinary end would take a second for each
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@dataclasses.dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str
    output: pathlib.Path  # the run's folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The commands' results."""
    file = tmp_path_factory.mktemp("config") / "mistaken.py"
    file.write_text(
        "from kangaroo_jax.train.settings import config_dict\n\n\n"
        "def get_config():\n    return config_dict(target='a', output='b', data={'file': 'c'})\n"
    )
    for name, (words, _) in MISTAKES.items():
        if name.startswith("a file that ends in "):
            fails = file.with_name(words[0].removeprefix("--config=").lower() + ".py")
            fails.write_text(f"def get_config():\n    return {name.removeprefix('a file that ends in ')}\n")
    folders, jobs = {name: tmp_path_factory.mktemp("run") for name in MISTAKES}, []
    for name, folder in folders.items():
        flags = [
            re.sub("FAILS.", lambda x: str(file.with_name(f"{x[0].lower()}.py")), word.replace("FILE", str(file)))
            for word in MISTAKES[name][0]
        ]
        flags += [f"--config.output={folder / 'output'}"] if name != "no config" else []
        jobs.append(([str(ROOT / "train.py"), *flags], str(folder / "out"), str(folder / "err")))
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL], cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True
    )
    codes = map(int, done.stdout.split())
    return {
        name: Result(code, (folder / "out").read_text(), (folder / "err").read_text(), folder / "output")
        for (name, folder), code in zip(folders.items(), codes, strict=True)
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(results, name):
    done = results[name]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("train.py: error: ")
    assert done.stderr.count("\n") == 1
    assert MISTAKES[name][1] in done.stderr
    assert not done.output.exists()


def test_the_command_itself():
    """Not through a process that has imported its modules."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--config=a.py", "--config.stepz=5"], capture_output=True)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr == b"train.py: error: --config.stepz: there is no such setting; did you mean steps?\n"


@pytest.mark.long
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
