"""Simulated captures of synchronisation blocks, and their features: of many at once, and of one as a script would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from torchfolio.applications import nr
from torchfolio.applications.jamming_detection import Channel, SSBDataset, SSBFeatures, simulate
from torchfolio.runs import Run

Band = tuple[float, float]


DRAWS = 6  # data sets of a seed


def drawn(run: Run[Any], number: int, n: int, sjr: Band | None = None, jammer: Any = None) -> SSBDataset:
    """Captures of a number; no other data set of an arm has them, and none of another seed."""
    s = run.settings
    generator = torch.Generator().manual_seed(DRAWS * run.seed + number)
    return simulate(
        n, s.snr, s.sjr if sjr is None else sjr, jammer, Channel(s.taps, cfo=s.cfo), burst=s.blocks, generator=generator
    )


def joined(*parts: SSBDataset) -> SSBDataset:
    """Captures of several data sets, one after another."""
    return SSBDataset(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(SSBDataset)))


def table(data: SSBDataset) -> np.ndarray:
    """Features of all captures."""
    return SSBFeatures().transform(data.iq)


def features_of_a_capture() -> Callable[[np.ndarray], Any]:
    """From samples to wavelets of the correlation with the synchronisation sequence, and energies of empty elements."""
    import pywt  # pyright: ignore[reportMissingImports]

    mask = nr.null_mask().numpy()
    grid = torch.zeros(3, 1, nr.CARRIERS, dtype=torch.complex64)
    grid[:, 0, nr.SYNC] = nr.pss(torch.arange(3)).to(grid.dtype)
    roots = nr.ofdm_modulate(grid, cyclic_prefix=0).numpy()

    def single(x: np.ndarray) -> Any:
        correlation = [np.abs(np.correlate(x, root, "valid")) for root in roots]
        power = np.convolve(np.abs(x) ** 2, np.ones(nr.FFT_SIZE), "valid") ** 0.5
        window = np.pad(max(correlation, key=np.max) / power, 32)[18:82]
        elements = np.fft.fftshift(np.fft.fft(x.reshape(4, -1)[:, 18:], norm="ortho"), axes=-1)[:, 8:248]
        return pywt.wavedec(window, "db4", "symmetric", 2)[:2], np.abs(elements[mask]) ** 2

    return single
