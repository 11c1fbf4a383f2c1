"""Paths as users give them."""

import os
import pathlib
import subprocess
import sys

import pytest

from kangaroo_jax import InputError, json_text, paths, resumable
from kangaroo_jax.engine.answer_file import check_place


def test_a_home_folder_is_filled_in_and_one_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.expanded("~/a") == tmp_path / "a"
    assert paths.expanded("b/~") == pathlib.Path("b/~")
    with pytest.raises(InputError, match=r"^~nosuchuser/x: the home folder ~nosuchuser is not known here"):
        paths.expanded("~nosuchuser/x")


def test_without_a_home_folder_nothing_is_cached_for_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / "kangaroo_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the user is known
    assert paths.cache_folder() is None


def test_named_pipes_are_refused_and_a_shells_pipes_are_not(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    (tmp_path / "input").write_text("")
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(InputError, match=r"^this: is a named pipe; give a file$"):
            paths.check_not_named_pipe(path, "this")
        with pytest.raises(InputError, match="is a pipe or a device; give a file"):
            check_place(str(path), str(tmp_path / "input"))
    paths.check_not_named_pipe(tmp_path, "a folder")
    paths.check_not_named_pipe(tmp_path / "missing", "nothing")
    script = "from kangaroo_jax import paths; paths.check_not_named_pipe('/dev/stdin', 'x')"
    subprocess.run([sys.executable, "-c", script], stdin=subprocess.PIPE, check=True)


def test_json_that_is_nested_too_deeply_is_as_wrong_as_any():
    with pytest.raises(ValueError, match="nested too deeply"):
        json_text.parse("[" * 100_000)
    with pytest.raises(ValueError):
        json_text.parse(b"\xff")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_files_that_cannot_be_written_are_one_line(tmp_path):
    def full(name):
        path = tmp_path / name
        path.symlink_to("/dev/full")
        return path

    why = "No space left on device; when this is fixed, the same command continues"
    with pytest.raises(InputError, match=why), resumable.LineWriter(full("lines")) as writer:
        writer.write(1)
    with pytest.raises(InputError, match="No such file or directory; when this is fixed"):
        resumable.LineWriter(tmp_path / "no" / "lines")
    full("content.new")
    with pytest.raises(InputError, match=r"/content: No space left on device"):
        resumable.replace(tmp_path / "content", b"x")
    assert not (tmp_path / "content.new").exists()
    (tmp_path / "folder").mkdir()
    locked = resumable.locked(tmp_path / "folder", tmp_path / "answers", "--output")
    with pytest.raises(InputError, match="Is a directory; give another --output"), locked:
        raise AssertionError
