"""Received synchronisation blocks: cells, channels, thermal noise and jammers, simulated or read from a file."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.applications import nr
from torchfolio.shown import Shown

__all__ = [
    "Barrage", "Channel", "Jammer", "PartialBand", "Pulsed", "SSBDataset", "Spoofing", "Tones", "read_iq", "simulate",
]  # fmt: skip

LENGTH = nr.SYMBOLS * (nr.FFT_SIZE + nr.CYCLIC_PREFIX)  # samples of a block
Range = float | tuple[float, float]


class Jammer(Shown, ABC):
    """A source of interference. Its power over a block's 960 elements is 1 each on average."""

    @abstractmethod
    def signal(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples `[count, LENGTH]` of complex64 during a block."""


def _gauss(*shape: int, generator: torch.Generator) -> Tensor:
    """Complex normal numbers of power 1."""
    return torch.view_as_complex(torch.randn(*shape, 2, generator=generator)) * 0.5**0.5


@dataclass(frozen=True)
class Barrage(Jammer):
    """White noise over the block's 240 carriers."""

    def signal(self, count: int, generator: torch.Generator) -> Tensor:
        return nr.ofdm_modulate(_gauss(count, nr.SYMBOLS, nr.CARRIERS, generator=generator))


@dataclass(frozen=True)
class PartialBand(Jammer):
    """White noise over the 127 carriers of the synchronisation signals, which leaves the empty elements empty.

    Attributes:
        timed: whether it is on during symbol 0 alone, with all its power there.
    """

    timed: bool = False

    def signal(self, count: int, generator: torch.Generator) -> Tensor:
        grid = torch.zeros(count, nr.SYMBOLS, nr.CARRIERS, dtype=torch.complex64)
        last = 1 if self.timed else nr.SYMBOLS
        scale = math.sqrt(nr.SYMBOLS * nr.CARRIERS / (last * 127))
        grid[:, :last, nr.SYNC] = scale * _gauss(count, last, 127, generator=generator)
        return nr.ofdm_modulate(grid)


@dataclass(frozen=True)
class Tones(Jammer):
    """Sine waves at random frequencies of the band.

    Attributes:
        tones: number of them.
    """

    tones: int = 1

    def __post_init__(self) -> None:
        checks.whole("tones", self.tones, 1)

    def signal(self, count: int, generator: torch.Generator) -> Tensor:
        places = torch.rand(count, self.tones, 1, generator=generator) - 0.5
        angles = torch.rand(count, self.tones, 1, generator=generator)
        cycles = places * nr.CARRIERS / nr.FFT_SIZE * torch.arange(LENGTH) + angles
        amplitude = math.sqrt(nr.CARRIERS / nr.FFT_SIZE / self.tones)
        return amplitude * torch.polar(torch.ones(()), 2 * math.pi * cycles).sum(1)


@dataclass(frozen=True)
class Pulsed(Jammer):
    """White noise in one pulse at a random time.

    Attributes:
        duty: share of the time that it is on, in (0, 1].
    """

    duty: float = 0.25

    def __post_init__(self) -> None:
        checks.between("duty", self.duty, 0, 1, inclusive=(False, True))

    def signal(self, count: int, generator: torch.Generator) -> Tensor:
        on = max(1, round(self.duty * LENGTH))
        start = torch.randint(LENGTH, (count, 1), generator=generator)
        gate = (torch.arange(LENGTH) - start) % LENGTH < on
        power = nr.CARRIERS / nr.FFT_SIZE * LENGTH / on
        return math.sqrt(power) * gate * _gauss(count, LENGTH, generator=generator)


@dataclass(frozen=True)
class Spoofing(Jammer):
    """A synchronisation signal of another cell, sent in symbol 0 at a random phase."""

    def signal(self, count: int, generator: torch.Generator) -> Tensor:
        grid = torch.zeros(count, nr.SYMBOLS, nr.CARRIERS, dtype=torch.complex64)
        roots = torch.randint(3, (count,), generator=generator)
        phase = torch.polar(torch.ones(()), 2 * math.pi * torch.rand(count, 1, generator=generator))
        grid[:, 0, nr.SYNC] = math.sqrt(nr.SYMBOLS * nr.CARRIERS / 127) * phase * nr.pss(roots)
        return nr.ofdm_modulate(grid)


@dataclass(frozen=True)
class Channel:
    """What happens to a signal on its way; nothing by default.

    Attributes:
        taps: number of paths with exponentially falling power and Rayleigh fading, one sample apart; 1 is a flat channel
            of power 1 without fading.
        decay: factor of the power from one path to the next, in (0, 1].
        cfo: largest offset of the carrier frequency, as a share of the subcarrier spacing; drawn in ± this.
        phase_noise: standard deviation of the phase's random walk over one symbol, in radians.
        timing: largest number of samples before the block; drawn from 0 to this, and the capture is longer by it.
    """

    taps: int = 1
    decay: float = 0.5
    cfo: float = 0.0
    phase_noise: float = 0.0
    timing: int = 0

    def __post_init__(self) -> None:
        checks.whole("taps", self.taps, 1)
        checks.between("decay", self.decay, 0, 1, inclusive=(False, True))
        checks.between("cfo", self.cfo, 0, 0.5)
        checks.at_least("phase_noise", self.phase_noise, 0)
        checks.whole("timing", self.timing, 0)

    def apply(self, signal: Tensor, generator: torch.Generator) -> Tensor:
        """Pass blocks `[N, T]` through paths, frequency offsets and phase noise of their own."""
        n, length = signal.shape
        if self.taps > 1:
            power = self.decay ** torch.arange(self.taps)
            paths = _gauss(n, self.taps, generator=generator) * (power / power.sum()).sqrt()
            signal = sum(
                (
                    paths[:, k, None] * torch.nn.functional.pad(signal[:, : length - k], (k, 0))
                    for k in range(self.taps)
                ),
                torch.zeros_like(signal),
            )
        phase = torch.zeros(n, length)
        if self.cfo:
            offset = self.cfo * (2 * torch.rand(n, 1, generator=generator) - 1)
            phase = phase + 2 * math.pi * offset * torch.arange(length) / nr.FFT_SIZE
        if self.phase_noise:
            walk = torch.randn(n, length, generator=generator).cumsum(1)
            phase = phase + self.phase_noise / math.sqrt(nr.FFT_SIZE) * walk
        return signal * torch.polar(torch.ones(()), phase)


@dataclass(frozen=True, repr=False)
class SSBDataset(Shown):
    """Received blocks.

    Attributes:
        iq: samples, complex64, `[N, T]`, or `[N, blocks, T]` for bursts of several.
        label: 1 where there is a jammer, `[N]`.
        cell_id: number of the cell, `[N]`.
        sjr: signal to jammer ratio in dB, infinite where there is none, `[N]`.
        snr: signal to noise ratio in dB, `[N]`.
        timing: sample at which the block begins, `[N]`.
    """

    iq: Tensor
    label: Tensor
    cell_id: Tensor
    sjr: Tensor
    snr: Tensor
    timing: Tensor

    def __len__(self) -> int:
        return len(self.iq)


def simulate(
    n: int,
    snr_db: Range = 22.0,
    sjr_db: Range = (15.0, 30.0),
    jammer: Jammer | None = None,
    channel: Channel | None = None,
    *,
    burst: int = 1,
    jammed: float = 0.5,
    generator: torch.Generator | None = None,
) -> SSBDataset:
    """Draw received blocks $r = h * s + j + w$ of random cells.

    Powers are those of one resource element: a signal of power 1, noise of power $10^{-\\mathrm{SNR}/10}$, a jammer of mean
    power $10^{-\\mathrm{SJR}/10}$ over the block's 960 elements.

    Args:
        n: number of captures.
        snr_db: signal to noise ratio, or a range that it is drawn from for every capture (an uncertain noise floor).
        sjr_db: signal to jammer ratio, or a range.
        jammer: kind of jammer; `Barrage` by default.
        channel: way of the signal; none by default.
        burst: number of blocks in a capture, 1 to 8.
        jammed: share of captures with a jammer.
        generator: source of all draws; one with seed 0 by default.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> simulate(10, snr_db=(21.5, 22.5)).iq.shape
        torch.Size([10, 1096])
    """
    checks.whole("n", n, 1)
    checks.whole("burst", burst, 1, 8)
    checks.between("jammed", jammed, 0, 1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    jammer, channel = Barrage() if jammer is None else jammer, Channel() if channel is None else channel
    cell = torch.randint(nr.CELLS, (n,), generator=generator)
    label = torch.zeros(n, dtype=torch.int64)
    label[torch.randperm(n, generator=generator)[: round(jammed * n)]] = 1
    snr, sjr = _drawn("snr_db", snr_db, n, generator), _drawn("sjr_db", sjr_db, n, generator)
    sjr = torch.where(label == 1, sjr, torch.inf)
    index = torch.arange(burst).repeat(n)
    grids = nr.ssb_grid(cell.repeat_interleave(burst), index, generator=generator)
    blocks = channel.apply(nr.ofdm_modulate(grids), generator).view(n, burst, LENGTH)
    timing = torch.randint(channel.timing + 1, (n,), generator=generator)
    total = LENGTH + channel.timing
    amplitude = (10 ** (-sjr / 20))[:, None, None]
    here = torch.zeros(n, burst, total, dtype=torch.complex64)
    places = (timing[:, None] + torch.arange(LENGTH))[:, None].expand(n, burst, LENGTH)
    interference = amplitude * jammer.signal(n * burst, generator).view(n, burst, LENGTH)
    here.scatter_(2, places, blocks + interference)
    iq = here + (10 ** (-snr / 20))[:, None, None] * _gauss(n, burst, total, generator=generator)
    return SSBDataset(iq if burst > 1 else iq[:, 0], label, cell, sjr, snr, timing)


def _drawn(name: str, value: Range, n: int, generator: torch.Generator) -> Tensor:
    low, high = value if isinstance(value, tuple) else (value, value)
    checks.finite(name, low)
    checks.at_least(f"upper end of {name}", checks.finite(name, high), low)
    return low + (high - low) * torch.rand(n, generator=generator)


def read_iq(path: str | Path, sample_rate: float | None = None) -> Tensor:
    """Read captured samples.

    Args:
        path: `.npy` with complex numbers, a SigMF recording (`.sigmf-meta` or `.sigmf-data`, in `cf32_le` or `ci16_le`),
            or raw interleaved float32 (any other suffix).
        sample_rate: rate in Hz that is expected; a recording that says another one is refused.

    Returns:
        complex64, `[T]`, or as the array is shaped.

    Raises:
        ValueError: if the samples are real, not finite, or have another rate or format.
    """
    path = Path(path)
    if path.suffix == ".npy":
        samples = np.load(path, allow_pickle=False)
    elif path.suffix in (".sigmf-meta", ".sigmf-data"):
        about = json.loads(path.with_suffix(".sigmf-meta").read_text())["global"]
        rate, kind = about.get("core:sample_rate"), about.get("core:datatype")
        if sample_rate is not None and rate is not None and not math.isclose(rate, sample_rate, rel_tol=1e-6):
            raise ValueError(f"expected samples at {sample_rate:g} Hz, got a recording at {rate:g} Hz")
        checks.one_of("datatype of the recording", kind, ("cf32_le", "ci16_le"))
        raw = np.fromfile(path.with_suffix(".sigmf-data"), dtype="<f4" if kind == "cf32_le" else "<i2")
        samples = _pairs(raw.astype(np.float32) / (1 if kind == "cf32_le" else 32768))
    else:
        samples = _pairs(np.fromfile(path, dtype="<f4"))
    if not np.iscomplexobj(samples):
        raise ValueError(f"expected complex samples in {path.name}, got {samples.dtype}")
    return checks.finite(
        f"samples of {path.name}", torch.from_numpy(np.ascontiguousarray(samples.astype(np.complex64)))
    )


def _pairs(values: np.ndarray) -> np.ndarray:
    if not len(values) or len(values) % 2:
        raise ValueError(f"expected pairs of real and imaginary parts, got {len(values)} numbers")
    return values[::2] + 1j * values[1::2]
