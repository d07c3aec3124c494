"""Spiking neural networks and the rules that train them.

A spiking network is an ordinary module that is called once for every time step, with neurons in place of
activations. The parts, one module each:

- `surrogates`: derivatives that stand in for the spike's: `Rectangle`, `Triangle`, `Sigmoid`, `ATan`.
- `neurons`: `LIF` and `IF`, which carry their potential from call to call.
- `state`: `reset_state` between sequences, `detach_state`, `SequenceDropout`.
- `encoders`: from static inputs to sequences: `repeat`, `poisson`, `latency`, `frames`.
- `sequence`: `run_sequence`, `multi_step`, and `Unrolled`, which makes an ordinary network of a spiking one.
- `conversion`: `to_spiking`, from ReLUs to neurons.
- `nets`: small reference networks.
- `bptt`: backpropagation through time, the rule that others are measured against.
"""

from torchfolio.catalog import doors
from torchfolio.spiking.conversion import to_spiking
from torchfolio.spiking.encoders import frames, latency, poisson, repeat
from torchfolio.spiking.neurons import IF, LIF
from torchfolio.spiking.sequence import Unrolled, multi_step, run_sequence
from torchfolio.spiking.state import SequenceDropout, detach_state, reset_state
from torchfolio.spiking.surrogates import ATan, Rectangle, Sigmoid, Triangle

__all__ = [
    "IF",
    "LIF",
    "ATan",
    "Rectangle",
    "SequenceDropout",
    "Sigmoid",
    "Triangle",
    "Unrolled",
    "detach_state",
    "frames",
    "latency",
    "multi_step",
    "poisson",
    "repeat",
    "reset_state",
    "run_sequence",
    "to_spiking",
]

__getattr__, __dir__, _offered = doors(__name__, __all__)
__all__ += _offered
