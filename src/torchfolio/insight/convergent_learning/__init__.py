"""Convergent learning: which units of two networks are the same feature?

Yixuan Li, Jason Yosinski, Jeff Clune, Hod Lipson, John Hopcroft, "Convergent Learning: Do different neural networks
learn the same representations?", ICLR 2016, https://arxiv.org/abs/1511.07543.

Measures such as CKA say *how alike* two layers are. This analysis says *which units* correspond, from the correlations
$c_{ij}$ between unit $i$ of one network and unit $j$ of the other over the same examples, in three steps of growing
freedom:

1. **one to one** (`bipartite_match`, `semi_match`): a permutation $\\pi$ that maximises $\\sum_i c_{i,\\pi(i)}$, against
   the best partner of every unit whoever else has it;
2. **few to one** (`sparse_prediction`): every unit of one network as a sparse linear combination of units of the other;
3. **many to many** (`spectral_clusters`): groups of units, of both networks, that span a common subspace.

All three need only means and correlations, which one pass over the data collects. `ConvergenceReport.from_modules` does
everything for several layers of two networks; the functions below it work on activations of any origin.

Example:
    >>> report = ConvergenceReport.from_modules(net, other, probe, layers=["layer1", "layer2"])
    >>> report.to_frame()
    >>> report.plot().savefig("convergence.png")
"""

from torchfolio.insight.convergent_learning.clusters import Clusters, normalized_laplacian, spectral_clusters
from torchfolio.insight.convergent_learning.information import mi_matrix, mutual_information
from torchfolio.insight.convergent_learning.layer import LayerConvergence
from torchfolio.insight.convergent_learning.matching import Match, bipartite_match, semi_match
from torchfolio.insight.convergent_learning.pictures import plot_filter_pairs
from torchfolio.insight.convergent_learning.prediction import SparsePrediction, sparse_prediction
from torchfolio.insight.convergent_learning.report import ConvergenceReport
from torchfolio.insight.convergent_learning.statistics import (
    ActivationStatistics,
    CorrelationBlocks,
    PairStatistics,
    correlation_blocks,
)

__all__ = [
    "ActivationStatistics",
    "Clusters",
    "ConvergenceReport",
    "CorrelationBlocks",
    "LayerConvergence",
    "Match",
    "PairStatistics",
    "SparsePrediction",
    "bipartite_match",
    "correlation_blocks",
    "mi_matrix",
    "mutual_information",
    "normalized_laplacian",
    "plot_filter_pairs",
    "semi_match",
    "sparse_prediction",
    "spectral_clusters",
]
