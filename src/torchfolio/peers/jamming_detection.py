"""1,000 blocks made and 500 turned into features, against one at a time with NumPy, SciPy and PyWavelets."""

from __future__ import annotations

import importlib.util

import torch

from torchfolio.applications import nr
from torchfolio.applications.jamming_detection import SSBFeatures, simulate
from torchfolio.experiments._captures import features_of_a_capture
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    cells = torch.arange(1000)
    nr.ssb_grid(cells)
    bench.compare("generate 1,000 blocks", ours=lambda: nr.ofdm_modulate(nr.ssb_grid(cells)),
                  one_by_one=lambda: [nr.ofdm_modulate(nr.ssb_grid(int(c))) for c in cells])  # fmt: skip
    if importlib.util.find_spec("pywt") is None:
        return
    iq = simulate(500).iq
    samples, single = iq.numpy(), features_of_a_capture()
    features = SSBFeatures(correct_cfo=False)
    bench.compare(
        "features of 500 captures", ours=lambda: features.transform(iq), numpy_pywt=lambda: [single(x) for x in samples]
    )
