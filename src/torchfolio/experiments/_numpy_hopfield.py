"""Sweeps of a Hopfield network as one writes them with NumPy."""

from __future__ import annotations

import numpy as np


def one_by_one(J: np.ndarray, states: np.ndarray, sweeps: int = 10) -> None:
    """One state after the other, `[N, spins]`, spins in random order."""
    for state in states:
        for _ in range(sweeps):
            for i in np.random.permutation(len(state)):  # noqa: NPY002
                h = J[i] @ state
                if h:
                    state[i] = 1.0 if h > 0 else -1.0


def all_at_once(J: np.ndarray, states: np.ndarray, sweeps: int = 10) -> None:
    """All states, `[spins, N]`, in the same random order."""
    for _ in range(sweeps):
        for i in np.random.permutation(len(states)):  # noqa: NPY002
            h = J[i] @ states
            states[i] = np.where(h == 0, states[i], np.sign(h))
