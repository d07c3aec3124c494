"""Times of a method beside what a user would take in its place."""

from __future__ import annotations

from typing import Any

from torchfolio.errors import TorchfolioError
from torchfolio.measure import Alternation, alternate
from torchfolio.runs.environment import threads
from torchfolio.runs.runner import Say, experiment


class Bench:
    """What an experiment's `peers` is given.

    Attributes:
        times: of every comparison, by the work that was done.
    """

    def __init__(self, say: Say = lambda text: None) -> None:
        self.say = say
        self.times: dict[str, Alternation] = {}

    def compare(self, work: str, *, repeats: int = 7, **callables: Any) -> Alternation:
        """Time callables that do the same work, in alternation.

        Args:
            work: what is done, with its size, such as `"fit, 2,000 x 30"`.
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


def bench(slug: str, *, num_threads: int = 1, say: Say = lambda text: None) -> Bench:
    """Time a method against its peers.

    Args:
        slug: of the paper.
        num_threads: that torch and the linear algebra may use.
        say: called with a line about what is going on.

    Raises:
        TorchfolioError: if its experiment names no peers.
    """
    module: Any = experiment(slug)
    if not hasattr(module, "peers"):
        raise TorchfolioError(f"the experiment of {slug} names no peers to time it against")
    timed = Bench(say)
    with threads(num_threads):
        module.peers(timed)
    return timed
