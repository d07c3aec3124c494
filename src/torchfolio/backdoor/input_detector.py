"""Filters in front of a network: the base class that owns calibration, thresholds, and files."""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchfolio import measure
from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.suspects import Pair, checked_classes, collected, device_of, fingerprint, finite_rows, private
from torchfolio.checks import between, whole
from torchfolio.engine.modes import seeded
from torchfolio.measure import untouched
from torchfolio.shown import Shown

__all__ = ["InputDetector", "Judgement"]

FORMAT = 2
NAME = "detector"


@dataclass(frozen=True, repr=False)
class Judgement(Shown):
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
        device: device that the method works on; where the network is by default.

    Attributes:
        model_: network that is filtered, a copy.
        threshold_: threshold at `fpr`.
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
            between(name, value, 0, 1, inclusive=False)
        whole("seed", seed)
        self.fpr, self.calib_frac, self.seed, self.device = fpr, calib_frac, seed, device

    @abstractmethod
    def _fit(self, model: nn.Module, clean: Pair) -> None:
        """Learn from clean examples.

        Args:
            model: network, a copy in evaluation mode whose parameters are frozen; it is the later `model_`.
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
            model: suspicious network, from inputs to logits `[N, C]`.
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
        outputs = measure.outputs(net, x)
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
            values = torch.cat(parts)
            if values.shape != (len(good),):
                raise ValueError(f"expected a score for each of {len(good)} inputs, got shape {tuple(values.shape)}")
            scores[finite.cpu()] = torch.where(values.isnan(), math.inf, values)
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
        record = json.loads(json.dumps(record))
        record["sha256"] = _digest(record, path.read_bytes())
        (folder / f"{NAME}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return folder

    def _state_of(self, name: str, net: nn.Module) -> dict[str, Tensor]:
        state, expected = net.state_dict(), self.model_.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
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
            detector = cls(**record["settings"])
        except TypeError as error:
            raise ValueError(f"the settings in {folder} are not those of {cls.__name__}: {error}") from error
        detector.model_ = private(model, None)
        detector._restore(record["values"], tensors)
        missing = [n for n in ("calibration_", "num_classes_", "input_shape_") if n not in vars(detector)]
        if missing:
            raise ValueError(f"the filter in {folder} lacks {', '.join(missing)}")
        detector.input_shape_ = tuple(detector.input_shape_)
        detector.threshold_ = detector.threshold(detector.fpr)
        return detector

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


def _digest(record: Mapping[str, Any], content: bytes) -> str:
    """Of a record as JSON has it, without its digest, and of the tensors beside it."""
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True)
    return sha256(text.encode() + b"\0" + content).hexdigest()


def _read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        record = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / f'{NAME}.json'} is not JSON: {error}") from error
    types = {"format": int, "detector": str, "network": str, "settings": dict, "values": dict, "sha256": str}
    if not isinstance(record, dict) or any(not isinstance(record.get(k), kind) for k, kind in types.items()):
        raise ValueError(f"{folder / f'{NAME}.json'} is not the record of a filter; it holds {', '.join(types)}")
    if record["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT} in {folder}, got {record['format']}")
    if record["detector"] != name:
        raise ValueError(f"expected a filter of {name} in {folder}, got one of {record['detector']}")
    content = (folder / f"{NAME}.safetensors").read_bytes()
    if _digest(record, content) != record["sha256"]:
        raise ValueError(f"{NAME}.json or {NAME}.safetensors in {folder} was changed after it was written")
    try:
        return record, load(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / f'{NAME}.safetensors'} is not a readable safetensors file: {error}") from error
