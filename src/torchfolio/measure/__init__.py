"""What evidence is made of: scores, memory, operations, time, curvature, gradients, similarity."""

from torchfolio.measure.analysis import Analysis, Panel
from torchfolio.measure.curvature import hessian_eigenvalues
from torchfolio.measure.flops import count_flops, flops_by_module
from torchfolio.measure.gradients import (
    Agreement,
    gradient_agreement,
    gradient_dict,
    loss_gradients,
    per_example_gradients,
    per_example_losses,
)
from torchfolio.measure.hessian import Hessian, hvp
from torchfolio.measure.krylov import Eigen, lanczos
from torchfolio.measure.memory import SavedBytes, saved_bytes
from torchfolio.measure.moments import StreamingMoments
from torchfolio.measure.outputs import outputs
from torchfolio.measure.probes import Retrieval, knn_accuracy, linear_probe, retrieval
from torchfolio.measure.scores import accuracy, auroc, calibration_error, roc_curve, threshold_at_fpr, tpr_at_fpr
from torchfolio.measure.similarity import (
    StreamingCKA,
    cka_from_kernels,
    hsic,
    linear_cka,
    linear_cka_pairs,
    rbf_cka,
    rsa,
)
from torchfolio.measure.timing import Alternation, alternate, timed
from torchfolio.measure.trace_estimates import Trace, hessian_traces, hutchinson_trace
from torchfolio.measure.uncertainty import Interval, bootstrap_interval, confidence_interval, standard_error
from torchfolio.measure.untouched import untouched

__all__ = [
    "Agreement",
    "Alternation",
    "Analysis",
    "Eigen",
    "Hessian",
    "Interval",
    "Panel",
    "Retrieval",
    "SavedBytes",
    "StreamingCKA",
    "StreamingMoments",
    "Trace",
    "accuracy",
    "alternate",
    "auroc",
    "bootstrap_interval",
    "calibration_error",
    "cka_from_kernels",
    "confidence_interval",
    "count_flops",
    "flops_by_module",
    "gradient_agreement",
    "gradient_dict",
    "hessian_eigenvalues",
    "hessian_traces",
    "hsic",
    "hutchinson_trace",
    "hvp",
    "knn_accuracy",
    "lanczos",
    "linear_cka",
    "linear_cka_pairs",
    "linear_probe",
    "loss_gradients",
    "outputs",
    "per_example_gradients",
    "per_example_losses",
    "rbf_cka",
    "retrieval",
    "roc_curve",
    "rsa",
    "saved_bytes",
    "standard_error",
    "threshold_at_fpr",
    "timed",
    "tpr_at_fpr",
    "untouched",
]
