"""Measures memory networks with and without a fast path on functions and classes that are new in every episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from torchfolio.engine import StepRecorder
from torchfolio.experiments._episode_learners import TEST_SEED, EpisodeLearners
from torchfolio.experiments._episode_tasks import CLASSES
from torchfolio.experiments._lstm_learner import LSTMLearner
from torchfolio.measure import timed
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.training.meta_episodes import class_episodes


@dataclass(frozen=True)
class Settings:
    """Sizes and budget."""

    steps: int = setting(600, "slow steps on sines and prototypes, with a rare class too")
    share_steps: int = setting(150, "number of steps of the networks that share a feedback path, or not")
    reuse_steps: int = setting(200, "number of steps of the third network")
    further: int = setting(
        0, "steps of the arms that no claim is about: LSTM, no regression of gradients, digits; 0 leaves them out"
    )
    batch_size: int = setting(32, "episodes of a step")
    lr: float = setting(2e-3, "learning rate of Adam")
    hidden: int = setting(40, "width of codes and hidden layer")
    test: int = setting(300, "fixed episodes to test on")


SCALES = {
    "smoke": Settings(steps=3, share_steps=2, reuse_steps=2, further=1, test=20),
    "quick": Settings(),
    "full": Settings(steps=2000, share_steps=2000, reuse_steps=200, further=2000),
}


class Study(EpisodeLearners):
    """The arms of one seed."""

    def single(self, task: str, kind: str, steps: int) -> dict[str, Any]:
        """One network on one task, with its error or accuracy as training goes on."""
        inputs, out = CLASSES.get(task, (1, 1))
        net = LSTMLearner(inputs, out, 64) if kind == "lstm" else self.network(task, kind)
        course = StepRecorder({"last": lambda state: self.scores(net, task)["last"]}, every=max(1, steps // 6))
        _, seconds = timed(self.train, net, [task], steps, (course,))
        curve = [row["last"] for row in course.rows if row["step"]]
        return {**self.scores(net, task), "curve": curve, "milliseconds": 1000 * seconds / steps}

    def pair(self, shared: bool) -> dict[str, Any]:
        """Networks for sines and kinks with one feedback path or two; the shared one then serves a third, frozen."""
        s, first = self.settings, self.network("sines")
        both = nn.ModuleList([first, self.network("kinks", feedback=first.feedback if shared else None)])
        self.train(both, ["sines", "kinks"], s.share_steps)
        scores = {task: self.scores(net, task)["last"] for net, task in zip(both, ("sines", "kinks"), strict=True)}
        if shared:
            assert first.feedback is not None
            third = self.network("soft_steps", feedback=first.feedback.requires_grad_(False))
            self.train(third, ["soft_steps"], s.reuse_steps)
            scores["soft_steps"] = self.scores(third, "soft_steps")["last"]
        return scores

    def digits(self, kind: str, data: Any, steps: int) -> dict[str, Any]:
        """Four classes of digits 6 to 9, after training on episodes of digits 0 to 5."""
        net, (x, y) = self.network("digits", kind), data.train.tensors
        x, old = x.flatten(1), y < 6
        n = steps * self.settings.batch_size
        self.learn(net, class_episodes(x[old], y[old], 4, 5, episodes=n, seed=2 * self.run.seed + 1))
        new = class_episodes(x[~old], y[~old], 4, 5, episodes=self.settings.test, seed=TEST_SEED)
        return self.scores(net, "digits", new)


def run(run: Run[Settings]) -> None:
    """Functions, classes, a rare one, a shared path; then what no claim is about."""
    s, study = run.settings, Study(run)

    def both(task: str, steps: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        return [run.arm(f"{task}_{kind}", study.single, task, kind, steps) for kind in kinds]

    fast, slow, blind, sealed = both("sines", s.steps, ("fast", "slow", "blind", "sealed"))
    run.values("regression", fast=fast["last"], slow=slow["last"])
    run.values("negative_control", blind=blind["last"], sealed=sealed["last"], slow=slow["last"])
    fast, slow = both("prototypes", s.steps, ("fast", "slow"))
    last = {"fast_last": fast["last"], "slow_last": slow["last"]}
    run.values("classification", last, fast_second=fast["second"], slow_second=slow["second"])
    fast, slow = both("rare", s.steps, ("fast", "slow"))
    first = {"fast_first": fast["rare_first"], "slow_first": slow["rare_first"]}
    run.values("rare_data", first, fast=fast["rare_second"], slow=slow["rare_second"])
    shared, separate = run.arm("shared", study.pair, True), run.arm("separate", study.pair, False)
    (without,) = both("soft_steps", s.reuse_steps, ("slow",))
    tasks = {f"shared_{task}": shared[task] for task in ("sines", "kinks")}
    tasks |= {f"separate_{task}": separate[task] for task in ("sines", "kinks")}
    run.values("sharing", tasks, reused=shared["soft_steps"], without=without["last"])
    if s.further:
        both("sines", s.further, ("unregressed", "lstm"))
        both("prototypes", s.further, ("lstm",))
        digits = run.data("digits")
        for kind in ("fast", "slow"):
            run.arm(f"digits_{kind}", study.digits, kind, digits, s.further)


def figures(results: Results) -> plots.Figures:
    """Errors and accuracies within an episode, and at its end as slow training goes on."""
    further = {"LSTM": "lstm"} if results.settings.further else {}
    names = {"fast path": "fast", "memory alone": "slow", **further}
    sines = {**names, "no errors or labels": "blind"}
    errors, courses = ({name: (f"sines_{sines[name]}", key) for name in sines} for key in ("by", "curve"))
    accuracies = {name: (f"prototypes_{kind}", "by") for name, kind in names.items()}
    pictures = {
        "sines": plots.curves(results, errors, xlabel="point of the sine", ylabel="squared error", logy=True),
        "classes": plots.curves(results, accuracies, xlabel="item of the episode", ylabel="accuracy (%)"),
    }
    steps = [results.settings.steps * (k + 1) / 6 for k in range(6)]
    if len(results.values("sines_fast", "curve")[0]) == len(steps):
        own: dict[str, Any] = {"xlabel": "slow steps", "ylabel": "squared error at the end", "logy": True}
        pictures["slow training"] = plots.curves(results, courses, x=steps, **own)
    return pictures
