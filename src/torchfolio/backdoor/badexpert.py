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
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from torchfolio import measure
from torchfolio.backdoor.metrics import accuracy_of, labels_of, outputs_of
from torchfolio.data import CropFlip
from torchfolio.engine.fit import fit
from torchfolio.engine.modes import undisturbed
from torchfolio.engine.state import FitState
from torchfolio.measure.batches import gathered

__all__ = ["SCORES", "BaDExpert", "extract_backdoor_expert", "suspicion", "triangle_score"]

Mislabel = Literal["shift", "random", "none"] | Callable[[Tensor, int], Tensor]
Augment = Callable[[Tensor], Tensor] | Literal["auto"] | None
Score = Literal["triangle", "expert", "auxiliary", "ratio", "diff", "radius", "rectangle"]
EPS = 1e-8
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def triangle_score(b: Tensor, m: Tensor, kappa: float = 0.5) -> Tensor:
    """How far an input is from suspicion,

    $$T = \\min\\Bigl(\\frac{m}{\\kappa\\, \\max(b, \\epsilon)},\\; \\frac{1 - b}{\\max(\\kappa - m, \\epsilon)}\\Bigr),
    \\qquad \\epsilon = 10^{-8}.$$

    Its level sets $T = a$ are two rays in the $(b, m)$ plane: $m = a \\kappa b$ through $(0, 0)$, and
    $b = 1 - a (\\kappa - m)$ through $(1, \\kappa)$.

    Args:
        b: confidence of the backdoor expert in the label that the network predicts, `[N]` in [0, 1].
        m: that of the auxiliary network, likewise.
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


class BaDExpert:
    """A filter in front of a network that rejects inputs with a backdoor trigger.

    With $\\hat y = \\arg\\max p_M(x)$, the score is that of `suspicion` on $b = p_B(x)_{\\hat y}$ and
    $m = p_{M'}(x)_{\\hat y}$, and inputs above a threshold are rejected. The threshold is the smallest score that at
    most a share `fpr` of the calibration examples that $M$ gets right lie above; these are held out of both finetunings.

    Args:
        score: see `suspicion`. With `"expert"` no auxiliary network is trained.
        kappa: see `triangle_score`.
        fpr: share of clean inputs that may be rejected.
        mislabel: wrong labels: `"shift"`, $y + 1 \\bmod C$; `"random"`, any other class; or a function of the labels
            and $C$. (`"none"`, the right ones, makes the control of an experiment.)
        unlearn_lr: of Adam, on all weights. The delicate setting: too small and the expert remembers the task, too
            large and it forgets the backdoor; the stop makes it less so. The authors take 8e-5 for VGG, 5e-5 for
            MobileNetV2, 1e-6 for ViT. `"auto"` begins at 1e-6 and goes up in steps of about 3 to the first rate at
            which the stop is reached.
        unlearn_batch: batch size. `"auto"` makes 11 steps an epoch, as many as the authors make of 2,000 examples in
            batches of 128, down to batches of 16.
        unlearn_epochs: passes over the examples, at most.
        stop_acc: end unlearning at the first step where the expert gets no more than this share of half of the
            examples right; `None` takes half of what the network gets right, 0 never stops. (The authors stop on test
            accuracy, after whole epochs.)
        check_every: steps between those looks.
        finetune_lr: of SGD, divided by 10 at epochs 2, 4, 6 and 8.
        finetune_epochs: passes of the auxiliary network; 10.
        finetune_batch: batch size. `"auto"` makes 22 steps an epoch in the same way (batches of 64). With few examples
            this matters: an auxiliary network that took few steps keeps the backdoor.
        auxiliary: another repaired network in the place of the finetuned one.
        calib_frac: share of the examples that the threshold is chosen on.
        augment: of the auxiliary network's batches; `"auto"` crops images `[N, C, H, W]` at random, padded by an eighth
            of their height (4 of 32), as the authors do, and leaves other inputs as they are. A network that is
            finetuned on crops forgets a trigger that covers the image much more surely. Add what the task allows, flips
            for photographs: `CropFlip()`. `None` changes nothing.
        unlearn_augment: of the expert's batches, likewise; none by default. The authors augment here too, as they do in
            the training of their victims; where the network was trained otherwise, crops alone disturb it.
        seed: of the split, of order and of random labels.
        device: of the finetunings; that of the network by default.

    Attributes:
        expert_: $B$.
        auxiliary_: $M'$, or `None`.
        threshold_: at `fpr`.
        history_: `(step, accuracy)` of the expert at every look.
        unlearn_lr_: rate that the expert was trained at.
        calibration_: scores of the calibration examples `[n]`.
        accuracy_: of network, expert and auxiliary network on the calibration examples.

    Example:
        >>> detector = BaDExpert(unlearn_batch=32).fit(net, clean)
        >>> suspicious = detector.predict(x)

    Reference:
        Sections 3 and 4; settings as in the authors' code for CIFAR-10.
    """

    def __init__(
        self,
        *,
        score: Score = "triangle",
        kappa: float = 0.5,
        fpr: float = 0.01,
        mislabel: Mislabel = "shift",
        unlearn_lr: float | Literal["auto"] = 1e-4,
        unlearn_batch: int | Literal["auto"] = 128,
        unlearn_epochs: int = 1,
        stop_acc: float | None = None,
        check_every: int = 1,
        finetune_lr: float = 0.1,
        finetune_epochs: int = 10,
        finetune_batch: int | Literal["auto"] = 64,
        auxiliary: nn.Module | None = None,
        calib_frac: float = 0.3,
        augment: Augment = "auto",
        unlearn_augment: Augment = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        suspicion(torch.zeros(1), torch.zeros(1), score)
        if not (isinstance(mislabel, str) and mislabel in ("shift", "random", "none")) and not callable(mislabel):
            raise ValueError(f"expected mislabel to be 'shift', 'random' or a function, got {mislabel!r}")
        for name, value in {"kappa": kappa, "unlearn_lr": unlearn_lr, "finetune_lr": finetune_lr}.items():
            if value != "auto" and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"expected {name} above 0, got {value}")
        for name, value in {"fpr": fpr, "calib_frac": calib_frac}.items():
            if not 0 < value < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {value}")
        for name, value in {"augment": augment, "unlearn_augment": unlearn_augment}.items():
            if value is not None and value != "auto" and not callable(value):
                raise ValueError(f"expected {name} to be a function of a batch, 'auto' or None, got {value!r}")
        for name, value in {"unlearn_batch": unlearn_batch, "finetune_batch": finetune_batch}.items():
            if value != "auto" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"expected {name} to be a positive integer or 'auto', got {value!r}")
        self.score_name, self.kappa, self.fpr = score, kappa, fpr
        self.mislabel: Mislabel = mislabel
        self.unlearn_lr, self.unlearn_batch, self.unlearn_epochs = unlearn_lr, unlearn_batch, unlearn_epochs
        self.stop_acc, self.check_every = stop_acc, check_every
        self.finetune_lr, self.finetune_epochs, self.finetune_batch = finetune_lr, finetune_epochs, finetune_batch
        self.auxiliary, self.calib_frac = auxiliary, calib_frac
        self.augment: Augment = augment
        self.unlearn_augment: Augment = unlearn_augment
        self.seed, self.device = seed, device

    def fit(self, model: nn.Module, clean: Any) -> BaDExpert:
        """Train expert and auxiliary network on copies and choose the threshold. The network is left as it is.

        Args:
            model: the suspicious network, from inputs to logits `[N, C]`.
            clean: examples that can be trusted: a pair of tensors, a data set or a loader of (x, y).

        Raises:
            ValueError: on fewer than two classes, labels out of range, outputs that are not `[N, C]`, or if the network
                gets none of the calibration examples right.
            NonFiniteLoss: if a finetuning diverges.
        """
        x, y = _collect(clean)
        outputs = outputs_of(model, x)
        classes = _check(outputs, y)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        held = math.ceil(self.calib_frac * len(x))
        calib, rest = order[:held], order[held:]
        right = outputs[calib].argmax(1) == y[calib]
        if not len(rest) or not right.any():
            raise ValueError(
                f"the network gets none of {held} calibration examples right: there is nothing to unlearn; are inputs "
                "and labels those that it was trained on?"
            )
        if right.float().mean() <= 1 / classes:
            warnings.warn(
                f"the network gets only {right.float().mean():.3f} of the clean examples right, no more than chance; are "
                "they prepared as in its training?",
                stacklevel=2,
            )
        if right.sum() < 1 / self.fpr:
            warnings.warn(
                f"{int(right.sum())} calibration examples cannot tell a false-positive rate of {self.fpr:g}; expected "
                f"at least {math.ceil(1 / self.fpr)}, the threshold is their largest score",
                stacklevel=2,
            )
        self.model_ = model
        examples = (x[rest], y[rest])
        self.expert_, self.history_ = self._unlearn(model, examples, classes)
        self.auxiliary_ = self._finetune(model, examples)
        self.calibration_ = self.score(x[calib][right]).cpu()
        self.threshold_ = self.threshold(self.fpr)
        nets = {"network": model, "expert": self.expert_, "auxiliary": self.auxiliary_}
        self.accuracy_ = {name: accuracy_of(net, x[calib], y[calib]) for name, net in nets.items() if net is not None}
        return self

    def _unlearn(
        self, model: nn.Module, examples: tuple[Tensor, Tensor], classes: int
    ) -> tuple[nn.Module, list[tuple[int, float]]]:
        """The backdoor expert, and its accuracy step by step."""
        x, y = examples
        watched = x[: max(1, len(x) // 2)], y[: max(1, len(x) // 2)]
        start = accuracy_of(model, *watched)
        stop = 0.5 * start if self.stop_acc is None else self.stop_acc
        expert, history = model, [(0, start)]
        for rate in RATES if isinstance(self.unlearn_lr, str) else (self.unlearn_lr,):
            expert, seen = self._wrongly(model, examples, classes, watched, stop, rate)
            history, self.unlearn_lr_ = [(0, start), *seen], rate
            if history[-1][1] <= stop:
                break
        self._judge(history[-1][1], stop, classes)
        return expert, history

    def _wrongly(
        self,
        model: nn.Module,
        examples: tuple[Tensor, Tensor],
        classes: int,
        watched: tuple[Tensor, Tensor],
        stop: float,
        lr: float,
    ) -> tuple[nn.Module, list[tuple[int, float]]]:
        """A copy, finetuned on wrong labels until its accuracy on the watched examples falls to `stop`."""
        seen: list[tuple[int, float]] = []

        def look(state: FitState) -> None:
            if state.epoch_end or state.step % self.check_every:
                return
            with undisturbed():
                found = accuracy_of(state.model, *watched)
            seen.append((state.step, found))
            if found <= stop and self.stop_acc != 0:
                state.stop(f"the expert gets {found:.3f} right")

        x, y = examples
        expert = copy.deepcopy(model).requires_grad_(True)
        size = _batch(self.unlearn_batch, len(x), 11, 128)
        fit(
            expert, (x, _wrong(y, classes, self.mislabel, self.seed)), optimizer=partial(torch.optim.Adam, lr=lr),
            epochs=self.unlearn_epochs, batch_size=size, drop_last=len(x) % size == 1, callbacks=[look],
            augment=_augmentation(self.unlearn_augment, x), seed=self.seed, device=self._device(model), progress=False,
        )  # fmt: skip
        return expert, seen

    def _judge(self, accuracy: float, stop: float, classes: int) -> None:
        if self.mislabel == "none":
            return
        if accuracy > stop and self.stop_acc != 0:
            warnings.warn(
                f"the expert still gets {accuracy:.3f} right, more than {stop:.3f}: raise unlearn_lr or unlearn_epochs, or "
                "lower unlearn_batch",
                stacklevel=4,
            )
        elif accuracy <= 1 / classes:
            warnings.warn(
                f"the expert gets only {accuracy:.3f} right, no more than chance: it may have forgotten the backdoor too; "
                "lower unlearn_lr or look more often (check_every)",
                stacklevel=4,
            )

    def _finetune(self, model: nn.Module, examples: tuple[Tensor, Tensor]) -> nn.Module | None:
        if self.auxiliary is not None:
            return self.auxiliary
        if self.score_name == "expert":
            return None
        sgd = partial(torch.optim.SGD, lr=self.finetune_lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        net = copy.deepcopy(model).requires_grad_(True)
        size = _batch(self.finetune_batch, len(examples[0]), 22, 64)
        fit(
            net, examples, optimizer=sgd, scheduler=partial(MultiStepLR, milestones=[2, 4, 6, 8]), schedule="epoch",
            epochs=self.finetune_epochs, batch_size=size, drop_last=len(examples[0]) % size == 1, augment=_augmentation(self.augment, examples[0]),
            seed=self.seed, device=self._device(model), progress=False,
        )  # fmt: skip
        return net

    def _device(self, model: nn.Module) -> str | torch.device:
        own = next((p.device for p in model.parameters()), torch.device("cpu"))
        return self.device if self.device is not None else own

    def confidences(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence of expert and auxiliary network in the network's label, and that label, `[N]` each.

        Without an auxiliary network its confidence is NaN.
        """
        self._fitted()
        labels = labels_of(self.model_, x)
        at = labels[:, None]
        b = outputs_of(self.expert_, x).double().softmax(1).gather(1, at)[:, 0]
        if self.auxiliary_ is None:
            return b, torch.full_like(b, torch.nan), labels
        return b, outputs_of(self.auxiliary_, x).double().softmax(1).gather(1, at)[:, 0], labels

    def score(self, x: Tensor) -> Tensor:
        """Suspicion `[N]` of inputs `[N, ...]`, higher is more suspicious."""
        b, m, _ = self.confidences(x)
        return suspicion(b, m, self.score_name, self.kappa)

    def threshold(self, fpr: float) -> float:
        """The score that at most a share `fpr` of the calibration examples lies above."""
        self._fitted()
        return measure.threshold_at_fpr(self.calibration_, fpr)

    def predict(self, x: Tensor, fpr: float | None = None) -> Tensor:
        """Which inputs are rejected, bool `[N]`; at another rate than that of the constructor if it is given."""
        return self.score(x) > self.threshold(self.fpr if fpr is None else fpr)

    def filtered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's labels `[N]` and which inputs are rejected `[N]`, whose labels are not to be used."""
        b, m, labels = self.confidences(x)
        return labels, suspicion(b, m, self.score_name, self.kappa) > self.threshold_

    def _fitted(self) -> None:
        if not hasattr(self, "expert_"):
            raise RuntimeError("call fit(model, clean) first")

    def save(self, folder: str | Path) -> Path:
        """Write the fitted filter, safetensors and JSON, without the network that it is for.

        Raises:
            ValueError: if the auxiliary network is not of the network's architecture.
        """
        from safetensors.torch import save_file

        self._fitted()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {k: v.shape for k, v in self.model_.state_dict().items()}
        tensors = {"calibration": self.calibration_}
        for name, net in (("expert", self.expert_), ("auxiliary", self.auxiliary_)):
            state = {} if net is None else net.state_dict()
            if net is not None and {k: v.shape for k, v in state.items()} != wanted:
                raise ValueError(f"the {name} network is of another architecture than the network and cannot be saved")
            tensors |= {f"{name}/{k}": v.detach().cpu().clone().contiguous() for k, v in state.items()}
        save_file(tensors, folder / "badexpert.safetensors")
        record = {
            "detector": "badexpert", "score": self.score_name, "kappa": self.kappa, "fpr": self.fpr,
            "history": self.history_, "accuracy": self.accuracy_,
        }  # fmt: skip
        (folder / "badexpert.json").write_text(json.dumps(record, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> BaDExpert:
        """A fitted filter from what `save` wrote, and the network that it is for."""
        from safetensors.torch import load_file

        folder = Path(folder)
        record = json.loads((folder / "badexpert.json").read_text())
        tensors = load_file(folder / "badexpert.safetensors")
        settings: dict[str, Any] = {name: record[name] for name in ("score", "kappa", "fpr")}
        made = cls(**settings)
        made.model_, made.auxiliary_ = model, None
        for name in ("expert", "auxiliary"):
            state = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            if state:
                net = copy.deepcopy(model)
                net.load_state_dict(state)
                setattr(made, f"{name}_", net.eval())
        made.calibration_ = tensors["calibration"]
        made.history_ = [(int(step), float(accuracy)) for step, accuracy in record["history"]]
        made.accuracy_ = record["accuracy"]
        made.threshold_ = made.threshold(made.fpr)
        return made


def extract_backdoor_expert(model: nn.Module, clean: Any, **settings: Any) -> nn.Module:
    """The backdoor expert alone: a copy of the network, finetuned on wrong labels.

    Args:
        model: the suspicious network; it is left as it is.
        clean: trusted examples (x, y).
        **settings: of `BaDExpert`: `mislabel`, `unlearn_lr`, `unlearn_batch`, `unlearn_epochs`, `stop_acc`, …
    """
    x, y = _collect(clean)
    classes = _check(outputs_of(model, x), y)
    return BaDExpert(**settings)._unlearn(model, (x, y), classes)[0]


def _collect(clean: Any) -> tuple[Tensor, Tensor]:
    """All examples as two tensors on the CPU."""
    x, y = gathered(clean, "cpu")
    if y.is_floating_point() or y.dim() != 1:
        raise ValueError(f"expected integer labels [N], got {y.dtype} of shape {tuple(y.shape)}")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise ValueError("the clean examples hold NaN or infinite values")
    return x, y


def _check(outputs: Tensor, y: Tensor) -> int:
    """Number of classes."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(f"expected logits [N, C] of at least 2 classes, got shape {tuple(outputs.shape)}")
    classes = outputs.shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    if len(y.unique()) < 2:
        raise ValueError(f"expected examples of at least two classes, got class {int(y[0])} alone")
    return classes


def _augmentation(wanted: Augment, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The augmentation of such examples."""
    if not isinstance(wanted, str):
        return wanted
    padding = x.shape[-2] // 8 if x.dim() == 4 else 0
    return CropFlip(padding, flip=False, mode="constant") if padding else None


def _batch(wanted: int | str, count: int, steps: int, largest: int) -> int:
    """Batch size: at least 16 if it is chosen here, for batch norm's sake."""
    chosen = min(largest, max(16, round(count / steps))) if isinstance(wanted, str) else wanted
    return min(chosen, count)


def _wrong(y: Tensor, classes: int, mislabel: Mislabel, seed: int) -> Tensor:
    if mislabel == "none":
        return y
    if mislabel == "shift":
        return (y + 1) % classes
    if mislabel == "random":
        generator = torch.Generator().manual_seed(seed)
        return (y + torch.randint(1, classes, y.shape, generator=generator)) % classes
    assert callable(mislabel)
    wrong = mislabel(y, classes)
    if wrong.shape != y.shape or wrong.is_floating_point() or int(wrong.min()) < 0 or int(wrong.max()) >= classes:
        raise ValueError(f"expected mislabel to give labels from 0 to {classes - 1} of shape {tuple(y.shape)}")
    return wrong
