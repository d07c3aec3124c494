"""Bundles on the Hugging Face hub. Nothing but the files of a bundle is fetched, and nothing of them is run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchfolio.errors import TorchfolioError

__all__ = ["HubError", "fetch_bundle", "send_bundle"]

PREFIX = "hf:"


class HubError(TorchfolioError):
    """A bundle cannot be fetched or sent."""


def fetch_bundle(name: str, files: Sequence[str]) -> Path:
    """The folder of a bundle of the hub, fetched once and kept in the hub's own cache.

    Args:
        name: `"hf:owner/name"`, with `"@revision"` behind it for another than the newest.
        files: files that a bundle is made of; no other is fetched.

    Raises:
        HubError: if the name is none, or there is no such bundle.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        folder = snapshot_download(
            _checked(repository), revision=revision or None, allow_patterns=list(files), endpoint=_endpoint()
        )
    except HubError:
        raise
    except Exception as error:  # of many kinds: the network, the hub, the name
        raise HubError(f"there is no bundle to be had as {name!r}: {_first_line(error)}") from error
    missing = [file for file in files if not (Path(folder) / file).is_file()]
    if missing:
        raise HubError(f"{name} is no bundle: it has no {missing[0]}")
    return Path(folder)


def send_bundle(folder: Path, name: str, files: Sequence[str], *, private: bool, message: str | None) -> str:
    """Send these files of a bundle, those that are there; see `torchfolio.bundle.push_bundle`."""
    from huggingface_hub import HfApi

    repository, api = _checked(name.removeprefix(PREFIX)), HfApi(endpoint=_endpoint())
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(files),
            commit_message=message or "Add a torchfolio bundle",
        )  # fmt: skip
    except Exception as error:
        raise HubError(f"the hub does not take {repository}: {_first_line(error)}") from error
    return str(getattr(done, "commit_url", done)).partition("/commit/")[0]


def _checked(repository: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise HubError(f"expected hf:owner/name, got {repository!r}")
    return repository


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
