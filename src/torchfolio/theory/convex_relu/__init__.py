"""Two-layer ReLU networks trained to their global optimum by convex programs.

Yatong Bai, Tanmay Gautam, Somayeh Sojoudi, "Efficient Global Optimization of Two-layer ReLU Networks: Quadratic-time
Algorithms and Adversarial Training", SIAM Journal on Mathematics of Data Science 2023,
https://arxiv.org/abs/2201.01965.

Training a network of one hidden ReLU layer with weight decay,

$$\\min_{u, \\alpha} \\ell\\Bigl(\\sum_j (X u_j)_+ \\alpha_j, y\\Bigr) + \\frac\\beta2 \\sum_j (\\|u_j\\|^2 + \\alpha_j^2),$$

is not convex. But a neuron meets $n$ examples in finitely many ways: its activation pattern
$D = \\operatorname{diag}(\\mathbb 1[Xa \\ge 0])$ says which it is active on. For a fixed pattern it is linear, and the
problem over all patterns $D_i$ is convex, with the same optimal value when there are neurons enough:

$$\\min_{v, w} \\ell\\Bigl(\\sum_i D_i X (v_i - w_i), y\\Bigr) + \\beta \\sum_i (\\|v_i\\|_2 + \\|w_i\\|_2)
\\quad\\text{s.t.}\\quad (2D_i - I) X v_i \\ge 0,\\; (2D_i - I) X w_i \\ge 0.$$

Every nonzero block is a neuron of the optimal network. There is no learning rate, and no initialisation to be
unlucky with. The number of patterns grows like $n^{\\operatorname{rank} X}$, so a random sample stands in for all of
them; the optimum is then that over networks with these patterns. In many dimensions a few dozen random patterns are
few: gradient descent, whose neurons choose their patterns, can fit the training data better than the sampled program
does. With all patterns it cannot.

Start with the estimators, `ConvexReLUClassifier` and `ConvexReLURegressor`. Their solvers are functions on tensors:

- `admm`: the program above for many patterns, by alternating directions;
- `sampled_convex_program`: a lasso over random neurons, simpler and approximate;
- `conic_program`: through CVXPY, exactly, and against bounded perturbations of the data.

Example:
    >>> import torch
    >>> X = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    >>> X = torch.cat([X, torch.ones_like(X)], 1)
    >>> y = torch.sin(3 * X[:, 0])
    >>> D = activation_patterns(X, "all")
    >>> solution = admm(X, y, D, beta=0.1, tol=1e-6)
    >>> value = nonconvex_objective(X, y, solution.hidden, solution.output, beta=0.1)
    >>> abs(float(value) - solution.objective) < 1e-4
    True
"""

from torchfolio.theory.convex_relu.admm import LinearSolver, admm
from torchfolio.theory.convex_relu.estimators import ConvexReLUClassifier, ConvexReLURegressor
from torchfolio.theory.convex_relu.patterns import activation_patterns, pattern_count_bound, patterns_needed
from torchfolio.theory.convex_relu.program import (
    Loss,
    Solution,
    convex_objective,
    data_loss,
    network_from_blocks,
    network_output,
    nonconvex_objective,
)
from torchfolio.theory.convex_relu.robust import Norm, conic_program
from torchfolio.theory.convex_relu.scp import sample_neurons, sampled_convex_program

__all__ = [
    "ConvexReLUClassifier",
    "ConvexReLURegressor",
    "LinearSolver",
    "Loss",
    "Norm",
    "Solution",
    "activation_patterns",
    "admm",
    "conic_program",
    "convex_objective",
    "data_loss",
    "network_from_blocks",
    "network_output",
    "nonconvex_objective",
    "pattern_count_bound",
    "patterns_needed",
    "sample_neurons",
    "sampled_convex_program",
]
