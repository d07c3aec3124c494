"""Surgery on a user's network: replacing layers, reading inner features, grouping parameters."""

from torchfolio.models.features import Feature, Features, Flatten, collect_features, flatten_features, take_features
from torchfolio.models.grouping import parameter_groups
from torchfolio.models.replacement import Predicate, replace_layers

__all__ = [
    "Feature", "Features", "Flatten", "Predicate", "collect_features", "flatten_features", "parameter_groups", "replace_layers",
    "take_features",
]  # fmt: skip
