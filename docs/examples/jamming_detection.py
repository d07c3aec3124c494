"""Train a jamming detector for one kind of jammer, read a capture from a file, and say whether it is jammed."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from torchfolio.applications import DTDDNN, Channel, Pulsed, SSBFeatures, detection_report, read_iq, simulate

generator = torch.Generator().manual_seed(0)
channel = Channel(taps=3, cfo=0.05, timing=40)


def blocks(n):
    """Synchronisation blocks through a fading channel, half of them under a pulsed jammer."""
    return simulate(
        n, snr_db=(19.0, 21.0), sjr_db=(10.0, 25.0), jammer=Pulsed(0.3), channel=channel, generator=generator
    )


features, train, test = SSBFeatures(), blocks(600), blocks(400)
model = DTDDNN(epochs=15, folds=3, random_state=0).fit(features.transform(train.iq), train.label, train.sjr)
bands = ((10, 15), (15, 20), (20, 25))
report = detection_report(model, features.transform(test.iq), test.label, test.sjr, bands=bands)
print(report[["n", "alarms", "second_stage"]].round(2))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "capture.npy"
    np.save(path, test.iq[:5].numpy())
    captured = features.transform(read_iq(path))
print("jammed:", model.predict(captured).tolist(), "in truth:", test.label[:5].tolist())
