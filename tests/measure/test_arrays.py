"""Measures and analyses take NumPy arrays and short types as they take tensors."""

from __future__ import annotations

import pytest
import torch

from torchfolio import measure
from torchfolio.insight.decisions import argmax_decision, rational_choice
from torchfolio.insight.representation_geometry import participation_ratio
from torchfolio.insight.utility_probability import regret_bounds

GENERATOR = torch.Generator().manual_seed(0)
Z, W, LOGITS = (torch.randn(40, width, generator=GENERATOR) for width in (6, 5, 4))
Y = torch.randint(4, (40,), generator=GENERATOR)
CHANCES = LOGITS.softmax(1)

CALLS = {
    "linear_cka": (measure.linear_cka, (Z, W)),
    "rbf_cka": (measure.rbf_cka, (Z, W)),
    "rsa": (measure.rsa, (Z, W)),
    "hsic": (measure.hsic, (Z @ Z.T, W @ W.T)),
    "cka_from_kernels": (measure.cka_from_kernels, (Z @ Z.T, W @ W.T)),
    "StreamingCKA": (lambda x, y: measure.StreamingCKA().update(x, y).compute(), (Z, W)),
    "accuracy": (measure.accuracy, (LOGITS, Y)),
    "calibration_error": (measure.calibration_error, (CHANCES, Y)),
    "auroc": (measure.auroc, (Z[:, 0], Y > 1)),
    "roc_curve": (lambda scores, positive: measure.roc_curve(scores, positive)[1], (Z[:, 0], Y > 1)),
    "threshold_at_fpr": (lambda scores: measure.threshold_at_fpr(scores, 0.1), (Z[:, 0],)),
    "tpr_at_fpr": (lambda scores, positive: measure.tpr_at_fpr(scores, positive, 0.1), (Z[:, 0], Y > 1)),
    "linear_probe": (lambda x, y: measure.linear_probe(x, y, x, y), (Z, Y)),
    "knn_accuracy": (lambda x, y: measure.knn_accuracy(x, y, x, y, k=5), (Z, Y)),
    "retrieval": (lambda x, y: measure.retrieval(x, y, x, y, exclude_self=True), (Z, Y)),
    "participation_ratio": (participation_ratio, (Z,)),
    "rational_choice": (rational_choice, (LOGITS,)),
    "argmax_decision": (argmax_decision, (LOGITS,)),
    "regret_bounds": (lambda logits, y: regret_bounds(logits, y)[1], (LOGITS, Y)),
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_short_types(name):
    call, tensors = CALLS[name]
    wanted = torch.as_tensor(call(*tensors)).double()
    torch.testing.assert_close(torch.as_tensor(call(*(t.numpy() for t in tensors))).double(), wanted)
    short = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
    rounded = torch.as_tensor(call(*short)).double()
    assert rounded.shape == wanted.shape
    assert (rounded - wanted).abs().max() < (0.5 if name == "regret_bounds" else 0.1 * (1 + wanted.abs().max()))


def test_whole_numbers_are_scores_and_utilities_too():
    scores = (4 * Z[:, 0]).long()
    rates = measure.roc_curve(scores, Y > 1)
    torch.testing.assert_close(rates, measure.roc_curve(scores.double(), Y > 1))
    whole = LOGITS.round().long()
    torch.testing.assert_close(regret_bounds(whole, Y), regret_bounds(whole.float(), Y), check_dtype=False)
    with pytest.raises(ValueError, match="got none"):
        participation_ratio(Z[:0])
