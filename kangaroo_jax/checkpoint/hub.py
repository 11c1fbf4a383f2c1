"""Folders of checkpoints: local ones, and those on the Hugging Face hub."""

from __future__ import annotations

import pathlib

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from kangaroo_jax.errors import InputError, one_line

_TIMEOUT = 10.0  # seconds


def local_folder(name: str) -> pathlib.Path:
    """The folder of a checkpoint, downloaded from the hub where `name` is the id of one there.

    Raises:
      InputError: for a name that is neither, or a hub that is out of reach and was not asked for it before.
    """
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name}: expected a folder in Hugging Face format, found a file")
    # Not *.safetensors: some repositories hold the same weights a second time under another name.
    patterns = ["*.json", "*.jinja", "merges.txt", "tokenizer.model", "model*.safetensors"]
    try:
        files = [file.rfilename for file in huggingface_hub.model_info(name, timeout=_TIMEOUT).siblings or ()]
        if not any(file.startswith("model") and file.endswith(".safetensors") for file in files):
            patterns.append("pytorch_model*.bin")
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(
            f"{name}: no such folder, and not a Hugging Face hub id; give the folder of a checkpoint"
        ) from None
    except Exception as hub_error:  # the hub's errors and those of the HTTP library under it share no base class
        try:  # offline: what an earlier run downloaded
            patterns.append("pytorch_model*.bin")
            return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except Exception:
            reason = f"{type(hub_error).__name__}: {one_line(hub_error)}"
            raise InputError(
                f"{name}: no such folder, and it could not be had from the Hugging Face hub ({reason}); "
                "check the name, or download it elsewhere and give its folder"
            ) from None
