"""20 replicas of 2,000 spins through 10 sweeps: against dense NumPy networks, one state at a time and all at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchfolio.experiments._numpy_hopfield import all_at_once, one_by_one
from torchfolio.theory.multitasking_hopfield import MultitaskingHopfield, fill_blanks, sparse_patterns


def peers(bench: Any) -> None:
    patterns = sparse_patterns(2000, 3, 0.25)
    network, starts = MultitaskingHopfield().fit(patterns), fill_blanks(patterns[0], 20)
    J, states = network.couplings().numpy(), starts.numpy()
    bench.compare(
        "20 replicas of 2,000 spins, 10 sweeps",
        ours=lambda: network.relax(starts, 10, record_every=10),
        numpy_one_by_one=lambda: one_by_one(J, states.copy()),
        numpy_all_at_once=lambda: all_at_once(J, np.ascontiguousarray(states.T)),
    )
