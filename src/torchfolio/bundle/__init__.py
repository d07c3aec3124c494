"""A network on disk: safe weights beside a description of how to build the module.

A bundle is a folder with two files: `model.safetensors`, and `bundle.json`, which holds an import path and its
arguments, what the network takes and tells apart, and the record of its training. A bundle may come from a stranger:
nothing in it is ever unpickled, and it can name no other builders than the reference networks
(`torchfolio.models.BUILDERS`), those that papers offer (`builders` in `papers/SLUG.toml`) and those that the reader
allows by name. A builder evaluates no text, imports nothing by name and opens no path.
"""

from torchfolio.bundle.building import build, builders, resolve
from torchfolio.bundle.folder import check_folder
from torchfolio.bundle.manifest import MANIFEST, WEIGHTS, BundleError, Manifest
from torchfolio.bundle.reading import Bundle, Outline, load_bundle, outline_bundle
from torchfolio.bundle.writing import describe, push_bundle, save_bundle, write_bundle

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "Bundle",
    "BundleError",
    "Manifest",
    "Outline",
    "build",
    "builders",
    "check_folder",
    "describe",
    "load_bundle",
    "outline_bundle",
    "push_bundle",
    "resolve",
    "save_bundle",
    "write_bundle",
]
