"""Where the files of a named set are, for sets that are no tensors."""

from __future__ import annotations

from pathlib import Path

from torchfolio.data.sources import DataNotFound, data_folders


def folder_of(name: str, file: str, root: str | Path | None = None) -> Path:
    """The folder `name` below `root` or a folder of `TORCHFOLIO_DATA` that holds `file`.

    Raises:
        DataNotFound: naming the folders that were looked in.
    """
    folders = data_folders(root)
    for folder in folders:
        if (folder / name / file).is_file():
            return folder / name
    places = " or ".join(map(str, folders)) or "any folder of TORCHFOLIO_DATA (which is not set)"
    raise DataNotFound(f"no data set {name!r} in {places}; point TORCHFOLIO_DATA at a folder that holds {name}/{file}")
