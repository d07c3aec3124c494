# Written by docs/generate.py from the catalogue.
from torchfolio.layers.powernorm import NormMonitor as NormMonitor
from torchfolio.layers.powernorm import PowerNorm as PowerNorm
from torchfolio.layers.powernorm import PowerNormV as PowerNormV
from torchfolio.layers.powernorm import SequenceBatchNorm as SequenceBatchNorm
from torchfolio.layers.powernorm import convert_layernorm as convert_layernorm
from torchfolio.layers.powernorm import fold as fold
from torchfolio.layers.quadratic import QuadraticConv1d as QuadraticConv1d
from torchfolio.layers.quadratic import QuadraticConv2d as QuadraticConv2d
from torchfolio.layers.quadratic import QuadraticLinear as QuadraticLinear
from torchfolio.layers.quadratic import ReLinearShrink as ReLinearShrink
from torchfolio.layers.quadratic import functional_dimension as functional_dimension
from torchfolio.layers.quadratic import quadratic_strength as quadratic_strength
from torchfolio.layers.quadratic import relinear_param_groups as relinear_param_groups
from torchfolio.layers.quadratic import to_quadratic as to_quadratic
