# Written by docs/generate.py from the catalogue.
from torchfolio.applications.final_mlp import BilinearFusion as BilinearFusion
from torchfolio.applications.final_mlp import DualMLP as DualMLP
from torchfolio.applications.final_mlp import FeatureGating as FeatureGating
from torchfolio.applications.final_mlp import FieldEmbedding as FieldEmbedding
from torchfolio.applications.final_mlp import FinalMLP as FinalMLP
from torchfolio.applications.final_mlp import FinalMLPClassifier as FinalMLPClassifier
from torchfolio.applications.final_mlp import Multi as Multi
