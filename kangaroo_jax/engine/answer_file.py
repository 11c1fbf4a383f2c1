"""The file of answers: a line per prompt, appended as they are done; beside it, the settings they were made with.

Several processes write a part each, `OUTPUT.part-0-of-2` and so on, which are merged in the end. Parts that a killed
run has left count as answers, whatever the number of processes then and now.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from kangaroo_jax import json_text, resumable
from kangaroo_jax.engine.prompt_file import Id, Prompt
from kangaroo_jax.engine.requests import Answer
from kangaroo_jax.errors import InputError

_MEND = "remove the line, or give another --output"


def check_place(path: str, source: str) -> pathlib.Path:
    """Where answers are to go, if they can: raises `InputError` for a folder that is not there, and the like."""
    output = pathlib.Path(path)
    if not output.parent.is_dir():
        raise InputError(f"--output={path}: there is no folder {output.parent}; create it")
    if output.is_dir():
        raise InputError(f"--output={path}: is a folder; give a file")
    if output.exists() and not output.is_file():
        raise InputError(f"--output={path}: is a pipe or a device; give a file")
    if output.exists() and os.path.samefile(output, source):
        raise InputError(f"--output={path}: is the --input too; give another file")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise InputError(f"--output={path}: cannot be written to; give another")
    return output


def part(output: pathlib.Path, index: int, count: int) -> pathlib.Path:
    """The file that process `index` of `count` writes to."""
    return output if count == 1 else output.with_name(f"{output.name}.part-{index}-of-{count}")


def record(prompt: Prompt, answer: Answer | None, error: str | None = None) -> dict[str, Any]:
    """An answer's line, or that of a prompt that has none."""
    if answer is None:
        return {"id": prompt.id, "error": error}
    return {
        "id": prompt.id,
        "text": answer.text,
        "new_tokens": len(answer.tokens),
        "finish_reason": answer.finish_reason,
        "accept_lengths": answer.accept_lengths,
        "prompt_digest": prompt.digest,
    }


def finished(
    output: pathlib.Path, settings: dict[str, Any], prompts: Mapping[Id, Prompt], source: str
) -> dict[Id, bytes]:
    """The lines of all answers that are there, in the output and in parts; errors are none. Changes nothing.

    Args:
      output: the file.
      settings: what answers are made with, JSON values.
      prompts: all that may be answered.
      source: their file's name, for messages.

    Raises:
      InputError: for answers that were made with other settings, to other prompts, or not by this function's kind.
    """
    parts = _parts(output)
    there = [path for path in (output, *parts) if path.exists() and path.stat().st_size]
    if there:
        path = _settings(output)
        if not path.exists() or not path.stat().st_size:
            raise InputError(
                f"{there[0]}: there already, and not made by this command (no {path.name}); give another --output"
            )
        resumable.check_settings(path.read_bytes(), settings, path, output, "--output")
    answers = _lines(output, prompts, source)
    for path in parts:  # a part may be there still although it was merged
        answers = _lines(path, prompts, source) | answers
    return answers


def settle(output: pathlib.Path, settings: dict[str, Any], answers: Mapping[Id, bytes], errors: bool = False) -> None:
    """Makes `answers` the content of the output, and the parts disappear.

    Args:
      output: the file.
      settings: written beside it.
      answers: from `finished`.
      errors: whether the parts' errors are kept: at the end of a run, not at its beginning.
    """
    lines = list(answers.values())
    if errors:
        lines += [
            line for path in _parts(output) for line in resumable.whole_lines(path) if "error" in json_text.parse(line)
        ]
    # Not replaced, for the lock is on it. It changes only before there are answers, so one half written does no harm.
    path, content = _settings(output), (json.dumps(settings, indent=1) + "\n").encode()
    if not path.exists() or path.read_bytes() != content:
        try:
            path.write_bytes(content)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; when this is fixed, run the same command again") from None
    resumable.replace(output, b"".join(lines))
    for path in _parts(output):
        path.unlink()


def locked(output: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps a second run from writing the same answers; raises `InputError` if there is one."""
    return resumable.locked(_settings(output), output, "--output")


def _settings(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(output.name + ".settings.json")


def _parts(output: pathlib.Path) -> list[pathlib.Path]:
    name = re.compile(re.escape(output.name) + r"\.part-\d+-of-\d+")
    return sorted(path for path in output.parent.iterdir() if name.fullmatch(path.name))


def _lines(path: pathlib.Path, prompts: Mapping[Id, Prompt], source: str) -> dict[Id, bytes]:
    answers: dict[Id, bytes] = {}
    seen: set[Id] = set()
    for number, line in enumerate(resumable.whole_lines(path), start=1):
        try:
            raw = json_text.parse(line)
            key = raw["id"]
            failed = "error" in raw
            digest = None if failed else (raw["text"], raw["accept_lengths"], raw["prompt_digest"])[-1]
            new = key not in seen
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} line {number}: not an answer as this command writes it; {_MEND}") from None
        if not new:
            raise InputError(f"{path} line {number}: the id {key!r} is answered twice; {_MEND}")
        seen.add(key)
        if key not in prompts:
            raise InputError(f"{path} line {number}: the id {key!r} is not in {source}; {_MEND}")
        if not failed:
            if digest != prompts[key].digest:
                raise InputError(f"{path} line {number}: the id {key!r} had another prompt then; {_MEND}")
            answers[key] = line
    return answers
