"""Fit a two-layer ReLU network to its global optimum, no learning rate to tune."""

from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from torchfolio.theory.convex_relu import ConvexReLUClassifier

X, y = load_breast_cancer(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
# Examples of norm 1 are what the solver's defaults are for; it warns where it has not converged, and says what helps.
model = make_pipeline(
    StandardScaler(), Normalizer(), ConvexReLUClassifier(n_patterns=30, beta=0.01, rho=0.01, tol=1e-3, random_state=0)
)
model.fit(X_train, y_train)
print("accuracy", model.score(X_test, y_test))
print("at the optimum:", model[-1].converged_, "after", model[-1].n_iter_, "steps")

robust = make_pipeline(
    StandardScaler(), ConvexReLUClassifier("cvxpy", n_patterns=6, beta=0.01, epsilon=0.1, random_state=0)
)
robust.fit(X_train[:200], y_train[:200])
print("trained against perturbations of 0.1:", robust.score(X_test, y_test))
print(robust[-1].to_module())
