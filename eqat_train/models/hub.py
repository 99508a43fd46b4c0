"""From what a user types to a local folder with a model's safetensors, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

from formats.errors import InputError

from ..error_text import first_line

__all__ = ["resolve_model"]

ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "README*")
# Repositories keep further copies of the weights in sub-folders (original/, onnx/) and as consolidated.safetensors.
IGNORED = ("*/*", "consolidated*.safetensors")


def resolve_model(model: str, *, trust_remote_code: bool = False) -> Path:
    """Local folder of a model, downloaded from the Hugging Face hub if ``model`` is not a folder.

    Only safetensors, configurations and tokenizer files are fetched, and ``*.py`` if ``trust_remote_code``; weights
    that exist only as pickles are refused.

    Raises:
        InputError: not a folder and not a repository; gated, private or offline; or no safetensors in it.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = _download(model, trust_remote_code)
    elif not folder.is_dir():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if not (folder / "config.json").is_file():
        raise InputError(f"{model} has no config.json; give a Hugging Face model folder or hub id")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"only pickled weights ({pickles[0]}), which are never loaded" if pickles else "no weights"
        raise InputError(
            f"{model} holds {found}; eqat reads safetensors: convert it with transformers' save_pretrained, "
            "or choose a repository that has *.safetensors"
        )
    return folder


def _download(model: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise InputError(f"folder {model} does not exist; give an existing folder or a hub id like owner/name")
    patterns = [*ALLOWED, "*.py"] if trust_remote_code else list(ALLOWED)
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=list(IGNORED)))
    except HFValidationError as exc:
        raise InputError(f"{model} is neither a folder nor a hub id like owner/name") from exc
    except GatedRepoError as exc:
        raise InputError(
            f"{model} is gated; accept its terms on https://huggingface.co/{model} and log in with: hf auth login"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise InputError(
            f"{model} is not a local folder, and the hub has no such repository that you may read; "
            "check the name, or log in with: hf auth login"
        ) from exc
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as exc:
        raise InputError(
            f"{model} is not in the local cache and the hub cannot be reached; "
            f"connect once and run: hf download {model}, or give a local folder"
        ) from exc
    except (HTTPError, OSError) as exc:
        raise InputError(
            f"{model} could not be downloaded: {first_line(exc)}; try again, or give a local folder"
        ) from exc
