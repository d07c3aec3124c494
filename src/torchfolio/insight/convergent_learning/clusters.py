"""Many to many: groups of units, of both networks, that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchfolio.insight.convergent_learning.statistics import CorrelationBlocks
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Clusters(Shown):
    """Clusters of the units of two layers.

    Attributes:
        labels_a: cluster of every unit of the first layer, `[S_1]`; -1 for dead units.
        labels_b: labels of the second, `[S_2]`.
        order: living units of both layers (those of the second counted on from $S_1$) so that clusters stand side
            by side and the correlation matrix becomes block diagonal.
        affinity: $|C|$ of all units with a zero diagonal, `[S_1 + S_2, S_1 + S_2]`; NaN for dead units.
        tree: merges of the hierarchical variant, as `scipy.cluster.hierarchy` has them, over living units; else
            `None`.
    """

    labels_a: Tensor
    labels_b: Tensor
    order: Tensor
    affinity: Tensor
    tree: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Of all units, `[S_1 + S_2]`."""
        return torch.cat([self.labels_a, self.labels_b])

    @property
    def mixed(self) -> float:
        """Share of the clusters of two units or more that hold units of both layers; NaN if there are none."""
        sizes = self.to_frame()[["size_a", "size_b"]].to_numpy()
        sizes = sizes[sizes.sum(1) >= 2]
        return float((sizes > 0).all(1).mean()) if len(sizes) else float("nan")

    def contrast(self, seed: int | None = None) -> float:
        """Mean $|c|$ of pairs of units in one cluster over that of pairs in two.

        Args:
            seed: gives the units the labels of others at random first, the figure to compare with.
        """
        alive = self.labels >= 0
        labels = self.labels[alive]
        if seed is not None:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
        affinity = self.affinity[alive][:, alive]
        same = labels[:, None] == labels
        other = ~same
        same = same & ~torch.eye(len(labels), dtype=torch.bool)
        return float(affinity[same].mean() / affinity[other].mean())

    def to_frame(self) -> pd.DataFrame:
        """A row for every cluster: `cluster`, `size_a`, `size_b` and mean $|c|$ `inside`."""
        import pandas as pd

        rows = []
        for k in range(int(self.labels.max()) + 1):
            members = (self.labels == k).nonzero()[:, 0]
            block = self.affinity[members][:, members]
            pairs = len(members) * (len(members) - 1)
            sizes = int((self.labels_a == k).sum()), int((self.labels_b == k).sum())
            inside = float(block.sum() / pairs) if pairs else float("nan")
            rows.append({"cluster": k, "size_a": sizes[0], "size_b": sizes[1], "inside": inside})
        return pd.DataFrame(rows)


def spectral_clusters(
    blocks: CorrelationBlocks, n_clusters: int | None = None, random_state: int = 0, hierarchical: bool = False
) -> Clusters:
    """Cluster the units of two layers together by their correlations.

    The affinity is $|C|$ over all units with a zero diagonal. The eigenvectors of the normalised Laplacian for the
    $K$ smallest eigenvalues, with rows scaled to length 1, are clustered by k-means, or hierarchically by average
    linkage.

    Args:
        blocks: correlations of the layers.
        n_clusters: $K$; a quarter of the living units by default, at least 2.
        random_state: seed of k-means.
        hierarchical: agglomerative clustering; `order` then follows the tree.

    Raises:
        ValueError: unless $2 \\le K \\le$ the number of living units.

    Reference:
        Li et al., ICLR 2016, section 5; Ng, Jordan, Weiss, "On Spectral Clustering", NIPS 2001.
    """
    alive = blocks.alive.nonzero()[:, 0]
    k = max(2, round(len(alive) / 4)) if n_clusters is None else n_clusters
    if not 2 <= k <= len(alive):
        raise ValueError(f"expected between 2 and {len(alive)} clusters, one for each living unit, got {k}")
    affinity = blocks.joint().abs()
    affinity[alive, alive] = 0
    embedding = _embedding(affinity[alive][:, alive], k)
    tree = None
    if hierarchical:
        from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

        merges = linkage(embedding.numpy(), method="average")
        clusters = torch.from_numpy(fcluster(merges, k, criterion="maxclust")).long() - 1
        position, tree = torch.from_numpy(leaves_list(merges)).long(), torch.from_numpy(merges)
    else:
        from sklearn.cluster import KMeans

        means = KMeans(k, n_init=10, random_state=random_state)  # pyright: ignore[reportArgumentType]
        clusters = torch.from_numpy(means.fit_predict(embedding.numpy())).long()
        position = clusters.argsort(stable=True)
    labels = torch.full((len(affinity),), -1)
    labels[alive] = clusters
    first = blocks.sizes[0]
    return Clusters(labels[:first], labels[first:], alive[position], affinity, tree)


def normalized_laplacian(affinity: Tensor) -> Tensor:
    """$L = I - D^{-1/2} W D^{-1/2}$ with the row sums $D$ of $W$; its smallest eigenvalue is 0.

    Args:
        affinity: symmetric $W \\ge 0$, `[S, S]`. A row of zeros, a unit like no other, stays isolated.
    """
    scale = affinity.sum(1).clamp_min(torch.finfo(affinity.dtype).tiny).rsqrt()
    return torch.eye(len(affinity), dtype=affinity.dtype) - scale[:, None] * affinity * scale


def _embedding(affinity: Tensor, k: int) -> Tensor:
    vectors = torch.linalg.eigh(normalized_laplacian(affinity)).eigenvectors[:, :k]
    return torch.nn.functional.normalize(vectors, dim=1)
