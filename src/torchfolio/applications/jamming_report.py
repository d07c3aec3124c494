"""How well a detector of jammers does, by how weak they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchfolio.applications.jamming_features import EPNREDetector

__all__ = ["detection_report"]

BANDS = ((15.0, 20.0), (20.0, 25.0), (25.0, 30.0))


def detection_report(
    model: Any, X: Any, y: Any, sjr: Any, snr_db: float | None = None, bands: Sequence[tuple[float, float]] = BANDS
) -> Any:
    """How well a detector does by the jammer's weakness, beside the best energy detector.

    Args:
        model: fitted classifier with `predict`; a `DTDDNN` also says how often its second network decides.
        X: features `[N, F]`.
        y: 1 where there is a jammer, `[N]`.
        sjr: signal to jammer ratios in dB, `[N]`.
        snr_db: signal to noise ratio; with it the table has the detection rate of an `EPNREDetector` that knows it, at the
            same false alarm rate.
        bands: ranges of the ratio, in dB.

    Returns:
        A DataFrame, a row for each band and one for clean captures: number, detection or false alarm rate, accuracy, share
        that the second network decided, bound.

    Raises:
        ValueError: if there are no clean captures.
    """
    import pandas as pd

    y, sjr = np.asarray(y), np.asarray(sjr, dtype=float)
    alarm = np.asarray(model.predict(X)) == np.max(getattr(model, "classes_", 1))
    stage = model.decision_path(X) if hasattr(model, "n_ambiguous_") else np.ones(len(y))
    if not (y == 0).any():
        raise ValueError("expected some clean captures, to have a false alarm rate")
    pfa = float(alarm[y == 0].mean())
    rows = {}
    for low, high in bands:
        inside = (y == 1) & (sjr >= low) & ((sjr < high) | ((sjr == high) & (high == bands[-1][1])))
        bound = np.nan
        if snr_db is not None and inside.any() and 0 < pfa < 1:
            bound = float(EPNREDetector(pfa).power(10 ** (-snr_db / 10), 10 ** (-sjr[inside] / 10)).mean())
        rate = float(alarm[inside].mean()) if inside.any() else np.nan
        rows[f"{low:g} to {high:g} dB"] = (int(inside.sum()), rate, rate, _mean(stage[inside] == 2), bound)
    clean = y == 0
    rows["clean"] = (int(clean.sum()), pfa, 1 - pfa, _mean(stage[clean] == 2), np.nan)
    columns = ["n", "alarms", "accuracy", "second_stage", "energy_bound"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else np.nan
