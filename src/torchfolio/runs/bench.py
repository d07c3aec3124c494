"""Times of a method beside what a user would take in its place."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torchfolio import catalog
from torchfolio.errors import TorchfolioError
from torchfolio.measure import Alternation, alternate
from torchfolio.runs.environment import threads
from torchfolio.runs.job import Say

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from torchfolio.engine import LearningRule
    from torchfolio.engine.recipes import OptimizerFactory


class Bench:
    """What `peers` of a module `torchfolio.peers.SLUG` is given.

    Attributes:
        times: times of every comparison, by the work that was done.
    """

    def __init__(self, say: Say = lambda text: None) -> None:
        self.say = say
        self.times: dict[str, Alternation] = {}

    def compare(self, work: str, *, repeats: int = 7, **callables: Any) -> Alternation:
        """Time callables that do the same work, in alternation.

        Args:
            work: name of what is done, with its size, such as `"fit, 2,000 x 30"`.
            repeats: rounds.
            **callables: functions without arguments: ours first, then the peers, by name.
        """
        self.say(work)
        self.times[work] = alternate(repeats=repeats, **callables)
        return self.times[work]

    def ratios(self) -> dict[str, dict[str, float]]:
        """A peer's time over ours, by work and peer: above 1 where ours is faster."""
        return {
            work: {name: times.ratio(name) for name in times.seconds if name != times.reference}
            for work, times in self.times.items()
        }


def training_step(
    net: nn.Module,
    batch: Sequence[Tensor],
    rule: LearningRule | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
) -> Callable[[], None]:
    """A step of training on one batch, as a function to time.

    Args:
        net: network, trained in place.
        batch: inputs and targets.
        rule: learning rule; backprop by default.
        optimizer: optimizer, or what makes one from the trained parameters; SGD with momentum by default.
    """
    from torch import Tensor

    from torchfolio.engine import Backprop
    from torchfolio.engine.recipes import sgd
    from torchfolio.engine.setup import make_optimizer

    rule = Backprop() if rule is None else rule
    module = rule.prepare(net, batch).train()
    factory = sgd(1e-3, nesterov=False) if optimizer is None else optimizer
    stepper = make_optimizer(factory, {name: p for name, p in module.named_parameters() if p.requires_grad})
    rule.configure(stepper, None)

    def step() -> None:
        stepper.zero_grad()
        rule.step(batch, Tensor.backward)
        stepper.step()

    return step


def bench(slug: str, *, num_threads: int = 1, say: Say = lambda text: None) -> Bench:
    """Time a method against its peers.

    Args:
        slug: slug of the paper.
        num_threads: number of threads that torch and the linear algebra may use.
        say: function that is called with a line about what is going on.

    Raises:
        TorchfolioError: if the paper is unknown, or names no peers.
    """
    catalog.paper(slug)
    name = f"torchfolio.peers.{slug}"
    if importlib.util.find_spec(name) is None:
        raise TorchfolioError(f"{slug} names no peers to time it against")
    timed = Bench(say)
    with threads(num_threads):
        importlib.import_module(name).peers(timed)
    return timed
