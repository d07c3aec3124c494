"""Guidance: lend a network the inductive bias of another architecture by aligning their inner representations.

Vighnesh Subramaniam, David Mayo, Colin Conwell, Tomaso Poggio, Boris Katz, Brian Cheung, Andrei Barbu, "Training
the Untrainable: Introducing Inductive Bias via Representational Alignment", NeurIPS 2025,
https://arxiv.org/abs/2410.20035.

A wide perceptron overfits images at once, a deep network without skip connections stalls. Guidance trains such a
*target* with one more loss: on every batch its layers should arrange the examples as the layers of a frozen *guide*
do. The guide may be trained, or merely randomly initialised: then only its architecture is lent. Nothing of the guide
is left at inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio.checks import one_of, whole
from torchfolio.engine import Batch, LearningRule, Objective
from torchfolio.measure import linear_cka, linear_cka_pairs, rsa, untouched
from torchfolio.training.guided_rule import GuidedRule
from torchfolio.training.layer_recorder import (
    LAYERS,
    Maps,
    Recorder,
    Select,
    device_of,
    examples_in,
    layer_correspondence,
    placed,
)

__all__ = ["LAYERS", "Guidance", "GuidedRule", "Recorder", "layer_correspondence", "linear_cka", "rsa"]

Similarity = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[str, str]
SIMILARITIES: dict[str, Similarity] = {"cka": linear_cka, "rsa": rsa}


class Guidance(Objective):
    """A loss that aligns the layers of a target network with those of a frozen guide.

    $$\\mathcal{L}(\\theta_T) = \\mathcal{L}_{\\text{task}}(\\theta_T) + \\alpha \\sum_{(i, j)}
      \\bigl[1 - \\mathrm{CKA}\\bigl(A^T_j(x; \\theta_T), A^G_i(x; \\theta_G)\\bigr)\\bigr],$$

    with $A_i(x)$ the outputs of layer $i$ on the batch, flattened to one row for each example. Linear CKA compares
    *which examples are alike*, so the two networks need not have equal widths, and not even equal kinds of layers.

    Call the target first, then the guidance with the same inputs: hooks keep the activations of that very forward
    pass, so the target never runs twice. The guide runs without gradients, and its weights and buffers do not change,
    batch norm in training mode included.

    Args:
        target: network that is trained.
        guide: network to learn from; any module that takes the same batch (see `guide_input`).
        layers: layers of the guide: names of modules, one type or a tuple of types. `LAYERS` by default. Of layers
            found by type the last one, the logits, is left out. A module that runs several times in one pass counts
            each time, as `name`, `name#2`, ….
        target_layers: layers of the target, in the same way.
        pairs: (guide layer, target layer) by name, in place of `layers`, `target_layers` and the even spread of
            `layer_correspondence`.
        similarity: `"cka"`, `"rsa"` (correlation of the matrices of cosines), or a function of two feature
            matrices `[N, d]` that returns a scalar, 1 where they agree.
        alpha: weight $\\alpha$ of the term. Small networks may need about 10.
        reduction: `"sum"` over pairs, whose weight then grows with depth, or `"mean"`.
        duplicates: treatment of several guide layers that meet one target layer: `"all"` counts every one, as the
            equation says; `"last"` the last one alone, as the authors' code does.
        guide_mode: `"eval"` or `"train"` (dropout is active and batch norm uses the batch).
        steps: guide only the first so many training steps (calls with gradients, target in training mode). About
            300 turns guidance into an initialisation. `None` guides to the end.
        tokenwise: compare `[N, T, D]` features position by position and add up over positions, instead of
            flattening positions into features. Both layers of a pair need the same `T`.
        guide_input: function from the inputs to those of the guide, where they differ (flattened, embedded, another
            size). `torch.randn_like` gives a guide that sees noise.
        batch_dim: axis of the examples in the inputs; 1 for sequences `[T, N, ...]`.

    Attributes:
        per_layer: distances $1 - \\mathrm{CKA}$ of every pair (guide layer, target layer), detached scalars.
        steps_done: training steps counted so far.

    Shapes:
        The inputs are the target's, `[N, ...]` with N >= 4; the result is a scalar. CKA depends on N: keep it fixed
        (a few hundred), and leave the last incomplete batch out.

    Raises:
        ValueError: on unknown names, settings out of range, or networks that share parameters; in the call, if there
            is no layer to compare, features lack the axis of examples, or the batch is smaller than 4.
        RuntimeError: in the call, if the target did not run before, or recorded features were overwritten in place.

    Example:
        >>> guidance = Guidance(net, resnet20().eval(), alpha=10.0)
        >>> for x, y in batches:
        ...     loss = F.cross_entropy(net(x), y) + guidance(x)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> guidance.close()

        In `fit`, on top of any learning rule:

        >>> fit(net, train, rule=GuidedRule(Guidance(net, guide, alpha=10.0)), batch_size=256, drop_last=True)

    Note:
        Where neither guide nor data change, compute `guide_features(x_train)` once and pass the batch's rows:
        `guidance(features={name: rows[index] for name, rows in cached.items()})`.

    Reference:
        Subramaniam et al., NeurIPS 2025, section 3. The even spread of layers, the layers taken and the guide's mode
        follow the paper's released code.
    """

    def __init__(
        self,
        target: nn.Module,
        guide: nn.Module,
        *,
        layers: Select | None = None,
        target_layers: Select | None = None,
        pairs: Sequence[Pair] | None = None,
        similarity: Literal["cka", "rsa"] | Similarity = "cka",
        alpha: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum",
        duplicates: Literal["all", "last"] = "all",
        guide_mode: Literal["eval", "train"] = "eval",
        steps: int | None = None,
        tokenwise: bool = False,
        guide_input: Callable[..., Any] | None = None,
        batch_dim: int = 0,
    ) -> None:
        one_of("reduction", reduction, ("sum", "mean"))
        one_of("duplicates", duplicates, ("all", "last"))
        one_of("guide_mode", guide_mode, ("eval", "train"))
        if not callable(similarity) and similarity not in SIMILARITIES:
            raise ValueError(f"expected similarity to be 'cka', 'rsa' or a function, got {similarity!r}")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"expected alpha to be finite and at least 0, got {alpha!r}")
        if steps is not None:
            whole("steps", steps, 0)
        if pairs is not None and (layers is not None or target_layers is not None):
            raise ValueError("expected either pairs or layers and target_layers, got both")
        _check_apart(target, guide)
        self.target, self.guide = target, guide
        self.similarity: Similarity = similarity if callable(similarity) else SIMILARITIES[similarity]
        self.alpha, self.reduction, self.duplicates = alpha, reduction, duplicates
        self.guide_mode, self.steps, self.tokenwise = guide_mode, steps, tokenwise
        self.guide_input, self.batch_dim = guide_input, batch_dim
        self.given_pairs = [(str(i), str(j)) for i, j in pairs] if pairs is not None else None
        if self.given_pairs is not None:
            layers, target_layers = [i for i, _ in self.given_pairs], [j for _, j in self.given_pairs]
        self._guide_layers = Recorder(guide, layers, "guide", batch_dim)
        self._target_layers = Recorder(target, target_layers, "target", batch_dim)
        self.per_layer: dict[Pair, Tensor] = {}
        self.steps_done = 0
        self._target_layers.arm()

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted alignment of one batch, for which the target runs."""
        with self.armed():
            self.target(*batch[:-1])
            return self(*batch[:-1])

    def on(self, rule: LearningRule | None = None) -> LearningRule:
        """Guidance on top of a rule, block by block where it trains so; see `GuidedRule`."""
        return GuidedRule(self, rule)

    @property
    def active(self) -> bool:
        """Whether the next step is guided."""
        return self.steps is None or self.steps_done < self.steps

    def __call__(self, *inputs: Tensor, features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weighted alignment loss of the target's last forward pass.

        Args:
            *inputs: batch, as the target got it.
            features: features of `guide_features` for the examples of this batch, in place of running the guide.

        Returns:
            $\\alpha \\sum [1 - \\mathrm{CKA}]$, a scalar; 0 once `steps` steps are over.
        """
        active = self.active
        if torch.is_grad_enabled() and self.target.training:
            self.steps_done += 1
        if not active:
            self._target_layers.clear()
            return torch.zeros((), device=device_of(self.target))
        guide = dict(features) if features is not None else self.guide_features(*inputs)
        target = self._target_layers.take(len(next(iter(guide.values()))))
        self.per_layer = {}
        return self.align(self.correspond(list(guide), list(target)), guide, target)

    def guide_features(self, *inputs: Tensor) -> Maps:
        """Features `[N, ...]` of the guide's layers in running order, without gradients."""
        n = examples_in(inputs, self.batch_dim)
        guide_inputs = self.guide_input(*inputs) if self.guide_input is not None else inputs
        guide_inputs = guide_inputs if isinstance(guide_inputs, tuple | list) else (guide_inputs,)
        weight = next((p for p in self.guide.parameters() if p.is_floating_point()), None)
        if weight is not None:
            guide_inputs = [placed(x, weight) for x in guide_inputs]
        training = self.guide_mode == "train"
        with torch.no_grad(), untouched(self.guide, training=training), self._guide_layers:
            self.guide(*guide_inputs)
            return self._guide_layers.take(n)

    def correspond(self, guide: Sequence[str], target: Sequence[str]) -> list[Pair]:
        """Which recorded layers are compared: the given pairs, or the even spread."""
        if self.given_pairs is not None:
            for side, names, known in (("guide", 0, guide), ("target", 1, target)):
                missing = [pair[names] for pair in self.given_pairs if pair[names] not in known]
                if missing:
                    raise ValueError(f"the {side} recorded no layer {missing[0]!r}; it has {', '.join(known)}")
            pairs = self.given_pairs
        else:
            pairs = [(guide[i], target[j]) for i, j in layer_correspondence(len(guide), len(target))]
        return pairs if self.duplicates == "all" else list({j: (i, j) for i, j in pairs}.values())

    def align(self, pairs: Sequence[Pair], guide: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """The weighted term of these pairs, which are noted in `per_layer`."""
        device = next(iter(target.values())).device
        own = {j: target[j] for _, j in pairs}
        other = {i: guide[i].to(device) for i, _ in pairs}
        terms = [1 - value for value in self._similarities(own, other, [(j, i) for i, j in pairs])]
        self.per_layer.update({pair: term.detach() for pair, term in zip(pairs, terms, strict=True)})
        total = torch.stack(terms).sum()
        return self.alpha * (total / len(pairs) if self.reduction == "mean" else total)

    def _similarities(self, own: Maps, other: Maps, pairs: Sequence[Pair]) -> list[Tensor]:
        """The similarity of every pair (target layer, guide layer)."""
        if self.tokenwise:
            return [self._by_token(own[j], other[i], (j, i)) for j, i in pairs]
        if self.similarity is linear_cka:
            return linear_cka_pairs(own, other, pairs)
        return [self.similarity(own[j].flatten(1), other[i].flatten(1)) for j, i in pairs]

    def _by_token(self, x: Tensor, y: Tensor, pair: Pair) -> Tensor:
        """One minus the sum of distances over positions."""
        if x.dim() == y.dim() == 2:
            return self.similarity(x, y)
        if x.dim() != 3 or y.dim() != 3 or x.shape[1] != y.shape[1]:
            raise ValueError(
                f"expected features [N, T, D] of equal T to compare by token, got {tuple(y.shape)} of the guide's "
                f"{pair[1]} and {tuple(x.shape)} of the target's {pair[0]}"
            )
        tokens = zip(x.unbind(1), y.unbind(1), strict=True)
        return 1 - torch.stack([1 - self.similarity(a, b) for a, b in tokens]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and a checksum of the guide, which is not saved."""
        return {"steps_done": self.steps_done, "guide": _checksum(self.guide)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: if the guide is another one than then.
        """
        if not math.isclose(_checksum(self.guide), state["guide"], rel_tol=1e-6):
            raise ValueError(
                "the guide is not the one of the saved state (sums of its weights differ); build it with the same "
                "seed, or load its weights"
            )
        self.steps_done = int(state["steps_done"])

    def close(self) -> None:
        """Take the hooks off the target."""
        self._target_layers.close()

    @contextmanager
    def armed(self) -> Iterator[Recorder]:
        """Hooks on the target for the time of a `with` block alone."""
        self._target_layers.arm()
        try:
            yield self._target_layers
        finally:
            self._target_layers.close()

    def __enter__(self) -> Guidance:
        self._target_layers.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_apart(target: nn.Module, guide: nn.Module) -> None:
    own = {id(p): name for name, p in target.named_parameters()}
    for name, p in guide.named_parameters():
        if id(p) in own:
            raise ValueError(
                f"the guide's {name} is the target's {own[id(p)]}: training would change the guide; pass a deepcopy"
            )


def _checksum(network: nn.Module) -> float:
    return sum(float(t.detach().double().abs().sum()) for t in network.state_dict().values())
