"""BaDExpert: which inputs carry the trigger of a backdoored network?

Tinghao Xie, Xiangyu Qi, Ping He, Yiming Li, Jiachen T. Wang, Prateek Mittal, "BaDExpert: Extracting Backdoor
Functionality for Accurate Backdoor Input Detection", ICLR 2024, https://arxiv.org/abs/2308.12439.

Given a network $M$ of unknown origin and a few clean examples. Finetuned for a moment on *wrong* labels, $M$ forgets its
task and keeps its backdoor, of which no example reminds it: the backdoor expert $B$. Finetuned on right labels, it
forgets part of the backdoor: the auxiliary network $M'$. An input on which $B$ agrees with $M$ and $M'$ does not is
suspicious. The predictions that are given out remain those of $M$.

    detector = BaDExpert().fit(net, (images, labels))
    labels, rejected = detector.filtered(x)

`torchfolio audit net/ --data clean/ --detector badexpert` does the same for a network on disk.

Longer than most because expert, auxiliary network and score carry the settings of each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from torchfolio import checks
from torchfolio.backdoor.concentration import ExpertConcentration, concentration, percent
from torchfolio.backdoor.expert import (
    Augment,
    Expert,
    Mislabel,
    Unlearning,
    augmentation,
    batch_size,
    check_augment,
    check_count,
    epochs_of,
    extract_backdoor_expert,
)
from torchfolio.backdoor.input_detector import InputDetector
from torchfolio.backdoor.metrics import accuracy_of, labels_of
from torchfolio.backdoor.suspects import device_of
from torchfolio.engine.fit import fit
from torchfolio.measure import outputs

__all__ = [
    "SCORES",
    "BaDExpert",
    "ExpertConcentration",
    "extract_backdoor_expert",
    "suspicion",
    "triangle_score",
]

Score = Literal["triangle", "expert", "auxiliary", "ratio", "diff", "radius", "rectangle"]
EPS = 1e-8
STEPS = 600  # of the auxiliary network: after fewer it has not recovered from the crops, or keeps the backdoor
KEPT = 2 / 3  # share of the accuracy below which an auxiliary network is spoiled


def triangle_score(b: Tensor, m: Tensor, kappa: float = 0.5) -> Tensor:
    """How far an input is from suspicion,

    $$T = \\min\\Bigl(\\frac{m}{\\kappa\\, \\max(b, \\epsilon)},\\; \\frac{1 - b}{\\max(\\kappa - m, \\epsilon)}\\Bigr),
    \\qquad \\epsilon = 10^{-8}.$$

    Its level sets $T = a$ are two rays in the $(b, m)$ plane: $m = a \\kappa b$ through $(0, 0)$, and
    $b = 1 - a (\\kappa - m)$ through $(1, \\kappa)$.

    Args:
        b: confidence of the backdoor expert in the label that the network predicts, `[N]` in [0, 1].
        m: confidence of the auxiliary network, likewise.
        kappa: $\\kappa$; 0.5 suits ResNets, the authors take 0.4 for VGG-16 and 0.2 for MobileNetV2. Lower it where
            the auxiliary network is unsure of clean inputs.

    Returns:
        $T$ `[N]`; small is suspicious.

    Reference:
        Appendix on the decision rule; constants as in the authors' code.
    """
    return torch.minimum(m / (kappa * b.clamp_min(EPS)), (1 - b) / (kappa - m).clamp_min(EPS))


SCORES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "triangle": lambda b, m, kappa: -triangle_score(b, m, kappa),
    "expert": lambda b, m, kappa: b,
    "auxiliary": lambda b, m, kappa: -m,
    "ratio": lambda b, m, kappa: -m / b.clamp_min(EPS),
    "diff": lambda b, m, kappa: b - m,
    "radius": lambda b, m, kappa: (1 - m).square() + b.square(),
    "rectangle": lambda b, m, kappa: -torch.minimum(m, 1 - b),
}
"""Suspicion from the two confidences: the paper's ensemble, and what it is compared with."""


def suspicion(b: Tensor, m: Tensor, score: str = "triangle", kappa: float = 0.5) -> Tensor:
    """Suspicion of inputs `[N]`, higher is more suspicious, by one of `SCORES`.

    Raises:
        ValueError: if there is no such score.
    """
    if score not in SCORES:
        raise ValueError(f"expected a score among {', '.join(SCORES)}, got {score!r}")
    return SCORES[score](b, m, kappa)


class BaDExpert(InputDetector):
    """A filter in front of a network that rejects inputs with a backdoor trigger.

    With $\\hat y = \\arg\\max p_M(x)$, the score is that of `suspicion` on $b = p_B(x)_{\\hat y}$ and
    $m = p_{M'}(x)_{\\hat y}$, and inputs above a threshold are rejected. The threshold is the smallest score that at
    most a share `fpr` of the calibration examples that $M$ gets right lie above; these are held out of both finetunings.

    Args:
        score: score, see `suspicion`. With `"expert"` no auxiliary network is trained.
        kappa: slope $\\kappa$, see `triangle_score`.
        fpr: share of clean inputs that may be rejected.
        mislabel: wrong labels: `"shift"`, $y + 1 \\bmod C$; `"random"`, any other class; or a function of the labels
            and $C$. (`"none"`, the right ones, makes the control of an experiment.)
        unlearn_lr: learning rate of Adam, on all weights. The delicate setting: too small and the expert remembers the
            task, too large and it forgets the backdoor; the stop makes it less so. The authors take 8e-5 for VGG, 5e-5
            for MobileNetV2, 1e-6 for ViT. `"auto"` takes the lowest of 1e-6, 3e-6, ..., 1e-2 at which the stop is
            reached.
        unlearn_batch: batch size. `"auto"` makes 11 steps an epoch, as many as the authors make of 2,000 examples in
            batches of 128, down to batches of 16.
        unlearn_epochs: passes over the examples, at most. `"auto"` makes 100 steps or a few more: their number follows
            the size of the data, so that with few examples the rate need not be high.
        stop_acc: end unlearning at the first step where the expert gets no more than this share of half of the
            examples right; `None` takes half of what the network gets right, 0 never stops. (The authors stop on test
            accuracy, after whole epochs.)
        check_every: steps between those looks.
        finetune_lr: learning rate of SGD, divided by 10 after each fifth of the epochs but the last.
        finetune_epochs: passes of the auxiliary network. `"auto"` makes 10, and at least 600 steps.
        finetune_batch: batch size. `"auto"` makes 22 steps an epoch in the same way (batches of 64). With few examples
            this matters: an auxiliary network that took few steps keeps the backdoor.
        auxiliary: another repaired network in place of the finetuned one.
        calib_frac: share of the examples that the threshold is chosen on.
        augment: augmentation of the auxiliary network's batches; `"auto"` crops images `[N, C, H, W]` at random, padded
            by an eighth of their height (4 of 32), as the authors do, and leaves other inputs as they are. A network
            that is finetuned on crops forgets a trigger that covers the image much more surely. Add what the task
            allows, flips for photographs: `CropFlip()`. `None` changes nothing.
        unlearn_augment: augmentation of the expert's batches; none by default. The authors augment here too,
            as they do in the training of their victims; where the network was trained otherwise, crops alone disturb
            it.
        seed: seed of the split, of order and of random labels.
        device: device of the finetunings; that of the network by default.

    Attributes:
        expert_: $B$.
        auxiliary_: $M'$, or `None`.
        threshold_: threshold at `fpr`.
        history_: `(step, accuracy)` of the expert at every look.
        unlearn_lr_: rate that the expert was trained at.
        calibration_: scores of the calibration examples `[n]`.
        accuracy_: accuracy of network, expert and auxiliary network on the held-out examples.
        faults_: sentences on what is wrong with expert and auxiliary network by those figures, in words; they are
            warned of too.

    Example:
        >>> detector = BaDExpert(unlearn_batch=32).fit(net, clean)
        >>> suspicious = detector.predict(x)

    Reference:
        Sections 3 and 4; settings as in the authors' code for CIFAR-10.
    """

    fit_only = ("mislabel", "auxiliary", "augment", "unlearn_augment")

    def __init__(
        self,
        *,
        score: Score = "triangle",
        kappa: float = 0.5,
        fpr: float = 0.01,
        mislabel: Mislabel = "shift",
        unlearn_lr: float | Literal["auto"] = "auto",
        unlearn_batch: int | Literal["auto"] = "auto",
        unlearn_epochs: int | Literal["auto"] = "auto",
        stop_acc: float | None = None,
        check_every: int = 1,
        finetune_lr: float = 0.1,
        finetune_epochs: int | Literal["auto"] = "auto",
        finetune_batch: int | Literal["auto"] = "auto",
        auxiliary: nn.Module | None = None,
        calib_frac: float = 0.3,
        augment: Augment = "auto",
        unlearn_augment: Augment = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(fpr=fpr, calib_frac=calib_frac, seed=seed, device=device)
        suspicion(torch.zeros(1), torch.zeros(1), score)
        checks.positive("kappa", kappa)
        checks.positive("finetune_lr", finetune_lr)
        check_count("finetune_epochs", finetune_epochs)
        check_augment("augment", augment)
        check_count("finetune_batch", finetune_batch)
        self.unlearning = Unlearning(
            mislabel, unlearn_lr, unlearn_batch, unlearn_epochs, stop_acc, check_every, unlearn_augment, seed, device
        )
        self.score_name, self.kappa = score, kappa
        self.mislabel: Mislabel = mislabel
        self.unlearn_lr, self.unlearn_batch, self.unlearn_epochs = unlearn_lr, unlearn_batch, unlearn_epochs
        self.stop_acc, self.check_every = stop_acc, check_every
        self.finetune_lr, self.finetune_epochs, self.finetune_batch = finetune_lr, finetune_epochs, finetune_batch
        self.auxiliary = auxiliary
        self.augment: Augment = augment
        self.unlearn_augment: Augment = unlearn_augment

    def _fit(self, model: nn.Module, clean: tuple[Tensor, Tensor]) -> None:
        classes = outputs(model, clean[0][:1]).shape[1]
        expert = self.unlearning(model, clean, classes)
        self.expert_, self.history_, self.unlearn_lr_ = expert.model, expert.history, expert.lr
        self.stop_ = expert.stop
        self.auxiliary_ = self._finetune(model, clean)

    def _assess(self, held_out: tuple[Tensor, Tensor]) -> None:
        nets = {"network": self.model_, "expert": self.expert_, "auxiliary": self.auxiliary_}
        self.accuracy_ = {name: accuracy_of(net, *held_out) for name, net in nets.items() if net is not None}
        expert = Expert(self.expert_, self.history_, self.unlearn_lr_, self.stop_)
        self.faults_ = self.unlearning.faults(expert, self.accuracy_["expert"], self.num_classes_)
        right, left = self.accuracy_["network"], self.accuracy_.get("auxiliary", 1.0)
        if left < KEPT * right:
            self.faults_.append(
                f"the auxiliary network gets only {left:.3f} of held-out examples right, the network {right:.3f}: its "
                "finetuning spoiled it; raise finetune_epochs, lower finetune_lr, or set augment to None"
            )
        for fault in self.faults_:
            warnings.warn(fault, stacklevel=3)

    def figures(self) -> dict[str, float]:
        return {f"accuracy of the {name}": value for name, value in self.accuracy_.items()}

    def remarks(self, x: Tensor, classes: Sequence[str]) -> list[str]:
        shares = concentration(self.expert_, x)
        first = int(shares.argmax())
        came_out = "Both came out" if self.auxiliary_ is not None else "The expert came out"
        told = ", ".join(f"the {name} {100 * value:.0f} %" for name, value in self.accuracy_.items())
        return [
            f"{'Do not trust the filter' if self.faults_ else came_out}: of held-out examples {told} are told right"
            f"{'; ' + '; '.join(self.faults_) if self.faults_ else ''}.",
            f"On clean inputs the expert believes most in class {classes[first]} ({percent(float(shares[first]))} on "
            f"average; {percent(1 / len(shares))} each if it had no favourite). Experts of clean networks have favourites "
            "too: this counts only against reference networks (--reference).",
        ]

    def pictures(self, x: Tensor, classes: Sequence[str]) -> list[tuple[Any, str]]:
        import matplotlib.pyplot as plt

        course, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        ax.plot(*zip(*self.history_, strict=True), marker=".")
        ax.set(xlabel="step on wrong labels", ylabel="accuracy of the expert", ylim=(0, 1.02))
        favourites, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        shares, names = concentration(self.expert_, x).tolist(), list(classes)[:40]
        ax.bar(range(len(names)), shares[: len(names)])
        ax.axhline(1 / len(shares), c="grey", ls=":")
        ax.set_xticks(range(len(names)), names, rotation=60 if max(map(len, names)) > 3 else 0)
        ax.set(ylabel="mean confidence of the expert")
        return [
            (course, "How the backdoor expert forgot its task."),
            (favourites, "What the expert believes of clean inputs; the line is no favourite."),
        ]

    def _finetune(self, model: nn.Module, examples: tuple[Tensor, Tensor]) -> nn.Module | None:
        if self.auxiliary is not None:
            return self.auxiliary
        if self.score_name == "expert":
            return None
        sgd = partial(torch.optim.SGD, lr=self.finetune_lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        net = copy.deepcopy(model).requires_grad_(True)
        count, wanted = len(examples[0]), self.finetune_epochs
        size = batch_size(self.finetune_batch, count, 22, 64)
        epochs = max(10, epochs_of(STEPS, count, size)) if isinstance(wanted, str) else wanted
        milestones = [round(epochs * fifth / 5) for fifth in range(1, 5)]
        fit(
            net, examples, optimizer=sgd, scheduler=partial(MultiStepLR, milestones=milestones), schedule="epoch",
            epochs=epochs, batch_size=size, drop_last=len(examples[0]) % size == 1, augment=augmentation(self.augment, examples[0]),
            seed=self.seed, device=self.device if self.device is not None else device_of(model, examples[0]), progress=False,
        )  # fmt: skip
        return net

    def confidences(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence of expert and auxiliary network in the network's label, and that label, `[N]` each.

        Without an auxiliary network its confidence is NaN.
        """
        self._check_fitted()
        labels = labels_of(self.model_, x)
        at = labels[:, None]
        b = outputs(self.expert_, x).double().softmax(1).gather(1, at)[:, 0]
        if self.auxiliary_ is None:
            return b, torch.full_like(b, torch.nan), labels
        return b, outputs(self.auxiliary_, x).double().softmax(1).gather(1, at)[:, 0], labels

    def _score(self, x: Tensor) -> Tensor:
        b, m, _ = self.confidences(x)
        return suspicion(b, m, self.score_name, self.kappa)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "score": self.score_name}

    def _restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super()._restore({"auxiliary_": None, **values}, tensors)
        self.history_ = [(int(step), float(accuracy)) for step, accuracy in self.history_]
