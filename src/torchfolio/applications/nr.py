"""The synchronisation block of a 5G cell (SSB) as the standard has it, for many cells at once.

A block is a grid of 4 OFDM symbols by 240 subcarriers: the primary synchronisation signal (PSS) in symbol 0, the
secondary one (SSS) in symbol 2, the broadcast channel (PBCH) with its reference signals (DM-RS) around them, and 130
elements that stay empty.

Reference:
    3GPP TS 38.211, Sections 5.2.1 (Gold sequences), 7.3.3 (PBCH), 7.4.1.4 (DM-RS), 7.4.2 (PSS, SSS), 7.4.3 (SS/PBCH block).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio import checks

__all__ = [
    "CARRIERS", "CELLS", "CYCLIC_PREFIX", "FFT_SIZE", "SYMBOLS", "SYNC", "dmrs", "dmrs_mask", "gold", "null_mask",
    "ofdm_demodulate", "ofdm_modulate", "pbch_mask", "pss", "ssb_grid", "sss",
]  # fmt: skip

SYMBOLS = 4
"""Symbols of a block."""
CARRIERS = 240
"""Subcarriers of a block."""
CELLS = 1008
"""Identities that a cell may have."""
FFT_SIZE = 256
"""Samples of a symbol: 7.68 MHz at 30 kHz."""
CYCLIC_PREFIX = 18
"""Samples of the normal prefix, that of all symbols but a slot's first."""
SYNC = slice(56, 183)
"""Subcarriers of the primary and secondary synchronisation signals."""
SKIPPED = 1600  # entries of a Gold sequence that are left out
PAYLOAD = 864  # bits of a PBCH


def pss(n2: int | Tensor) -> Tensor:
    """Primary synchronisation signal of $N_{ID}^{(2)}$, $d(n) = 1 - 2 x((n + 43 N_{ID}^{(2)}) \\bmod 127)$.

    Args:
        n2: 0, 1 or 2; several at once as a tensor `[...]` of whole numbers.

    Returns:
        ±1, `[..., 127]`.

    Raises:
        ValueError: if a number is out of range.
    """
    return _pss_table()[_whole("n2", n2, 2)]


def sss(cell_id: int | Tensor) -> Tensor:
    """Secondary synchronisation signal of a cell, ±1, `[..., 127]`.

    $d(n) = (1 - 2 x_0((n + m_0) \\bmod 127)) (1 - 2 x_1((n + m_1) \\bmod 127))$ with $N_{ID} = 3 N^{(1)} + N^{(2)}$,
    $m_0 = 15 \\lfloor N^{(1)} / 112 \\rfloor + 5 N^{(2)}$ and $m_1 = N^{(1)} \\bmod 112$.

    Args:
        cell_id: $N_{ID}$, 0 to 1007; several at once as a tensor.

    Raises:
        ValueError: if a number is out of range.
    """
    return _sss_table()[_whole("cell_id", cell_id, CELLS - 1)]


def gold(c_init: int | Tensor, length: int) -> Tensor:
    """Pseudo-random bits, a Gold sequence of length 31 without its first 1,600 entries: `[..., length]` of int64.

    Args:
        c_init: start of the second register, 0 to $2^{31} - 1$; several at once as a tensor.
        length: number of bits.
    """
    start = _whole("c_init", c_init, 2**31 - 1)
    first, second = _registers(checks.whole("length", length, 1))
    bits = (start[..., None] >> torch.arange(31)) & 1
    # The register is linear: its output is the sum of those of the bits that it starts with.
    return (first + (bits.double() @ second).long()) % 2


def dmrs(cell_id: int | Tensor, issb: int | Tensor = 0) -> Tensor:
    """Reference signals of the PBCH, QPSK, `[..., 144]` of complex64.

    Args:
        cell_id: 0 to 1007.
        issb: index of the block in its burst, 0 to 7.
    """
    cell = _whole("cell_id", cell_id, CELLS - 1)
    i = _whole("issb", issb, 7) + 1
    return _qpsk(gold((i * (cell // 4 + 1) << 11) + (i << 6) + cell % 4, 288))


def null_mask() -> Tensor:
    """Elements of a block that are empty by standard: `[4, 240]`, 113 in symbol 0 and 17 in symbol 2."""
    mask = torch.zeros(SYMBOLS, CARRIERS, dtype=torch.bool)
    mask[0] = True
    mask[2, 48:192] = True
    mask[[0, 2], SYNC] = False
    return mask


def pbch_mask() -> Tensor:
    """Elements of the PBCH with its reference signals: `[4, 240]`, 576 of them."""
    mask = ~null_mask()
    mask[[0, 2], SYNC] = False
    return mask


def dmrs_mask(cell_id: int | Tensor) -> Tensor:
    """Elements of the reference signals: every fourth of the PBCH, from $N_{ID} \\bmod 4$ on; `[..., 4, 240]`."""
    shift = _whole("cell_id", cell_id, CELLS - 1)[..., None, None] % 4
    return pbch_mask() & (torch.arange(CARRIERS) % 4 == shift)


def ssb_grid(
    cell_id: int | Tensor,
    issb: int | Tensor = 0,
    payload: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whole blocks, every element that is not empty with power 1.

    Args:
        cell_id: 0 to 1007, one or `[N]`.
        issb: index of the block in its burst, 0 to 7, one or `[N]`.
        payload: bits of the PBCH before scrambling, `[N, 864]`; random ones if none are given.
        generator: source of random bits.

    Returns:
        Grids `[N, 4, 240]` of complex64 (`[4, 240]` for one cell).

    Raises:
        ValueError: if a number is out of range or the payload has another shape.
    """
    cell = _whole("cell_id", cell_id, CELLS - 1)
    cells, index = torch.broadcast_tensors(torch.atleast_1d(cell), _whole("issb", issb, 7))
    n = len(cells)
    if payload is None:
        payload = torch.randint(2, (n, PAYLOAD), generator=generator)
    elif payload.shape[-1] != PAYLOAD or payload.numel() != n * PAYLOAD:
        raise ValueError(f"expected {PAYLOAD} bits of payload a block, [{n}, {PAYLOAD}], got {list(payload.shape)}")
    # Scrambled by the part of the cell's sequence that belongs to the block's index.
    symbols = _qpsk(payload.view(n, PAYLOAD).to(torch.uint8) ^ _scrambling()[cells, index])
    grid = torch.zeros(n, SYMBOLS * CARRIERS, dtype=torch.complex64)
    reference = dmrs_mask(cells).flatten(1)
    grid[reference] = dmrs(cells, index).flatten()
    grid[pbch_mask().flatten() & ~reference] = symbols.flatten()
    grid = grid.view(n, SYMBOLS, CARRIERS)
    grid[:, 0, SYNC], grid[:, 2, SYNC] = pss(cells % 3).to(grid.dtype), sss(cells).to(grid.dtype)
    return grid if cell.dim() or torch.as_tensor(issb).dim() else grid[0]


def ofdm_modulate(grid: Tensor, fft_size: int = FFT_SIZE, cyclic_prefix: int = CYCLIC_PREFIX) -> Tensor:
    """Time signal of OFDM symbols, by a unitary transform with the carriers in its middle and a cyclic prefix.

    Args:
        grid: `[..., symbols, carriers]`.
        fft_size: samples of a symbol.
        cyclic_prefix: samples that are repeated before it.

    Returns:
        `[..., symbols * (cyclic_prefix + fft_size)]`.

    Raises:
        ValueError: if the transform is smaller than the grid.
    """
    low = _low(grid.shape[-1], fft_size)
    spectrum = grid.new_zeros(*grid.shape[:-1], fft_size)
    spectrum[..., low : low + grid.shape[-1]] = grid
    signal = torch.fft.ifft(torch.fft.ifftshift(spectrum, dim=-1), norm="ortho")
    return torch.cat([signal[..., fft_size - cyclic_prefix :], signal], -1).flatten(-2)


def ofdm_demodulate(
    signal: Tensor,
    carriers: int = CARRIERS,
    fft_size: int = FFT_SIZE,
    cyclic_prefix: int = CYCLIC_PREFIX,
) -> Tensor:
    """The inverse of `ofdm_modulate`, `[..., symbols, carriers]`; the signal begins with a prefix.

    Raises:
        ValueError: if its length is no whole number of symbols.
    """
    length = fft_size + cyclic_prefix
    if not signal.shape[-1] or signal.shape[-1] % length:
        raise ValueError(f"expected a whole number of symbols of {length} samples, got {signal.shape[-1]} samples")
    low = _low(carriers, fft_size)
    symbols = signal.unflatten(-1, (-1, length))[..., cyclic_prefix:]
    return torch.fft.fftshift(torch.fft.fft(symbols, norm="ortho"), dim=-1)[..., low : low + carriers]


def _low(carriers: int, fft_size: int) -> int:
    if checks.whole("fft_size", fft_size, 1) < carriers:
        raise ValueError(f"expected a transform of at least {carriers} samples, got {fft_size}")
    return (fft_size - carriers) // 2


def _whole(name: str, value: Any, high: int) -> Tensor:
    """Whole numbers from 0 to `high` as an int64 tensor."""
    values = torch.as_tensor(value)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"expected {name} to be whole numbers, got {values.dtype}")
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) <= high):
        raise ValueError(f"expected {name} from 0 to {high}, got {int(values.min())} to {int(values.max())}")
    return values.long()


def _qpsk(bits: Tensor) -> Tensor:
    pairs = (1 - 2 * bits.unflatten(-1, (-1, 2)).float()) * 0.5**0.5
    return torch.complex(pairs[..., 0], pairs[..., 1])


def _shift_register(start: list[int], taps: tuple[int, ...], length: int) -> np.ndarray:
    """Bits x(i + len(start)) = sum of x(i + tap), mod 2."""
    bits = np.zeros(length + len(start), dtype=np.int64)
    bits[: len(start)] = start
    for i in range(length):
        bits[i + len(start)] = bits[[i + tap for tap in taps]].sum() % 2
    return bits[:length]


@lru_cache(maxsize=1)
def _pss_table() -> Tensor:
    x = _shift_register([0, 1, 1, 0, 1, 1, 1], (4, 0), 127)
    return torch.from_numpy(np.stack([1 - 2 * np.roll(x, -43 * k) for k in range(3)])).float()


@lru_cache(maxsize=1)
def _sss_table() -> Tensor:
    x0, x1 = (1 - 2 * _shift_register([1, 0, 0, 0, 0, 0, 0], taps, 127) for taps in ((4, 0), (1, 0)))
    cells, n = np.arange(CELLS)[:, None], np.arange(127)
    n1, n2 = cells // 3, cells % 3
    m0, m1 = 15 * (n1 // 112) + 5 * n2, n1 % 112
    return torch.from_numpy(x0[(n + m0) % 127] * x1[(n + m1) % 127]).float()


@lru_cache(maxsize=1)
def _scrambling() -> Tensor:
    """Scrambling bits of every cell and index of a block, `[1008, 8, 864]` of uint8."""
    return gold(torch.arange(CELLS), 8 * PAYLOAD).to(torch.uint8).view(CELLS, 8, PAYLOAD)


@lru_cache(maxsize=8)
def _registers(length: int) -> tuple[Tensor, Tensor]:
    """The first register's output, and the second's for each bit that it may start with, `[31, length]`."""
    total = length + SKIPPED
    first = _shift_register([1, *[0] * 30], (3, 0), total)[SKIPPED:]
    rows = np.zeros((31, total + 31), dtype=np.int64)
    rows[:, :31] = np.eye(31, dtype=np.int64)
    for i in range(total):
        rows[:, i + 31] = (rows[:, i + 3] + rows[:, i + 2] + rows[:, i + 1] + rows[:, i]) % 2
    return torch.from_numpy(first), torch.from_numpy(rows[:, SKIPPED:total]).double()
