"""Symbolic regression by regularised evolution: formulas from data, or from a learned vector field."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from torchfolio.checks import one_of, whole
from torchfolio.dynamics.expressions import UNARY, Expression, Node, mutate, random_expression, without_one_operator

__all__ = ["Candidate", "SymbolicRegressor"]

PARSIMONY = 0.01  # relative weight of a node in tournaments
TOURNAMENT = 5
POLISHED = 0.2  # share of new members whose constants are fitted
SMALL = 5  # nodes up to which the constants of every new form are fitted, from several starts
STARTS = 3
EXACT = 1e-12  # of the targets' variance: a formula as good as this ends the search
AFTER_EXACT = 3  # rounds later, in which a simpler form may turn up


@dataclass(frozen=True)
class Candidate:
    """A formula that no simpler one beats.

    Attributes:
        expression: formula.
        complexity: number of its nodes.
        loss: mean squared error.
        score: fall of log(loss) a node since the next simpler candidate; 0 for the simplest.
    """

    expression: Expression
    complexity: int
    loss: float
    score: float


class SymbolicRegressor(RegressorMixin, BaseEstimator):
    """Search for a formula of few nodes that explains y by the columns of X.

    Populations of expression trees evolve. In each step the fittest of five random members is copied and changed, joins
    its population, and the oldest member leaves (regularised evolution). Constants of new members are fitted by damped
    Gauss-Newton steps, always and from several starts where a form is small and new: with wrong constants, a quotient
    has a pole and would be lost. After each round a good formula migrates to every second population, and the others start afresh. What is kept is the Pareto front of complexity and
    loss; the best formula is where the loss falls most per node.

    Args:
        populations: number of populations, at least 1.
        population_size: number of members of each, at least 5.
        rounds: number of rounds, at least 1.
        steps: number of new members of each population in a round, at least 1.
        unary: unary operators besides + - × ÷: of "sin", "cos", "tan", "tanh", "exp", "log", "sqrt", "abs", "square".
        max_size: maximum number of nodes, at least 1.
        descent: maximum number of steps when constants are fitted, at least 1.
        random_state: seed or generator.

    Attributes:
        pareto_: candidates `Candidate`, by rising complexity.
        expression_: best formula, as an `Expression`.
        best_: best formula, as a sympy expression in x0, x1, … or the names of the columns.
        n_features_in_: number of columns.

    Raises:
        ValueError: if a parameter is out of range, or data are empty, NaN or infinite.

    Reference:
        Kidger, arXiv 2202.02435, section 6.1; Real et al., arXiv 1802.01548 (regularised evolution); Cranmer et al.,
        arXiv 2006.11287.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).uniform(-0.5, 1, (100, 2))
    >>> SymbolicRegressor(populations=8, random_state=0).fit(X, 2 * X[:, 0] * X[:, 1]).best_
    2.0*x0*x1
    """

    def __init__(
        self,
        populations: int = 16,
        population_size: int = 20,
        rounds: int = 16,
        steps: int = 60,
        unary: Sequence[str] = (),
        max_size: int = 20,
        descent: int = 10,
        random_state: Any = None,
    ) -> None:
        self.populations = populations
        self.population_size = population_size
        self.rounds = rounds
        self.steps = steps
        self.unary = unary
        self.max_size = max_size
        self.descent = descent
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SymbolicRegressor:
        """Search.

        Args:
            X: data `[n, d]`.
            y: targets `[n]`.
        """
        for name, least in _PARAMETERS.items():
            whole(name, getattr(self, name), least)
        for name in self.unary:
            one_of("unary", name, UNARY)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        rng = random.Random(int(check_random_state(self.random_state).randint(2**31 - 1)))
        columns = list(np.ascontiguousarray(X.T))
        search = _Search(columns, np.asarray(y), tuple(self.unary), self.max_size, self.descent, rng)
        with np.errstate(all="ignore"):
            populations = [search.population(self.population_size) for _ in range(self.populations)]
            exact = 0
            for _ in range(self.rounds):
                for population in populations:
                    for _ in range(self.steps):
                        search.evolve(population)
                search.polish_front()
                exact += search.exact()
                if exact > AFTER_EXACT:
                    break
                front = search.front_members()
                for k, population in enumerate(populations):
                    if k % 2:
                        population.append(rng.choice(front))
                        population.popleft()
                    else:  # a population that has converged finds no other form; a fresh one may
                        population.extend(search.population(self.population_size))
                        for _ in range(self.population_size):
                            population.popleft()
        self.pareto_ = search.candidates()
        self.expression_ = max(self.pareto_, key=lambda candidate: candidate.score).expression
        names = getattr(self, "feature_names_in_", None)
        self.best_ = self.expression_.to_sympy(None if names is None else list(names))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Values of the best formula `[n]`; NaN where it is not defined."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with np.errstate(all="ignore"):
            value = self.expression_.evaluate(list(X.T))
        return np.broadcast_to(np.asarray(value, dtype=np.float64), (len(X),)).copy()


_PARAMETERS = {"populations": 1, "population_size": 5, "rounds": 1, "steps": 1, "max_size": 1, "descent": 1}


@dataclass(slots=True)
class _Member:
    nodes: tuple[Node, ...]
    loss: float

    @property
    def fitness(self) -> float:
        return self.loss * (1 + PARSIMONY * len(self.nodes))


def _loss(member: _Member) -> float:
    """Loss, infinite where it is no number."""
    return member.loss if math.isfinite(member.loss) else math.inf


class _Search:
    """Loss of trees on the data, their evolution, and the front of the best of every size."""

    def __init__(
        self,
        columns: list[np.ndarray],
        y: np.ndarray,
        unary: tuple[str, ...],
        max_size: int,
        descent: int,
        rng: random.Random,
    ) -> None:
        self.columns, self.y, self.unary, self.rng = columns, y, unary, rng
        self.max_size, self.descent = max_size, descent
        self.variance = float(np.var(y))
        self.front: dict[int, _Member] = {}
        self.forms: set[tuple[Node | None, ...]] = set()  # small ones whose constants were fitted
        self.consider(_Member((float(np.mean(y)),), self.variance))

    def residual(self, nodes: tuple[Node, ...], constants: Sequence[float] | None = None) -> np.ndarray:
        return Expression(nodes).evaluate(self.columns, constants) - self.y

    def member(self, nodes: Sequence[Node]) -> _Member:
        nodes = tuple(nodes)
        residual = self.residual(nodes)
        return _Member(nodes, float(residual @ residual) / len(residual))

    def consider(self, member: _Member) -> None:
        """Note a member if it is the best of its size."""
        best = self.front.get(len(member.nodes))
        if best is None or member.loss < best.loss:
            self.front[len(member.nodes)] = member

    def population(self, size: int) -> deque[_Member]:
        members: deque[_Member] = deque()
        while len(members) < size:
            member = self.member(random_expression(self.rng, len(self.columns), self.unary, min(5, self.max_size)))
            if math.isfinite(member.loss):
                members.append(member)
                self.consider(member)
        return members

    def evolve(self, population: deque[_Member]) -> None:
        """One step: a changed copy of a fit member joins, the oldest leaves."""
        rng = self.rng
        parent = min((rng.choice(population) for _ in range(TOURNAMENT)), key=lambda member: member.fitness)
        child = parent
        for _ in range(3):  # until one is finite and small enough
            nodes = mutate(parent.nodes, rng.choice(population).nodes, rng, len(self.columns), self.unary)
            if len(nodes) > self.max_size:
                continue
            bred = self.grown(self.member(nodes))
            if math.isfinite(bred.loss):
                child = bred
                break
        self.consider(child)
        population.append(child)
        population.popleft()

    def grown(self, member: _Member) -> _Member:
        """A new member, its constants fitted if it is small and of a new form, or by chance."""
        rng, form = self.rng, tuple(None if isinstance(node, float) else node for node in member.nodes)
        if len(form) > SMALL or None not in form or form in self.forms:
            lucky = math.isfinite(member.loss) and rng.random() < POLISHED
            return self.polished(member) if lucky else member
        self.forms.add(form)
        starts = [member]
        for k in range(1, STARTS):
            # All positive or all negative in turn: the pole of a quotient then lies on one side of most data.
            draws = [abs(rng.gauss(0, 2)) * (-1) ** k if node is None else node for node in form]
            starts.append(self.member(draws))
        return min((self.polished(start) for start in starts), key=_loss)

    def polished(self, member: _Member) -> _Member:
        """The member with constants fitted by Gauss-Newton steps, damped as Levenberg and Marquardt do."""
        constants = np.array([node for node in member.nodes if isinstance(node, float)])
        if not len(constants) or not math.isfinite(member.loss):
            return member
        residual, loss, damping = self.residual(member.nodes), member.loss, 1e-3
        for _ in range(self.descent):
            jacobian = np.empty((len(constants), len(self.y)))
            for i, width in enumerate(1e-6 * np.maximum(1, np.abs(constants))):
                moved = constants.copy()
                moved[i] += width
                jacobian[i] = (self.residual(member.nodes, moved.tolist()) - residual) / width
            gram, slope = jacobian @ jacobian.T, jacobian @ residual
            if not np.isfinite(gram).all():
                break
            before = loss
            for _ in range(9):  # the last one is a hundred-thousandth of the Newton step
                step = np.linalg.lstsq(gram + damping * np.diag(np.diag(gram) + 1e-12), slope, rcond=None)[0]
                tried = self.residual(member.nodes, (constants - step).tolist())
                mean = float(tried @ tried) / len(tried)
                if mean < loss:
                    constants, residual, loss, damping = constants - step, tried, mean, damping / 10
                    break
                damping *= 10
            if not loss < before * (1 - 1e-4):
                break
        return _Member(Expression(member.nodes).with_constants(constants.tolist()).nodes, loss)

    def polish_front(self) -> None:
        """Fit the constants of the front's members, and of those without one of their operators."""
        for member in self.front_members():
            self.consider(self.polished(member))
            for nodes in without_one_operator(member.nodes):
                polished = self.member(nodes)
                if math.isfinite(polished.loss):
                    self.consider(self.polished(polished))

    def front_members(self) -> list[_Member]:
        """Members that no simpler one beats, by rising size."""
        members, best = [], math.inf
        for _, member in sorted(self.front.items()):
            if member.loss < best:
                members.append(member)
                best = member.loss
        return members

    def exact(self) -> bool:
        return min(member.loss for member in self.front.values()) <= EXACT * self.variance

    def candidates(self) -> list[Candidate]:
        floor = max(EXACT * self.variance, 1e-300)
        result: list[Candidate] = []
        for member in self.front_members():
            score = 0.0
            if result:
                before = result[-1]
                fall = math.log(max(before.loss, floor) / max(member.loss, floor))
                score = fall / (len(member.nodes) - before.complexity)
            result.append(Candidate(Expression(member.nodes), len(member.nodes), member.loss, score))
        return result
