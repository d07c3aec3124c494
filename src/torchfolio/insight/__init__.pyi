# Written by docs/generate.py from the catalogue.
from torchfolio.insight.adaptive_mi import AdaptiveBinning as AdaptiveBinning
from torchfolio.insight.adaptive_mi import AdaptiveKDE as AdaptiveKDE
from torchfolio.insight.adaptive_mi import FixedBinning as FixedBinning
from torchfolio.insight.adaptive_mi import InformationPlaneRecorder as InformationPlaneRecorder
from torchfolio.insight.adaptive_mi import information_plane as information_plane
from torchfolio.insight.circuit_diagrams import draw as draw
from torchfolio.insight.circuit_diagrams import ncd as ncd
from torchfolio.insight.convergent_learning import ConvergenceReport as ConvergenceReport
from torchfolio.insight.convergent_learning import bipartite_match as bipartite_match
from torchfolio.insight.convergent_learning import semi_match as semi_match
from torchfolio.insight.double_descent import RandomFeatureRegressor as RandomFeatureRegressor
from torchfolio.insight.double_descent import RandomFeatures as RandomFeatures
from torchfolio.insight.double_descent import capacity_sweep as capacity_sweep
from torchfolio.insight.double_descent import compare as compare
from torchfolio.insight.double_descent import gradient_descent_path as gradient_descent_path
from torchfolio.insight.double_descent import peak as peak
