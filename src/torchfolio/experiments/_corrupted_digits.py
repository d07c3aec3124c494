"""Sparse processes as classifiers of digits, clean and corrupted by noise of two kinds."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchfolio.runs import Run
from torchfolio.theory.nngp_scale_mixture import NNGPKernel, SparseStudentTClassifier

CORRUPTIONS = ("clean", "gaussian", "impulse")


def classify(run: Run[Any], prior: Any) -> dict[str, float]:
    """Accuracy and negative log likelihood on clean and corrupted digits; nothing is chosen on them."""
    settings = run.settings
    splits = run.data("digits", normalize=False, val=0, train_size=settings.digits)
    (X, y), (X_test, y_test) = (
        (part.tensors[0].flatten(1).double().numpy(), part.tensors[1].numpy()) for part in (splits.train, splits.test)
    )
    top = X.max()
    X, X_test = X / top, X_test / top
    model = SparseStudentTClassifier(
        NNGPKernel(settings.depth),
        n_inducing=settings.inducing,
        prior=prior,
        epochs=settings.epochs,
        random_state=run.seed,
    ).fit(X, y)
    generator = np.random.default_rng(run.seed)
    noisy = X_test + 0.4 * generator.normal(size=X_test.shape)
    replaced = generator.random(X_test.shape) < 0.3
    impulse = np.where(replaced, generator.integers(0, 2, X_test.shape), X_test)
    scores = {}
    for name, inputs in zip(CORRUPTIONS, (X_test, noisy, impulse), strict=True):
        p = model.predict_proba(inputs)
        scores[f"{name}_accuracy"] = float((p.argmax(1) == y_test).mean())
        scores[f"{name}_nll"] = float(-np.log(p[np.arange(len(p)), y_test].clip(1e-12)).mean())
    return scores
