"""FinalMLP, for click-through prediction: the network of two streams, and the estimator on tables around it.

Reference:
    Mao et al., FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction, AAAI 2023 (arXiv 2304.00902), Section 3.
"""

from torchfolio.applications.click_estimator import FinalMLPClassifier
from torchfolio.applications.two_stream import BilinearFusion, DualMLP, FeatureGating, FieldEmbedding, FinalMLP, Multi

__all__ = ["BilinearFusion", "DualMLP", "FeatureGating", "FieldEmbedding", "FinalMLP", "FinalMLPClassifier", "Multi"]
