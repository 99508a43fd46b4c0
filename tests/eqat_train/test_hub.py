"""resolve_model: local folders, the hub, and one line for everything that goes wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from eqat_train.models.loading import resolve_model
from formats.errors import InputError


def _folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def _hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("told by the hub\nand more", response=SimpleNamespace(headers={}, request=None))
    return kind("told by the hub\nand more")


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "config.json", "model.safetensors")
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model.safetensors",), r"has no config\.json"),
        (("config.json",), r"holds no weights; eqat reads safetensors"),
        (("config.json", "pytorch_model.bin"), r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"),
    ],
)
def test_a_folder_without_usable_weights_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        resolve_model(str(_folder(tmp_path / "model", *names)))


def test_a_file_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(InputError, match="is a file; give the folder"):
        resolve_model(str(file))
    with pytest.raises(InputError, match="does not exist"):
        resolve_model(str(tmp_path / "absent"))


@pytest.mark.parametrize("trusted", [False, True])
def test_a_hub_id_downloads_no_pickle_and_no_code_unless_trusted(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(_folder(tmp_path / "snapshot", "config.json", "model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name", trust_remote_code=trusted) == tmp_path / "snapshot"
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_own.py",
        "pytorch_model.bin",
        "model.pt",
        "original/model.safetensors",
        "consolidated.safetensors",
    ]
    taken = list(
        huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    assert taken == files[: 8 if trusted else 7]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "owner/name is gated; accept its terms on https://huggingface.co/owner/name"),
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (errors.HFValidationError, "neither a folder nor a hub id"),
        (errors.HfHubHTTPError, "could not be downloaded: told by the hub"),
        (errors.HTTPError, "could not be downloaded: told by the hub"),
        (OSError, "could not be downloaded: told by the hub"),
    ],
)
def test_hub_errors_become_one_line(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise _hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=message) as caught:
        resolve_model("owner/name")
    assert "\n" not in str(caught.value)


def test_offline_without_a_cached_copy_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="owner/name is not in the local cache and the hub cannot be reached"):
        resolve_model("owner/name")
