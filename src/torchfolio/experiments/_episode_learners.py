"""Memory networks that learn within episodes, their slow training, and their scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.engine import Backprop
from torchfolio.engine.recipes import adam
from torchfolio.experiments._blind_feedback import FEEDBACK, blindfold
from torchfolio.experiments._episode_tasks import CLASSES, TASKS, Episodes, scores_by_position
from torchfolio.experiments._lstm_learner import LSTMLearner, sequence_loss
from torchfolio.runs import Run
from torchfolio.training.fast_slow_memory import FastSlowMemoryNetwork, FastSlowTraining, FeedbackPath

__all__ = ["TEST_SEED", "EpisodeLearners"]

TEST_SEED = 10**6


class EpisodeLearners:
    """Networks and trainings of one seed; training and test episodes come from other streams."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings = run, run.settings

    def network(self, task: str, kind: str = "fast", feedback: FeedbackPath | None = None) -> FastSlowMemoryNetwork:
        """A network for a task: `fast`, `slow`, `blind`, `sealed` or `unregressed`; slow weights start alike."""
        h, (inputs, out) = self.settings.hidden, CLASSES.get(task, (1, 1))
        encoder = nn.Sequential(nn.Linear(inputs, h), nn.ReLU(), nn.Linear(h, h), nn.Tanh())
        net = FastSlowMemoryNetwork(
            encoder, out, task="classification" if task in CLASSES else "regression", hidden=h, fast=kind != "slow",
            feedback=feedback, lambda_sg=0.0 if kind == "unregressed" else 0.1,
        )  # fmt: skip
        if kind in FEEDBACK:
            blindfold(net, kind)
        return net

    def train(self, net: nn.Module, tasks: list[str], steps: int, callbacks: tuple[Any, ...] = ()) -> None:
        """Slow training, on a sequence of fresh episodes."""
        n = steps * self.settings.batch_size
        data = [v for k, task in enumerate(tasks) for v in TASKS[task](n, 2 * self.run.seed + 1 + 7919 * k)]
        self.learn(net, tuple(data), callbacks)

    def learn(self, net: nn.Module, data: tuple[Tensor, ...], callbacks: tuple[Any, ...] = ()) -> None:
        """One pass over episodes."""
        s, rule = self.settings, FastSlowTraining()
        if isinstance(net, LSTMLearner):  # an input, the target as an input, and the target
            data, rule = (*data, data[-1]), Backprop(sequence_loss)
        how = {"rule": rule, "optimizer": adam(s.lr), "batch_size": s.batch_size, "clip_norm": 5.0}
        self.run.fit(net, data, callbacks=callbacks, **how)

    def scores(self, net: nn.Module, task: str, data: Episodes | None = None) -> dict[str, Any]:
        """Squared errors or accuracies (%) by position in fixed episodes."""
        x, y = data or TASKS[task](self.settings.test, TEST_SEED)
        with torch.no_grad():
            output = net(x.to(self.run.device), y.to(self.run.device)).cpu()
        return scores_by_position(output, y, rare=task == "rare")
