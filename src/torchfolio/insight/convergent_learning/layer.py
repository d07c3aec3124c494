"""One layer of each of two networks, compared in every way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchfolio.insight.convergent_learning.clusters import Clusters, spectral_clusters
from torchfolio.insight.convergent_learning.matching import Match, bipartite_match, semi_match
from torchfolio.insight.convergent_learning.prediction import ALPHAS, SparsePrediction, sparse_prediction
from torchfolio.insight.convergent_learning.statistics import CorrelationBlocks

__all__ = ["LayerConvergence"]


@dataclass(frozen=True)
class LayerConvergence:
    """One layer of each network, compared.

    Attributes:
        layer_a: name in the first network.
        layer_b: name in the second.
        blocks: their correlations.
        match: one-to-one matching.
        semi: best partner in the second network of every unit of the first.
        prediction: prediction of the second network's units from the first's.
        clusters: clusters of the units of both.
    """

    layer_a: str
    layer_b: str
    blocks: CorrelationBlocks
    match: Match
    semi: Match
    prediction: SparsePrediction
    clusters: Clusters

    @classmethod
    def from_blocks(
        cls,
        layer_a: str,
        layer_b: str,
        blocks: CorrelationBlocks,
        *,
        absolute: bool = False,
        alphas: Sequence[float] = ALPHAS,
        n_clusters: int | None = None,
        random_state: int = 0,
    ) -> LayerConvergence:
        """Match, predict and cluster; see `ConvergenceReport.from_modules` for the arguments."""
        return cls(
            layer_a,
            layer_b,
            blocks,
            bipartite_match(blocks.between, absolute),
            semi_match(blocks.between, absolute),
            sparse_prediction(blocks, alphas),
            spectral_clusters(blocks, n_clusters, random_state),
        )

    @property
    def one_to_one_loss(self) -> float:
        """Loss of predicting every matched unit by its match alone, $\\tfrac12 (1 - c^2)$."""
        return float((0.5 * (1 - self.match.value.square())).mean())

    def summary(self) -> dict[str, float | int | str]:
        """The row of this layer in `ConvergenceReport.to_frame`."""
        curve = self.prediction.curve()
        sizes, dead = self.blocks.sizes, self.blocks.dead
        return {
            "layer_a": self.layer_a,
            "layer_b": self.layer_b,
            "samples": self.blocks.count,
            "units_a": sizes[0],
            "units_b": sizes[1],
            "dead_a": dead[0],
            "dead_b": dead[1],
            "bipartite": self.match.mean,
            "semi": self.semi.mean,
            "above_half": self.match.above(0.5),
            "shared": self.semi.shared,
            "one_to_one_loss": self.one_to_one_loss,
            "dense_loss": float(curve["loss"].iloc[0]),
            "sparse_loss": float(curve["loss"].iloc[-1]),
            "sparse_units": float(curve["nonzeros"].iloc[-1]),
            "few_units": self.prediction.fewest(),
            "clusters": int(self.clusters.labels.max()) + 1,
            "mixed_clusters": self.clusters.mixed,
            "contrast": self.clusters.contrast(),
            "random_contrast": self.clusters.contrast(seed=0),
        }
