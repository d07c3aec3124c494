"""Graphs: the citation networks of Planetoid, read without running anything they bring."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import one_of
from torchfolio.data.places import folder_of
from torchfolio.shown import Shown

__all__ = ["Graph", "planetoid"]


@dataclass(frozen=True, repr=False)
class Graph(Shown):
    """One graph with labelled nodes; the fields are those of `torch_geometric.data.Data`.

    Attributes:
        x: features of the nodes, float32 `[N, features]`.
        edge_index: edges from the first row to the second, int64 `[2, E]`; each of an undirected graph in both
            directions, none twice, no loops.
        y: labels, int64 `[N]`.
        train_mask: nodes whose labels are known, bool `[N]`.
        val_mask: nodes to choose settings on.
        test_mask: nodes to report on.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.x)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return int(self.y.max()) + 1


def planetoid(name: str = "cora", *, normalize: bool = True, root: str | Path | None = None) -> Graph:
    """Cora or CiteSeer with the public split: 20 labels a class to train on, 500 nodes to validate, 1,000 to test.

    Args:
        name: `"cora"` (2,708 nodes, 7 classes) or `"citeseer"` (3,327 nodes, 6 classes).
        normalize: whether the features of a node sum to 1.
        root: folder to look in first; it holds `planetoid/ind.NAME.tx` and the others.

    Raises:
        DataNotFound: if it is nowhere.
        ValueError: if a file holds something else than arrays.
    """
    one_of("name", name, ("cora", "citeseer"))
    folder = folder_of("planetoid", f"ind.{name}.tx", root)
    tx, allx, y, ty, ally, graph = (
        _read(folder / f"ind.{name}.{part}") for part in ("tx", "allx", "y", "ty", "ally", "graph")
    )
    test = np.loadtxt(folder / f"ind.{name}.test.index", dtype=np.int64)
    # Test nodes come in an order of their own; CiteSeer's isolated ones are missing from the files.
    count = int(max(test.max() + 1, len(graph)))
    features = np.zeros((count, allx.shape[1]), dtype=np.float32)
    labels = np.zeros((count, ally.shape[1]))
    features[: allx.shape[0]], labels[: len(ally)] = allx.toarray(), ally
    features[test], labels[test] = tx.toarray(), ty
    if normalize:
        features /= np.maximum(features.sum(1, keepdims=True), 1)
    known = np.arange(len(y))
    return Graph(
        torch.from_numpy(features),
        _edges(graph, count),
        torch.from_numpy(labels.argmax(1)),
        _mask(known, count),
        _mask(len(y) + np.arange(500), count),
        _mask(test, count),
    )


def _edges(graph: dict[int, list[int]], count: int) -> Tensor:
    pairs = np.array([(i, j) for i, neighbours in graph.items() for j in neighbours if i != j], dtype=np.int64)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    keys = np.unique(both[:, 0] * count + both[:, 1])
    return torch.from_numpy(np.stack([keys // count, keys % count]))


def _mask(index: np.ndarray, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(index)] = True
    return mask


class _Arrays(pickle.Unpickler):
    """Reads pickles of arrays, sparse matrices and lists of neighbours, and calls nothing else."""

    ALLOWED = frozenset({
        ("collections", "defaultdict"), ("__builtin__", "list"), ("builtins", "list"),
        ("numpy", "dtype"), ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
        ("scipy.sparse.csr", "csr_matrix"), ("scipy.sparse._csr", "csr_matrix"),
    })  # fmt: skip

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.ALLOWED:
            raise ValueError(f"it names {module_name}.{global_name}, expected arrays and lists alone")
        current = {"scipy.sparse.csr": "scipy.sparse", "numpy.core.multiarray": "numpy._core.multiarray"}
        return super().find_class(current.get(module_name, module_name).replace("__builtin__", "builtins"), global_name)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except (ValueError, TypeError, EOFError, AttributeError, IndexError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
