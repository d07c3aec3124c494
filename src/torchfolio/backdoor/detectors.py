"""Detectors of backdoors: `InputDetector` judges inputs of a network, `ModelDetector` networks.

A method says how it learns and how it scores; the base class owns what every detector needs. Both hand a method a copy of
the network, in evaluation mode and with frozen parameters, so that nothing a method does, nor an error on its way, leaves
a trace on the user's. Higher scores are more suspicious.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from torchfolio import measure
from torchfolio.backdoor.metrics import labels_of, outputs_of
from torchfolio.engine.modes import seeded
from torchfolio.engine.progress import Progress
from torchfolio.measure import untouched
from torchfolio.measure.batches import gathered
from torchfolio.shown import Shown

__all__ = ["InputDetector", "InvertedTrigger", "Judgement", "ModelDetector", "ModelVerdict", "Scan", "TriggerInverter"]

Pair = tuple[Tensor, Tensor]
T = TypeVar("T")
FORMAT = 1
NAME = "detector"


@dataclass(frozen=True)
class Judgement:
    """What a filter says about inputs.

    Attributes:
        labels: the network's labels `[N]`; those of rejected inputs are not to be used.
        scores: suspicion `[N]`, float64.
        rejected: bool `[N]`.
    """

    labels: Tensor
    scores: Tensor
    rejected: Tensor


class InputDetector(Shown, ABC):
    """A filter in front of a network that rejects inputs with a trigger.

    A method fills `_fit` and `_score`. Examples that the network gets right, of a part that is held out of `_fit`, give
    the threshold: the smallest of their scores that at most a share `fpr` of them lies above. Inputs that hold NaN or
    infinity are always rejected.

    What a method learns it keeps in attributes whose names end in an underscore, and its settings in attributes with
    the names of the constructor's parameters; `save` and `load` need no more.

    Args:
        fpr: share of clean inputs that may be rejected.
        calib_frac: share of the clean examples that is held out to choose the threshold.
        seed: seed of the split, and of every global generator inside `_fit`.
        device: where the method works; where the network is by default.

    Attributes:
        model_: the network that is filtered, a copy.
        threshold_: at `fpr`.
        calibration_: scores of the calibration examples that the network gets right `[n]`.
        num_classes_: number of the network's outputs.
        input_shape_: shape of one input.
    """

    fit_only: ClassVar[tuple[str, ...]] = ()
    """Settings that a fitted filter can do without, and that need not be saved."""

    model_: nn.Module
    threshold_: float
    calibration_: Tensor
    num_classes_: int
    input_shape_: tuple[int, ...]

    def __init__(
        self, *, fpr: float = 0.01, calib_frac: float = 0.3, seed: int = 0, device: str | torch.device | None = None
    ) -> None:
        for name, value in {"fpr": fpr, "calib_frac": calib_frac}.items():
            if not (isinstance(value, int | float) and 0 < value < 1):
                raise ValueError(f"expected {name} between 0 and 1, got {value!r}")
        self.fpr, self.calib_frac, self.seed, self.device = fpr, calib_frac, seed, device

    @abstractmethod
    def _fit(self, model: nn.Module, clean: Pair) -> None:
        """Learn from clean examples.

        Args:
            model: the network, a copy in evaluation mode whose parameters are frozen; it is the later `model_`.
            clean: inputs `[N, ...]` and labels `[N]`, on the CPU, without those that are held out.
        """

    @abstractmethod
    def _score(self, x: Tensor) -> Tensor:
        """Suspicion `[N]` of inputs `[N, ...]`, which are finite and on the network's device; without gradients.

        The score of an input must not depend on the batch that it comes in.
        """

    def _assess(self, held_out: Pair) -> None:
        """Judge on examples that `_fit` did not see whether what was learned is of use, and warn if it is not."""

    def figures(self) -> dict[str, float]:
        """What else is known of the fitted filter, by name, for a report."""
        return {}

    def remarks(self, x: Tensor, classes: Sequence[str]) -> list[str]:
        """Sentences for a report, on clean inputs `[N, ...]`; `classes` names the network's."""
        return []

    def pictures(self, x: Tensor, classes: Sequence[str]) -> list[tuple[Any, str]]:
        """Matplotlib figures for a report with their captions, likewise."""
        return []

    def fit(self, model: nn.Module, clean: Any) -> Self:
        """Learn from clean examples and choose the threshold. The network is left as it is.

        Args:
            model: the suspicious network, from inputs to logits `[N, C]`.
            clean: examples that can be trusted: a pair of tensors, a data set or a loader of (x, y).

        Raises:
            ValueError: if there are fewer than two classes, labels are out of range, examples hold NaN, outputs are not
                `[N, C]`, or the network gets none of the held-out examples right.
        """
        for name in self._learned():
            delattr(self, name)
        if "model_" in vars(self):
            del self.model_
        x, y = collected(clean)
        net = private(model, self.device)
        outputs = outputs_of(net, x)
        classes = checked_classes(outputs, y)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        held = math.ceil(self.calib_frac * len(x))
        calib, rest = order[:held], order[held:]
        right = outputs[calib].argmax(1) == y[calib]
        self._check_calibration(right, len(rest), classes)
        with seeded(self.seed), untouched(net):
            self._fit(net, (x[rest], y[rest]))
        self.model_, self.num_classes_, self.input_shape_ = net, classes, tuple(x.shape[1:])
        calibration = self.score(x[calib][right])
        if not bool((calibration < math.inf).all()):
            count = int((calibration == math.inf).sum())
            raise ValueError(
                f"expected finite scores, got NaN or infinity for {count} of {len(calibration)} clean examples"
            )
        self.calibration_ = calibration
        self.threshold_ = self.threshold(self.fpr)
        self._assess((x[calib], y[calib]))
        return self

    def _check_calibration(self, right: Tensor, rest: int, classes: int) -> None:
        """Refuse what cannot be calibrated on, and warn of what is thin."""
        if not rest or not right.any():
            raise ValueError(
                f"the network gets none of {len(right)} calibration examples right; are inputs and labels those that it "
                "was trained on?"
            )
        if right.float().mean() <= 1 / classes:
            warnings.warn(
                f"the network gets only {right.float().mean():.3f} of the clean examples right, no more than chance; are "
                "they prepared as in its training?",
                stacklevel=3,
            )
        if right.sum() < 1 / self.fpr:
            warnings.warn(
                f"{int(right.sum())} calibration examples cannot tell a false-positive rate of {self.fpr:g}; expected "
                f"at least {math.ceil(1 / self.fpr)}, the threshold is their largest score",
                stacklevel=3,
            )

    def score(self, x: Tensor) -> Tensor:
        """Suspicion `[N]`, float64, of inputs `[N, ...]`; infinite for those that hold NaN or infinity."""
        self._check_fitted()
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.input_shape_:
            shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected inputs [N, {', '.join(map(str, self.input_shape_))}], got {shown}")
        finite = finite_rows(x)
        scores = torch.full((len(x),), math.inf, dtype=torch.float64)
        place = device_of(self.model_, x)
        good = x if bool(finite.all()) else x[finite]
        with torch.no_grad(), untouched(self.model_, training=False):
            parts = [self._score(part.to(place)).detach().double().cpu() for part in good.split(512) if len(part)]
        if parts:
            found = torch.cat(parts)
            if found.shape != (len(good),):
                raise ValueError(f"expected a score for each of {len(good)} inputs, got shape {tuple(found.shape)}")
            scores[finite.cpu()] = torch.where(found.isnan(), math.inf, found)
        return scores

    def threshold(self, fpr: float) -> float:
        """The score that at most a share `fpr` of the calibration examples lies above."""
        self._check_fitted()
        return measure.threshold_at_fpr(self.calibration_, fpr)

    def judge(self, x: Tensor) -> Judgement:
        """Labels, scores and what is rejected at `fpr`, at once."""
        scores = self.score(x)
        return Judgement(labels_of(self.model_, x), scores, self._above(scores, self.threshold_))

    def predict(self, x: Tensor, fpr: float | None = None) -> Tensor:
        """Which inputs are rejected, bool `[N]`; at another rate than that of the constructor if it is given."""
        return self._above(self.score(x), self.threshold(self.fpr if fpr is None else fpr))

    def filtered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's labels `[N]` and which inputs are rejected `[N]`, whose labels are not to be used."""
        judged = self.judge(x)
        return judged.labels, judged.rejected

    @staticmethod
    def _above(scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold) | (scores == math.inf)

    def _check_fitted(self) -> None:
        if "model_" not in vars(self):
            raise RuntimeError("call fit(model, clean) first")

    # On disk

    def _learned(self) -> dict[str, Any]:
        """What was learned, by attribute."""
        return {k: v for k, v in vars(self).items() if k.endswith("_") and not k.startswith("_") and k != "model_"}

    def _settings(self) -> dict[str, Any]:
        """Arguments that build the like of this detector."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n not in ("self", "device")]
        return {name: getattr(self, name) for name in names if name not in self.fit_only}

    def save(self, folder: str | Path) -> Path:
        """Write the fitted filter, safetensors and JSON, without the network that it is for.

        Raises:
            ValueError: if a network that was learned is of another architecture than the one that is filtered, or a
                setting or what was learned is neither tensor, network nor JSON.
        """
        from safetensors.torch import save_file

        self._check_fitted()
        tensors, values = {}, {}
        for name, value in self._learned().items():
            if isinstance(value, nn.Module):
                tensors |= {f"{name}/{k}": v for k, v in self._state_of(name, value).items()}
            elif isinstance(value, Tensor):
                tensors[name] = value
            else:
                values[name] = value
        record: dict[str, Any] = {
            "format": FORMAT, "detector": type(self).__name__, "network": fingerprint(self.model_),
            "settings": _plain(self._settings()), "values": _plain(values),
        }  # fmt: skip
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{NAME}.safetensors"
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, path)
        record["sha256"] = sha256(path.read_bytes()).hexdigest()
        (folder / f"{NAME}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return folder

    def _state_of(self, name: str, net: nn.Module) -> dict[str, Tensor]:
        state, wanted = net.state_dict(), self.model_.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ValueError(
                f"{name.strip('_')} is of another architecture than the network and cannot be saved with the filter"
            )
        return state

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Self:
        """A fitted filter from what `save` wrote, and the network that it is for.

        Raises:
            ValueError: if the files are not of such a filter, were changed, or belong to another network.
        """
        folder = Path(folder)
        record, tensors = _read(folder, cls.__name__)
        if record["network"] != fingerprint(model):
            raise ValueError(f"the filter in {folder} was fitted to another network than this one")
        try:
            made = cls(**record["settings"])
        except TypeError as error:
            raise ValueError(f"the settings in {folder} are not those of {cls.__name__}: {error}") from error
        made.model_ = private(model, None)
        made._restore(record["values"], tensors)
        missing = [n for n in ("calibration_", "num_classes_", "input_shape_") if n not in vars(made)]
        if missing:
            raise ValueError(f"the filter in {folder} lacks {', '.join(missing)}")
        made.input_shape_ = tuple(made.input_shape_)
        made.threshold_ = made.threshold(made.fpr)
        return made

    def _restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Set what was learned."""
        for name, value in values.items():
            setattr(self, name, value)
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, slash, entry = key.partition("/")
            if slash:
                states.setdefault(name, {})[entry] = value
            else:
                setattr(self, name, value)
        for name, state in states.items():
            net = copy.deepcopy(self.model_)
            net.load_state_dict(state)
            setattr(self, name, net.eval())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}, which cannot be saved with the filter") from None
    return values


def _read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        record = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / f'{NAME}.json'} is not JSON: {error}") from error
    wanted = {"format": int, "detector": str, "network": str, "settings": dict, "values": dict, "sha256": str}
    if not isinstance(record, dict) or any(not isinstance(record.get(k), kind) for k, kind in wanted.items()):
        raise ValueError(f"{folder / f'{NAME}.json'} is not the record of a filter; it holds {', '.join(wanted)}")
    if record["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT} in {folder}, got {record['format']}")
    if record["detector"] != name:
        raise ValueError(f"expected a filter of {name} in {folder}, got one of {record['detector']}")
    content = (folder / f"{NAME}.safetensors").read_bytes()
    if sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{folder / f'{NAME}.safetensors'} was changed after it was written")
    try:
        return record, load(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / f'{NAME}.safetensors'} is not a readable safetensors file: {error}") from error


@dataclass(frozen=True)
class ModelVerdict:
    """What a detector says about a network. Detectors that know more subclass it.

    Attributes:
        is_backdoored: the verdict.
        score: how suspicious the network is.
        threshold: what the score was compared with.
        pairs: `(source, target)` classes that are suspected.
        trigger: what was recovered of it.
        evidence: figures behind the verdict.
        complete: whether the scan looked at all that it meant to, or was cut short by its time limit.
    """

    is_backdoored: bool
    score: float
    threshold: float
    pairs: tuple[tuple[int, int], ...] = ()
    trigger: Any = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    def sentences(self, classes: Sequence[str] = ()) -> list[str]:
        """The verdict in words; `classes` names the network's."""
        word = "suspicious" if self.is_backdoored else "not suspicious"
        said = [f"The network is {word}: its score is {self.score:.4g} against a threshold of {self.threshold:.4g}."]
        if self.is_backdoored and self.pairs:
            named = [[str(classes[k]) if k < len(classes) else str(k) for k in pair] for pair in self.pairs]
            more = f" and {len(named) - 10} more" if len(named) > 10 else ""
            said.append(f"Suspected, from class to class: {', '.join(f'{s} to {t}' for s, t in named[:10])}{more}.")
        if not self.is_backdoored:
            said.append("That is no proof that it has no backdoor.")
        if not self.complete:
            said.append("The scan was cut short by its time limit and did not look at everything.")
        return said


class Scan:
    """What a scan runs with: its seed, its time limit and its progress bar.

    Args:
        seed: seed of whatever the method draws; every global generator is seeded with it too.
        budget_seconds: time limit; `None` is none.
        progress: show a bar; `None` does so on a terminal.

    Attributes:
        complete: whether no iteration of `items` was cut short.
    """

    def __init__(self, seed: int = 0, budget_seconds: float | None = None, progress: bool | None = None) -> None:
        if budget_seconds is not None and not budget_seconds > 0:
            raise ValueError(f"expected budget_seconds above 0, got {budget_seconds}")
        self.seed, self._progress = seed, progress
        self._end = math.inf if budget_seconds is None else time.monotonic() + budget_seconds
        self.complete = True

    @property
    def spent(self) -> bool:
        """Whether the time limit is over."""
        return time.monotonic() > self._end

    def items(self, items: Sequence[T], text: str = "") -> Iterator[T]:
        """The items with a bar, the first always; the rest is left out once the time limit is over."""
        with Progress(len(items), show=self._progress) as bar:
            for k, item in enumerate(items):
                if k and self.spent:
                    self.complete = False
                    return
                yield item
                bar.update(k + 1, text)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A new generator with the scan's seed."""
        return torch.Generator(device).manual_seed(self.seed)


class ModelDetector(Shown, ABC):
    """Says whether a network has a backdoor. A method fills `_scan`."""

    needs_clean: ClassVar[bool] = True
    """Whether a scan takes clean examples, or may do without."""

    pixels: ClassVar[bool] = False
    """Whether it works on images in [0, 1], so that a command puts the normalisation into the network first."""

    @abstractmethod
    def _scan(self, model: nn.Module, clean: Pair | None, scan: Scan) -> ModelVerdict:
        """The verdict on a network.

        Args:
            model: the network, a copy in evaluation mode whose parameters are frozen.
            clean: inputs `[N, ...]` and labels `[N]` on the CPU, or `None` where the method can do without.
            scan: seed, time limit, progress. Long loops go through `scan.items`.
        """

    def pictures(self, verdict: ModelVerdict, classes: Sequence[str]) -> list[tuple[Any, str]]:
        """Matplotlib figures of a verdict with their captions, for a report; `classes` names the network's."""
        return []

    def scan(
        self,
        model: nn.Module,
        clean: Any | None = None,
        *,
        seed: int = 0,
        budget_seconds: float | None = None,
        progress: bool | None = None,
    ) -> ModelVerdict:
        """The verdict on a network, which is left as it is.

        Args:
            model: the suspicious network.
            clean: examples that can be trusted: a pair of tensors, a data set or a loader of (x, y); or a tensor of
                inputs alone, which get the network's own labels.
            seed: seed of the scan; global generators are left where they were.
            budget_seconds: time limit, after which the verdict is given from what was looked at; `None` is none.
            progress: show a bar; `None` does so on a terminal.

        Raises:
            ValueError: if clean examples are needed and missing, hold NaN or have labels out of range.
        """
        if clean is None and self.needs_clean:
            raise ValueError(f"expected clean examples, got none: {type(self).__name__} cannot do without")
        run = Scan(seed, budget_seconds, progress)
        net = private(model, None)
        if isinstance(clean, Tensor):
            clean = (clean, labels_of(net, clean))
        examples = None if clean is None else collected(clean)
        with seeded(seed), untouched(net):
            verdict = self._scan(net, examples, run)
        if math.isnan(verdict.score) or math.isnan(verdict.threshold):
            raise ValueError(
                f"the scan's score is {verdict.score} against {verdict.threshold}: no verdict can be given"
            )
        if not run.complete:
            warnings.warn("the scan was cut short by its time limit and did not look at everything", stacklevel=2)
            verdict = replace(verdict, complete=False)
        return verdict


@dataclass(frozen=True)
class InvertedTrigger:
    """A trigger recovered from a network.

    Attributes:
        delta: what is added to an image.
        mask: where; `None` is everywhere.
        asr: from (model, images) to the share that the trigger sends to the target.
    """

    delta: Tensor
    mask: Tensor | None
    asr: Callable[[nn.Module, Tensor], float]


class TriggerInverter(Shown, ABC):
    """Recovers a trigger from a network."""

    @abstractmethod
    def invert(self, model: nn.Module, x: Tensor, target: int) -> InvertedTrigger:
        """The trigger that sends inputs `[N, ...]` to the class `target`; the network is left as it is."""


# What both kinds stand on


def private(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """A copy of a network that a method may do anything to: in evaluation mode, its parameters frozen."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a network, got {type(model).__name__}")
    net = copy.deepcopy(model).eval().requires_grad_(False)
    return net if device is None else net.to(device)


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Where a network is; where the input is if it has no parameters."""
    return next((p.device for p in model.parameters()), x.device)


def finite_rows(x: Tensor) -> Tensor:
    """Which inputs `[N, ...]` hold neither NaN nor infinity, bool `[N]`."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    # NaN and infinity survive a sum of magnitudes in float64.
    return x.flatten(1).abs().sum(1, dtype=torch.float64).isfinite() if x.dim() > 1 else x.isfinite()


def collected(clean: Any) -> Pair:
    """All clean examples as two tensors on the CPU.

    Raises:
        ValueError: if labels are not integers `[N]`, or inputs hold NaN.
    """
    x, y = gathered(clean, "cpu")
    if y.is_floating_point() or y.dim() != 1:
        raise ValueError(f"expected integer labels [N], got {y.dtype} of shape {tuple(y.shape)}")
    if not bool(finite_rows(x).all()):
        raise ValueError("the clean examples hold NaN or infinite values")
    return x, y


def checked_classes(outputs: Tensor, y: Tensor) -> int:
    """Number of classes of a network with such outputs, whose labels are `y`."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(f"expected logits [N, C] of at least 2 classes, got shape {tuple(outputs.shape)}")
    classes = outputs.shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    if len(y.unique()) < 2:
        raise ValueError(f"expected examples of at least two classes, got class {int(y[0])} alone")
    return classes


def fingerprint(model: nn.Module) -> str:
    """A digest of a network's state dict."""
    digest = sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
