"""What evidence is made of: scores, memory, operations, time, curvature, gradients, similarity."""

from torchfolio.measure.cost import Alternation, alternate, count_flops, flops_by_module
from torchfolio.measure.curvature import Eigen, hessian_eigenvalues, hessian_product, hutchinson_trace, hvp, lanczos
from torchfolio.measure.gradients import (
    Agreement,
    gradient_agreement,
    gradient_dict,
    per_example_gradients,
    per_example_losses,
)
from torchfolio.measure.memory import SavedBytes, saved_bytes
from torchfolio.measure.moments import StreamingMoments
from torchfolio.measure.scores import accuracy, auroc, calibration_error, linear_probe
from torchfolio.measure.similarity import cka_from_kernels, linear_cka, rbf_cka

__all__ = [
    "Agreement",
    "Alternation",
    "Eigen",
    "SavedBytes",
    "StreamingMoments",
    "accuracy",
    "alternate",
    "auroc",
    "calibration_error",
    "cka_from_kernels",
    "count_flops",
    "flops_by_module",
    "gradient_agreement",
    "gradient_dict",
    "hessian_eigenvalues",
    "hessian_product",
    "hutchinson_trace",
    "hvp",
    "lanczos",
    "linear_cka",
    "linear_probe",
    "per_example_gradients",
    "per_example_losses",
    "rbf_cka",
    "saved_bytes",
]
