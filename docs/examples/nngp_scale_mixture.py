"""Predict with an infinitely wide network that is honest about few points and outliers, and start finite ones alike."""

import numpy as np
import torch
from sklearn.datasets import load_wine
from torch import nn

from torchfolio.theory import (
    Burr12,
    NNGPKernel,
    ScaleMixtureRegressor,
    SparseStudentTClassifier,
    StudentTProcessRegressor,
    scale_mixture_init_,
)

X, y = load_wine(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
alcohol, others = X[:, 0], X[:, 1:]
for prior in ("inverse_gamma", "fixed"):
    model = StudentTProcessRegressor(NNGPKernel(2, "erf"), prior=prior, steps=30, lr=0.05).fit(
        others[::6], alcohol[::6]
    )
    predictive = model.predict(others[1::6], return_dist=True)
    print(prior, "log likelihood", float(predictive.log_prob(torch.from_numpy(alcohol[1::6])).mean()))
print("central 90 %:", float(predictive.quantile(0.05)[0]), "to", float(predictive.quantile(0.95)[0]))

heavy = ScaleMixtureRegressor(NNGPKernel(2), prior=Burr12(2.0, 1.0)).fit(others[::6], alcohol[::6])
print("Burr prior, evidence", heavy.log_marginal_likelihood_)

classifier = SparseStudentTClassifier(NNGPKernel(1), n_inducing=20, epochs=20, lr=0.05, random_state=0).fit(
    X[::2], y[::2]
)
print("classes", classifier.score(X[1::2], y[1::2]), np.round(classifier.predict_proba(X[1:2]), 2))

network = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 3))
print("variance of the last layer", scale_mixture_init_(network[-1], generator=torch.Generator().manual_seed(0)))
