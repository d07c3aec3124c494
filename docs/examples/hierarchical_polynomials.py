"""Learn a function of one hidden polynomial feature, and see that the feature was found."""

from torchfolio.theory.hierarchical_polynomials import (
    HierarchicalPolynomial,
    LayerwiseThreeLayerRegressor,
    feature_recovery,
)

# A sum of products of two coordinates, turned by a random rotation, under a quadratic link.
target = HierarchicalPolynomial(16, family="sum_of_monomials", seed=1)
X, y = target.sample(3000, noise=0.05)
X_test, y_test = target.sample(2000, seed=1)

model = LayerwiseThreeLayerRegressor(m1=200, m2=600, random_state=0).fit(X.numpy(), y.numpy())
print("R² of the network", model.score(X_test.numpy(), y_test.numpy()))

recovery = feature_recovery(model, target, X_test)
print("correlation with the hidden polynomial", recovery.correlation, "at most", target.recovery_limit())

# What was learned is a plain network of float64 weights, to save, to fine-tune or to look into.
print(model.module_(X_test[:3]), y_test[:3])
