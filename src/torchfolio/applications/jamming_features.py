"""Features of received synchronisation blocks, and the exact law of the energy on their empty elements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import gamma
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.applications import nr
from torchfolio.applications.jamming_signals import LENGTH

__all__ = ["EPNREDetector", "SSBFeatures", "epnre", "pss_correlation", "wavelet"]

# Decomposition filters of Daubechies' wavelet with four vanishing moments.
LOW = (-0.010597401784997278, 0.032883011666982945, 0.030841381835986965, -0.18703481171888114, -0.02798376941698385,
       0.6308807679295904, 0.7148465705525415, 0.23037781330885523)  # fmt: skip
HIGH = tuple((-1) ** (k + 1) * value for k, value in enumerate(reversed(LOW)))
CHUNK = 256  # captures at a time: their transforms stay in the cache
NULLS = 130


def wavelet(x: Tensor, level: int = 2) -> tuple[Tensor, ...]:
    """Wavelet coefficients (db4, symmetric extension), as `pywt.wavedec` gives them.

    Args:
        x: real signals `[..., n]`.
        level: number of levels.

    Returns:
        Approximation of the last level, then details from the last to the first; each level halves the length,
        $\\lfloor (n + 7) / 2 \\rfloor$.

    Raises:
        ValueError: if a level's signal is shorter than the filters.
    """
    filters = torch.tensor([LOW, HIGH], dtype=x.dtype, device=x.device).flip(1)[:, None]
    details = []
    for _ in range(checks.whole("level", level, 1)):
        n = x.shape[-1]
        if n < len(LOW):
            raise ValueError(f"expected at least {len(LOW)} values at every level, got {n}")
        extended = torch.cat([x[..., :6].flip(-1), x, x[..., n - 7 :].flip(-1)], -1)
        both = F.conv1d(extended.reshape(-1, 1, n + 13), filters, stride=2).view(*x.shape[:-1], 2, -1)
        x, detail = both.unbind(-2)
        details.append(detail)
    return (x, *reversed(details))


def pss_correlation(iq: Tensor) -> Tensor:
    """Correlation with the three primary synchronisation signals, $|\\sum_n r(n + \\tau) p_k^*(n)| / (\\|r\\| \\|p_k\\|)$ in [0, 1].

    Args:
        iq: samples `[N, T]`.

    Returns:
        `[N, 3, T - 255]`, for every sample at which a symbol without its prefix may begin.
    """
    grid = torch.zeros(3, 1, nr.CARRIERS, dtype=iq.dtype)
    grid[:, 0, nr.SYNC] = nr.pss(torch.arange(3)).to(iq.dtype)
    roots = nr.ofdm_modulate(grid, cyclic_prefix=0)
    lags, size = iq.shape[-1] - nr.FFT_SIZE + 1, 2 ** math.ceil(math.log2(iq.shape[-1]))
    # The lags that are kept do not wrap around.
    spectrum = torch.fft.fft(iq, size)[:, None] * torch.fft.fft(roots, size).conj()
    correlation = torch.fft.ifft(spectrum)[..., :lags].abs()
    power = F.pad(iq.abs().square().double().cumsum(-1), (1, 0))
    energy = (power[:, nr.FFT_SIZE :] - power[:, : -nr.FFT_SIZE]).clamp_min(1e-30).sqrt().to(correlation.dtype)
    return correlation / (energy[:, None] * math.sqrt(127))


def epnre(iq: Tensor) -> Tensor:
    """Mean energy on the 130 empty elements of blocks that begin at the first sample: `[N, 4 * 274]` to `[N]`."""
    return nr.ofdm_demodulate(iq)[..., nr.null_mask()].abs().square().mean(-1)


@dataclass(frozen=True)
class EPNREDetector:
    """The best detector of white noise jamming that a known noise floor allows: a threshold on the empty elements' energy.

    Of n complex normal elements of power $\\sigma^2 + J$, n EPNRE / ($\\sigma^2 + J$) has the Gamma(n, 1) law. Hence the
    threshold $\\tau = \\sigma^2\\, \\Gamma_n^{-1}(1 - P_{fa}) / n$ and the detection rate $1 - \\Gamma_n(n \\tau / (\\sigma^2 + J))$.

    Args:
        pfa: false alarm rate, in (0, 1).
        n: number of elements that the energy is a mean of: 130 a block.

    Example:
        >>> round(float(EPNREDetector(0.01).power(noise=1e-2, jam=10**-2.5)), 3)
        0.807
    """

    pfa: float = 0.01
    n: int = NULLS

    def __post_init__(self) -> None:
        checks.between("pfa", self.pfa, 0, 1, inclusive=False)
        checks.whole("n", self.n, 1)

    def threshold(self, noise: Any) -> Any:
        """Energy above which there is a jammer, for a noise power (of several)."""
        return noise * gamma.ppf(1 - self.pfa, self.n) / self.n

    def power(self, noise: Any, jam: Any) -> Any:
        """Detection rate for a jammer's power an element."""
        return gamma.sf(self.n * self.threshold(noise) / (np.asarray(noise) + jam), self.n)

    def predict(self, energy: Any, noise: Any) -> np.ndarray:
        """1 where the energy says that there is a jammer."""
        return (np.asarray(energy) > self.threshold(noise)).astype(int)


class SSBFeatures(TransformerMixin, BaseEstimator):
    """From samples to a table: how well the synchronisation signal fits, and how empty the empty elements are.

    Wavelet coefficients of the correlation around its peak; the peak, how near the second root comes to it, and the
    root; energies on the empty elements (all, symbol 0, symbol 2) and on those of the synchronisation signal, as
    logarithms and as ratios.

    Args:
        window: number of lags around the peak.
        level: level of the wavelet transform; approximation and coarsest detail are kept.
        correct_cfo: whether the carrier's offset is estimated from the cyclic prefixes, and undone.
        sample_rate: rate in Hz of the samples.
        spacing: spacing of subcarriers in Hz; the rate must be 256 times this.

    Shapes:
        `transform(iq, cell_id=None, timing=None)` with complex iq `[N, T]` or bursts `[N, blocks, T]` (averaged); cell
        numbers `[N]` and first samples `[N]` where they are known, otherwise root and time are searched. To `[N, F]`.

    Raises:
        ValueError: if samples are real, not finite or shorter than a block (1,096), a time leaves no room for it, or rate
            and spacing do not fit.

    Reference:
        Asemian et al. 2024 (arXiv 2403.02645), Section IV, preprocessing block.
    """

    def __init__(
        self,
        window: int = 64,
        level: int = 2,
        correct_cfo: bool = True,
        sample_rate: float = 7.68e6,
        spacing: float = 30e3,
    ) -> None:
        self.window = window
        self.level = level
        self.correct_cfo = correct_cfo
        self.sample_rate = sample_rate
        self.spacing = spacing

    def fit(self, X: Any = None, y: Any = None) -> SSBFeatures:
        """Nothing is learned; the settings are checked."""
        self._check_settings()
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: those of the synchronisation signal begin with `pss`, the others with `epnre`."""
        approximation, detail = (part.shape[-1] for part in wavelet(torch.zeros(self.window), self.level)[:2])
        names = [f"pss_approximation_{k}" for k in range(approximation)] + [f"pss_detail_{k}" for k in range(detail)]
        names += ["pss_peak", "pss_second_root", "pss_root"]
        parts = ("all", "symbol_0", "symbol_2")
        return np.array(names + [f"epnre_{p}" for p in parts] + [f"epnre_ratio_{p}" for p in parts], dtype=object)

    @torch.no_grad()
    def transform(self, X: Any, cell_id: Any = None, timing: Any = None) -> np.ndarray:
        """Features of captures."""
        iq = self._checked(X)
        n, blocks = iq.shape[:2]
        flat = iq.reshape(n * blocks, -1)
        cell, start = (
            self._known(name, value, n, blocks) for name, value in (("cell_id", cell_id), ("timing", timing))
        )
        parts = [
            self._features(flat[k : k + CHUNK], *(None if t is None else t[k : k + CHUNK] for t in (cell, start)))
            for k in range(0, len(flat), CHUNK)
        ]
        correlation, energy = (torch.cat(part).unflatten(0, (n, blocks)).mean(1) for part in zip(*parts, strict=True))
        window, rest = correlation.split([self.window, 3], 1)
        nulls, sync = energy.split([3, 1], 1)
        logs = nulls.clamp_min(1e-30).log()
        table = torch.cat([*wavelet(window, self.level)[:2], rest, logs, logs - sync.clamp_min(1e-30).log()], 1)
        return table.double().numpy()

    def _check_settings(self) -> None:
        checks.whole("window", self.window, 16)
        checks.whole("level", self.level, 1)
        checks.positive("sample_rate", self.sample_rate)
        checks.positive("spacing", self.spacing)

    def _checked(self, X: Any) -> Tensor:
        self._check_settings()
        if not math.isclose(self.sample_rate, nr.FFT_SIZE * self.spacing, rel_tol=1e-6):
            raise ValueError(
                f"expected {nr.FFT_SIZE * self.spacing:g} samples a second for a spacing of {self.spacing:g} Hz, got "
                f"{self.sample_rate:g}: resample the capture"
            )
        iq = torch.as_tensor(X)
        if not iq.is_complex():
            raise ValueError(f"expected complex samples (I and Q), got {iq.dtype}")
        if iq.dim() not in (2, 3) or not len(iq) or iq.shape[-1] < LENGTH:
            raise ValueError(
                f"expected captures [N, T] or [N, blocks, T] of {LENGTH} samples or more, got {list(iq.shape)}"
            )
        return checks.finite("samples", iq).to(torch.complex64).view(len(iq), -1, iq.shape[-1])

    def _known(self, name: str, value: Any, n: int, blocks: int) -> Tensor | None:
        if value is None:
            return None
        tensor = torch.as_tensor(value)
        if tuple(tensor.shape) != (n,):
            raise ValueError(f"expected a {name} for each of {n} captures, got shape {list(tensor.shape)}")
        return tensor.long().repeat_interleave(blocks)

    def _features(self, iq: Tensor, cell: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Window of the correlation with peak, second root and root `[N, window + 3]`; energies `[N, 4]`."""
        room, prefix, n = iq.shape[-1] - LENGTH, nr.CYCLIC_PREFIX, len(iq)
        if start is not None and not (int(start.min()) >= 0 and int(start.max()) <= room):
            raise ValueError(
                f"expected blocks to begin at samples 0 to {room}, got {int(start.min())} to {int(start.max())}"
            )
        correlation = pss_correlation(iq)
        allowed = correlation[..., prefix : prefix + room + 1]  # where a whole block fits
        peaks, places = allowed.max(-1)
        if start is not None:
            places = start[:, None].expand(n, 3)
            peaks = allowed.gather(2, places[..., None])[..., 0]
        root = peaks.argmax(1) if cell is None else cell % 3
        begin = places.gather(1, root[:, None])[:, 0]
        own = correlation[torch.arange(n), root]
        lags = (begin + prefix)[:, None] + torch.arange(-(self.window // 2), self.window - self.window // 2)
        window = F.pad(own, (self.window, self.window)).gather(1, lags + self.window)
        peak = peaks.gather(1, root[:, None])
        second = peaks.scatter(1, root[:, None], -1.0).amax(1, keepdim=True) / peak.clamp_min(1e-12)
        block = iq.gather(1, begin[:, None] + torch.arange(LENGTH))
        elements = nr.ofdm_demodulate(self._tuned(block) if self.correct_cfo else block).abs().square()
        null = nr.null_mask()
        energies = [elements[:, null].mean(1), elements[:, 0, null[0]].mean(1), elements[:, 2, null[2]].mean(1)]
        energies.append(elements[:, 0, nr.SYNC].mean(1))
        return torch.cat([window, peak, second, root[:, None].float()], 1), torch.stack(energies, 1)

    def _tuned(self, block: Tensor) -> Tensor:
        """Without the carrier's offset: a prefix repeats the end of its symbol, turned by 2 pi a spacing."""
        symbols = block.unflatten(1, (nr.SYMBOLS, -1))
        turned = (symbols[..., : nr.CYCLIC_PREFIX].conj() * symbols[..., nr.FFT_SIZE :]).sum((1, 2)).angle()
        ramp = -turned[:, None] * torch.arange(LENGTH) / nr.FFT_SIZE
        return block * torch.polar(torch.ones(()), ramp)
