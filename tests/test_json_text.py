"""JSON of whatever a result holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from torchfolio.json_text import plain, to_json


def test_numbers_of_every_library():
    value = {1: np.float32("nan"), "b": (np.int64(3), torch.tensor([0.5, torch.inf])), "c": np.bool_(True), "d": -0.0}
    assert json.loads(to_json(value)) == {"1": None, "b": [3, [0.5, None]], "c": True, "d": 0.0}
    assert plain(np.float64("inf")) is None
    assert type(plain(np.float64(2.5))) is float


def test_what_json_has_no_type_for_is_named():
    with pytest.raises(TypeError, match="object"):
        to_json({"a": object()})
