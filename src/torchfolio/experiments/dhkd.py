"""Measures distillation on one head and on two, under a strong, a weak and a good teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import LearningRule
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._one_head_distillation import OneHead
from torchfolio.measure import outputs
from torchfolio.models import ConvNet, ResNetCIFAR
from torchfolio.models.conv_net import conv_block, pooled_head
from torchfolio.runs import Results, Run, plots, setting, tasks
from torchfolio.training.dhkd import DHKD, binary_kl_norm, etf_deviation, head_conflict, kd_loss


@dataclass(frozen=True)
class Settings:
    """Two tasks, three teachers, one budget for all students."""

    digits: str = setting("mnist10k", "data of the strong teacher")
    digits_size: tuple[int, int | None] = setting((7500, 14), "training examples and side of its images")
    strong_epochs: int = setting(6, "number of epochs of the strong teacher")
    photos: str = setting("cifar10", "data of the weak and the good teacher")
    photos_size: tuple[int, int | None] = setting((6000, 16), "training examples and side of its images")
    weak_epochs: int = setting(3, "number of epochs of the weak teacher, stopped before its learning rate falls")
    good_epochs: int = setting(6, "number of epochs of the good teacher")
    test_size: int | None = setting(None, "test examples of either; `None` takes all, as methods differ by little")
    epochs: tuple[int, int] = setting((6, 8), "number of epochs of students on digits and on photos")
    lr: float = setting(0.05, "peak learning rate of students")
    tau: float = setting(2.0, "temperature of the loss on logits")


SCALES = {
    "smoke": Settings("digits", (512, None), 1, "digits", (512, None), 1, 2, None, (1, 1)),
    "quick": Settings(),
    "full": Settings(photos_size=(20_000, None), good_epochs=30, epochs=(20, 60)),
}
COMPARED = ("teacher", "labels", "kd", "one_head", "linear", "aligned")  # beside DHKD with `mlp`
GOOD = ("kd", "one_head", "mlp")  # students of the good teacher; labels alone are those of the weak one


@dataclass(frozen=True)
class Course:
    """A teacher, and what its students have: data, number of epochs, widths of their convolutions."""

    data: DataSplits
    teacher: Callable[[], nn.Module]
    lessons: int
    scheduler: Any
    epochs: int
    widths: tuple[int, int, int]

    def student(self) -> nn.Sequential:
        """Three convolutions, the first two with stride 2, a pool and a linear classifier."""
        a, b, c = self.widths
        first = conv_block(self.data.shape[0], a, 2)
        return nn.Sequential(first, conv_block(a, b, 2), conv_block(b, c), pooled_head(c, self.data.num_classes))


def rules(tau: float) -> dict[str, Callable[[], LearningRule | None]]:
    """Fresh rules by arm; `None` is backprop by labels."""
    return {
        "labels": lambda: None,
        "kd": lambda: OneHead(kd_loss, 4.0),
        "logits": lambda: OneHead(binary_kl_norm, tau, labels=0.0),
        "one_head": lambda: OneHead(binary_kl_norm, tau),
        "linear": lambda: DHKD(None, tau=tau, aux="linear"),
        "mlp": lambda: DHKD(None, tau=tau, aux="mlp"),
        "aligned": lambda: DHKD(None, tau=tau, aux="mlp", gradient_alignment=True),
    }


def train(run: Run[Settings], net: nn.Module, data: Any, test: Any, epochs: int, **how: Any) -> dict[str, Any]:
    """Test accuracy in percent of a network that was trained on the tensors `data`."""
    run.fit(
        net, data, optimizer=sgd(run.settings.lr, weight_decay=5e-4), epochs=epochs, batch_size=64,
        drop_last=len(data[0]) % 64 == 1, **how,
    )  # fmt: skip
    return {"accuracy": tasks.accuracy(net, test)}


def teach(run: Run[Settings], course: Course) -> dict[str, Any]:
    """A teacher's test accuracy, and its logits on the training examples in float32."""
    teacher, data = course.teacher(), course.data
    scores = train(run, teacher, data.train.tensors, data.test, course.lessons, scheduler=course.scheduler)
    return {**scores, "logits": outputs(teacher, data.train)}


def learn(run: Run[Settings], course: Course, name: str, v: Tensor) -> dict[str, Any]:
    """One student of logits `v`, and where both losses were on one head their conflict there."""
    net, rule, (x, y) = course.student(), rules(run.settings.tau)[name](), course.data.train.tensors
    batches = (x, y) if rule is None else (x, v, y)
    scores = train(run, net, batches, course.data.test, course.epochs, rule=rule, scheduler=cosine())
    scores |= etf_deviation(net[-1][-1].weight)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    if name == "one_head":
        conflict = head_conflict(net, (x, v, y), tau=run.settings.tau)
        scores |= {"head": conflict.head, "backbone": conflict.backbone}
    return scores


def run(run: Run[Settings]) -> None:
    """Teachers first, then every student under each of them."""
    s = run.settings
    digits, photos = (
        run.data(name, train_size=size[0], image_size=size[1], test_size=s.test_size, val=500 if size[1] else 100)
        for name, size in ((s.digits, s.digits_size), (s.photos, s.photos_size))
    )
    convnet = partial(ConvNet, digits.num_classes, digits.shape[0], (16, 32, 32))
    residual = partial(ResNetCIFAR, 8, in_channels=photos.shape[0], num_classes=photos.num_classes)
    courses = {
        "strong": Course(digits, convnet, s.strong_epochs, cosine(), s.epochs[0], (3, 6, 12)),
        "weak": Course(photos, residual, s.weak_epochs, None, s.epochs[1], (6, 12, 24)),
        "good": Course(photos, residual, s.good_epochs, cosine(), s.epochs[1], (6, 12, 24)),
    }
    for kind, course in courses.items():
        v = torch.as_tensor(run.arm(f"{kind}_teacher", teach, run, course)["logits"])
        for name in GOOD if kind == "good" else rules(s.tau):
            run.arm(f"{kind}_{name}", learn, run, course, name, v)
        if kind == "strong":
            order = torch.randperm(len(v), generator=run.generator())
            run.arm("strong_permuted", learn, run, course, "mlp", v[order])
    accuracy = {name: arm["accuracy"] for name, arm in run.arms.items()}
    strong, weak = ({name: accuracy[f"{kind}_{name}"] for name in COMPARED} for kind in ("strong", "weak"))
    parts = [(kind, part) for kind in ("strong", "weak") for part in ("head", "backbone")]
    run.values("conflict", {f"{kind}_{part}": run.arms[f"{kind}_one_head"][part] for kind, part in parts})
    good = {f"good_{name}": accuracy[f"good_{name}"] for name in ("teacher", *GOOD)}
    run.values("two_heads", weak | good, dhkd=accuracy["weak_mlp"])
    run.values("gain", strong, dhkd=accuracy["strong_mlp"])
    run.values("negative_control", permuted=accuracy["strong_permuted"], labels=strong["labels"])


def figures(results: Results) -> plots.Figures:
    """Accuracy of every student under each teacher."""
    names = {
        "labels": "labels", "kd": "KD", "logits": "logits", "one_head": "one head", "linear": "DHKD, linear",
        "mlp": "DHKD, mlp", "aligned": "DHKD, aligned",
    }  # fmt: skip
    drawn = {}
    for kind in ("strong", "weak", "good"):
        arms = {text: (f"{kind}_{n}", "accuracy") for n, text in names.items() if kind != "good" or n in GOOD}
        drawn[f"{kind} teacher"] = plots.bars(results, arms, ylabel="test accuracy (%)")
    return drawn
