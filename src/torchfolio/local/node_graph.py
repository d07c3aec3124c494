"""The graph of a node classifier: checked at the door, its unknown labels hidden, and virtual nodes for its classes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchfolio.checks import finite, one_of
from torchfolio.local.graph_layers import check_edges, kind_of

__all__ = ["NodeGraph", "VirtualGraph", "as_mask", "augment_with_virtual_nodes", "node_graph", "unpack"]


class NodeGraph(NamedTuple):
    """What an algorithm sees of a graph.

    Attributes:
        x: features `[N, F]`.
        edge_index: edges `[2, E]`.
        y: labels `[N]`, -1 wherever they are not given to it.
        train: training nodes, bool `[N]`.
        val: validation nodes, bool `[N]`.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train: Tensor
    val: Tensor


class VirtualGraph(NamedTuple):
    """A graph with virtual nodes.

    Attributes:
        x: features `[N + C, F]`, those of the virtual nodes last.
        edge_index: edges `[2, E']`, the given ones first.
        edge_type: 0 for given edges, 1 to C to a virtual node, C + 1 to 2C back from it.
        real_mask: mask of the nodes that are given.
    """

    x: Tensor
    edge_index: Tensor
    edge_type: Tensor
    real_mask: Tensor


def augment_with_virtual_nodes(
    x: Tensor,
    edge_index: Tensor,
    y: Tensor,
    mask: Tensor,
    num_classes: int,
    direction: Literal["both", "uni"] = "both",
    generator: torch.Generator | None = None,
    *,
    virtual: Tensor | None = None,
) -> VirtualGraph:
    """Append a node for every class, linked to the nodes of the class whose labels are known.

    Args:
        x: features `[N, F]`.
        edge_index: edges `[2, E]`.
        y: labels `[N]`, read where `mask` holds alone.
        mask: nodes to link, bool `[N]`.
        num_classes: number of classes C.
        direction: `"both"` links in both directions, `"uni"` to the virtual node alone.
        generator: source of the virtual nodes' features, N(0, 1).
        virtual: features of the virtual nodes `[C, F]`, instead of drawn ones.

    Returns:
        The graph with N + C nodes and E + 2 |mask| edges (E + |mask| if `"uni"`).

    Raises:
        ValueError: if a label or a shape is out of range or the direction unknown.

    Reference:
        Park et al., ICLR 2024, section 3.2.
    """
    one_of("direction", direction, ("both", "uni"))
    n, nodes = len(x), as_mask("mask", mask, len(x)).nonzero().flatten()
    classes = y[nodes].long()
    if len(nodes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(f"expected labels from 0 to {num_classes - 1}, got {classes.unique().tolist()}")
    if virtual is None:
        virtual = torch.randn(num_classes, x.shape[1], generator=generator).to(x)
    if virtual.shape != (num_classes, x.shape[1]):
        raise ValueError(
            f"expected features of the virtual nodes [{num_classes}, {x.shape[1]}], got shape {tuple(virtual.shape)}"
        )
    links = torch.stack([nodes, n + classes])
    edges, types = [edge_index, links], [edge_index.new_zeros(edge_index.shape[1]), 1 + classes]
    if direction == "both":
        edges, types = [*edges, links.flip(0)], [*types, 1 + num_classes + classes]
    real = torch.arange(n + num_classes, device=x.device) < n
    return VirtualGraph(torch.cat([x, virtual]), torch.cat(edges, 1), torch.cat(types), real)


def unpack(data: Any, val_mask: Any) -> tuple[Any, ...]:
    """Features, edges, labels and masks of an object that holds them."""
    missing = [name for name in ("x", "edge_index", "y", "train_mask") if getattr(data, name, None) is None]
    if missing:
        raise TypeError(f"expected x, edge_index, y and train_mask, or an object that has them, got no {missing[0]}")
    val_mask = val_mask if val_mask is not None else getattr(data, "val_mask", None)
    return data.x, data.edge_index, data.y, data.train_mask, val_mask


def node_graph(x: Any, edge_index: Any, y: Any, train_mask: Any, val_mask: Any) -> tuple[NodeGraph, int]:
    """The graph, with labels hidden that are not to be learned from, and the number of classes."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"expected x to be a tensor of floating point numbers, got {kind_of(x)}")
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"expected x to be features [N, F], got shape {tuple(x.shape)}")
    finite("x", x)
    if not isinstance(y, Tensor) or y.is_floating_point():
        raise TypeError(f"expected y to be a tensor of whole numbers, got {kind_of(y)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"expected y to be labels [{len(x)}], got shape {tuple(y.shape)}")
    train = as_mask("train_mask", train_mask, len(x)).to(x.device)
    val = as_mask("val_mask", val_mask, len(x)).to(x.device) if val_mask is not None else torch.zeros_like(train)
    if bool((train & val).any()):
        raise ValueError(
            f"expected train_mask and val_mask to be disjoint, got {int((train & val).sum())} common nodes"
        )
    if not bool(train.any()):
        raise ValueError("expected at least one training node, got none")
    y = torch.where(train | val, y.to(x.device).long(), -1)
    if int(y[train | val].min()) < 0:
        raise ValueError(f"expected labels from 0 upwards, got {int(y[train | val].min())}")
    num_classes = int(y.max()) + 1
    absent = sorted(set(range(num_classes)) - set(y[train].tolist()))
    if absent:
        raise ValueError(f"expected a training node of every class, got none of class {absent[0]}")
    if num_classes < 2:
        raise ValueError("expected two classes or more, got one")
    return NodeGraph(x.detach(), check_edges(edge_index, len(x)).to(x.device), y, train, val), num_classes


def as_mask(name: str, mask: Any, num_nodes: int) -> Tensor:
    """A bool mask `[N]` from a mask of any type, or from indices."""
    if mask is None:
        raise TypeError(f"expected {name} to be a mask or indices, got None")
    mask = torch.as_tensor(mask)
    if mask.dtype == torch.bool or mask.is_floating_point() or (mask.shape == (num_nodes,) and int(mask.max()) <= 1):
        if mask.shape != (num_nodes,) or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"expected {name} to be a mask [{num_nodes}] of 0 and 1, got shape {tuple(mask.shape)}")
        return mask.bool()
    if mask.dim() != 1 or (len(mask) and not 0 <= int(mask.min()) <= int(mask.max()) < num_nodes):
        raise ValueError(f"expected {name} to be a mask or indices from 0 to {num_nodes - 1}")
    return torch.zeros(num_nodes, dtype=torch.bool, device=mask.device).index_fill(0, mask.long(), True)
