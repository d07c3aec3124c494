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
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from torchfolio.engine import Backprop, Batch, LearningRule, Objective
from torchfolio.engine.modes import undisturbed
from torchfolio.measure import linear_cka, linear_cka_pairs, rsa, untouched
from torchfolio.models import take_features

__all__ = ["LAYERS", "Guidance", "GuidedRule", "layer_correspondence", "linear_cka", "rsa"]

Similarity = Callable[[Tensor, Tensor], Tensor]
Select = str | type[nn.Module] | Sequence[str] | tuple[type[nn.Module], ...]
Pair = tuple[str, str]
Maps = dict[str, Tensor]  # features [N, ...] of every recorded layer, in running order

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.AdaptiveAvgPool2d,
    nn.RNN,
    nn.LSTM,
    nn.TransformerDecoderLayer,
    nn.LayerNorm,
    nn.MultiheadAttention,
)
"""Types of modules whose outputs are compared unless others are asked for."""

SIMILARITIES: dict[str, Similarity] = {"cka": linear_cka, "rsa": rsa}


def layer_correspondence(n_guide: int, n_target: int) -> list[tuple[int, int]]:
    """Spread the guide's layers evenly over the target's: layer $k$ of $n_G$ goes with layer

    $$j(k) = \\min\\bigl(\\operatorname{round}(k (n_T - 1) / (n_G - 1)),\\; n_T - 1\\bigr),$$

    rounding half to even. A deeper guide gives several layers to one of the target; a shallower one skips some.

    Args:
        n_guide: number of guide layers $n_G$.
        n_target: number of target layers $n_T$.

    Returns:
        Pairs (guide layer, target layer), one for each guide layer.

    Raises:
        ValueError: if a network has no layer.
    """
    if n_guide < 1 or n_target < 1:
        raise ValueError(f"expected at least one layer of each network, got {n_guide} and {n_target}")
    step = (n_target - 1) / max(n_guide - 1, 1)
    return [(k, min(round(k * step), n_target - 1)) for k in range(n_guide)]


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
        target: the network that is trained.
        guide: the network to learn from; any module that takes the same batch (see `guide_input`).
        layers: of the guide: names of modules, one type or a tuple of types. `LAYERS` by default. Of layers found
            by type the last one, the logits, is left out. A module that runs several times in one pass counts
            each time, as `name`, `name#2`, ….
        target_layers: of the target, in the same way.
        pairs: (guide layer, target layer) by name, in place of `layers`, `target_layers` and the even spread of
            `layer_correspondence`.
        similarity: `"cka"`, `"rsa"` (correlation of the matrices of cosines), or a function of two feature
            matrices `[N, d]` that returns a scalar, 1 where they agree.
        alpha: weight $\\alpha$ of the term. Small networks may need about 10.
        reduction: `"sum"` over pairs, whose weight then grows with depth, or `"mean"`.
        duplicates: where several guide layers meet one target layer, `"all"` counts every one, as the equation
            says; `"last"` the last one alone, as the authors' code does.
        guide_mode: `"eval"` or `"train"` (dropout is active and batch norm uses the batch).
        steps: guide only the first so many training steps (calls with gradients, target in training mode). About
            300 turns guidance into an initialisation. `None` guides to the end.
        tokenwise: compare `[N, T, D]` features position by position and add up over positions, instead of
            flattening positions into features. Both layers of a pair need the same `T`.
        guide_input: from the inputs to those of the guide, where they differ (flattened, embedded, another size).
            `torch.randn_like` gives a guide that sees noise.
        batch_dim: axis of the examples in the inputs; 1 for sequences `[T, N, ...]`.

    Attributes:
        per_layer: after a call, $1 - \\mathrm{CKA}$ of every pair (guide layer, target layer), detached scalars.
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
        for name, got, expected in (
            ("reduction", reduction, ("sum", "mean")),
            ("duplicates", duplicates, ("all", "last")),
            ("guide_mode", guide_mode, ("eval", "train")),
        ):
            if got not in expected:
                raise ValueError(f"expected {name} to be {' or '.join(map(repr, expected))}, got {got!r}")
        if not callable(similarity) and similarity not in SIMILARITIES:
            raise ValueError(f"expected similarity to be 'cka', 'rsa' or a function, got {similarity!r}")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"expected alpha to be finite and at least 0, got {alpha!r}")
        if steps is not None and (not isinstance(steps, int) or steps < 0):
            raise ValueError(f"expected steps to be None or a whole number of at least 0, got {steps!r}")
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
            *inputs: the batch, as the target got it.
            features: of `guide_features` for the examples of this batch, in place of running the guide.

        Returns:
            $\\alpha \\sum [1 - \\mathrm{CKA}]$, a scalar; 0 once `steps` steps are over.
        """
        active = self.active
        if torch.is_grad_enabled() and self.target.training:
            self.steps_done += 1
        if not active:
            self._target_layers.clear()
            return torch.zeros((), device=_device(self.target))
        guide = dict(features) if features is not None else self.guide_features(*inputs)
        target = self._target_layers.take(len(next(iter(guide.values()))))
        self.per_layer = {}
        return self.align(self.correspond(list(guide), list(target)), guide, target)

    def guide_features(self, *inputs: Tensor) -> Maps:
        """Features `[N, ...]` of the guide's layers in running order, without gradients."""
        n = _examples(inputs, self.batch_dim)
        given = self.guide_input(*inputs) if self.guide_input is not None else inputs
        given = given if isinstance(given, tuple | list) else (given,)
        weight = next((p for p in self.guide.parameters() if p.is_floating_point()), None)
        if weight is not None:
            given = [_placed(x, weight) for x in given]
        training = self.guide_mode == "train"
        with torch.no_grad(), untouched(self.guide, training=training), self._guide_layers:
            self.guide(*given)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


class GuidedRule(LearningRule):
    """Guidance on top of any learning rule.

    Whenever the rule calls backward on a loss, the alignment of the layers that ran since its previous backward is
    added to that loss. With backprop this is the equation of `Guidance`; with a rule that trains blocks by losses of
    their own, every block is guided by its own layers, and still no gradient crosses blocks.

    Args:
        guidance: of the network that is handed to `fit`. Its hooks are on the target only while a step runs.
        rule: the rule of the task; `Backprop()` by default.
        warmup_only: in the first `guidance.steps` steps train on the alignment alone, then on the task alone.

    Raises:
        ValueError: if `warmup_only` is set without `steps`; in `prepare` if the network is not the guidance's target,
            in `step` if the rule ran none of its layers.

    Shapes:
        Batches are (inputs…, targets); the guide gets the inputs. On several processes each aligns its own share of
        the batch, so choose a batch size that leaves each of them enough examples.

    Example:
        >>> guidance = Guidance(net, guide, alpha=10.0, steps=300)
        >>> fit(net, train, rule=GuidedRule(guidance, AugLocal(2)), batch_size=256, drop_last=True)

    Reference:
        Subramaniam et al., NeurIPS 2025; the share of each backward is this library's own.
    """

    def __init__(self, guidance: Guidance, rule: LearningRule | None = None, *, warmup_only: bool = False) -> None:
        if warmup_only and guidance.steps is None:
            raise ValueError("expected guidance with a number of steps for warmup_only, got steps=None")
        self.guidance = guidance
        self.rule = rule or Backprop()
        self.warmup_only = warmup_only
        self.names: list[Pair] = []

    @property
    def loss(self) -> Any:
        """The criterion of the task's rule, where it has one."""
        return self.rule.loss  # pyright: ignore[reportAttributeAccessIssue]

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        """Prepare the rule, and pair the layers by running both networks on the example."""
        guidance = self.guidance
        if model is not guidance.target:
            raise ValueError(
                f"expected the network that the guidance was made for, a {type(guidance.target).__name__}, "
                f"got another {type(model).__name__}"
            )
        guidance.close()
        module = self.rule.prepare(model, example)
        guidance.guide.to(_device(model))
        inputs = example[:-1]
        with torch.no_grad(), undisturbed(), untouched(model, training=False), guidance.armed() as recorder:
            model(*inputs)
            target = recorder.take(_examples(inputs, guidance.batch_dim))
            self.names = guidance.correspond(list(guidance.guide_features(*inputs)), list(target))
        return module

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One step of the rule. `guidance` is the term that was added; the other scalars are the rule's own."""
        if not self.names:
            raise RuntimeError("call prepare(model, example) before step")
        guidance = self.guidance
        active = guidance.active
        guidance.steps_done += 1
        if not active:
            return self.rule.step(batch, backward)
        n = _examples(batch[:-1], guidance.batch_dim)
        guide = guidance.guide_features(*batch[:-1])
        guidance.per_layer = {}
        added: list[Tensor] = []
        with guidance.armed() as recorder:

            def guided(loss: Tensor) -> None:
                target = recorder.take(n, required=False)
                fresh = [(i, j) for i, j in self.names if j in target and (i, j) not in guidance.per_layer]
                if fresh:
                    added.append(self._term(fresh, guide, target))
                    backward(added[-1] if self.warmup_only else loss + added[-1])
                    added[-1] = added[-1].detach()
                elif not self.warmup_only:
                    backward(loss)

            scalars = self.rule.step(batch, guided)
        if not added:
            raise ValueError(f"{type(self.rule).__name__} ran none of the guided layers of the target")
        return {**scalars, "guidance": torch.stack(added).sum()}

    def _term(self, fresh: Sequence[Pair], guide: Maps, target: Maps) -> Tensor:
        """The share of these pairs in the whole term."""
        share = len(fresh) / len(self.names) if self.guidance.reduction == "mean" else 1
        return share * self.guidance.align(fresh, guide, target)

    def predictor(self, model: nn.Module) -> nn.Module:
        return self.rule.predictor(model)

    def configure(self, optimizer: torch.optim.Optimizer, total_steps: int | None) -> None:
        self.rule.configure(optimizer, total_steps)

    def release(self) -> None:
        self.rule.release()

    def state_dict(self) -> dict[str, Any]:
        return {"guidance": self.guidance.state_dict(), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.guidance.load_state_dict(state["guidance"])
        self.rule.load_state_dict(state["rule"])


class Recorder:
    """Records the layers of one network in running order, by name and call.

    Args:
        network: to be recorded.
        layers: names or types; see `Guidance`.
        side: what to call the network in messages.
        batch_dim: axis of the examples in the inputs.
    """

    def __init__(self, network: nn.Module, layers: Select | None, side: str, batch_dim: int) -> None:
        self.network, self.side, self.batch_dim = network, side, batch_dim
        self.kinds = LAYERS if layers is None else _types(layers)
        self.names = _names(layers) if self.kinds is None else []
        self.features = None
        self.arm()  # finds unknown names and networks without a layer now
        self.close()

    def arm(self) -> None:
        """Put hooks on the modules as they are now."""
        self.close()
        self.features = take_features(self.network, self._modules(), read=_tensors)

    def close(self) -> None:
        if self.features is not None:
            self.features.close()
            self.features = None

    def clear(self) -> None:
        """Forget the last pass."""
        if self.features is not None:
            self.features.clear()

    def take(self, n: int, *, required: bool = True) -> Maps:
        """Features `[n, ...]` recorded since the last pass began, or since they were taken; then forget them.

        Args:
            n: number of examples.
            required: this is a whole pass: it must hold features, and those of the last layer found by type, the
                logits, are left out.

        Returns:
            Features by name; a module that ran before in the same pass gets `#2`, `#3`, ….
        """
        if self.features is None:
            raise RuntimeError(
                f"the hooks are off the {self.side}; use the guidance in a with block, or make a new one"
            )
        maps: Maps = {}
        calls: dict[str, int] = {}
        for name, value, version in self.features.in_order():
            if not value.is_inference() and value._version != version:
                raise RuntimeError(
                    f"the output of the {self.side}'s {name or 'network'} was overwritten in place after it was "
                    "recorded; set inplace=False in the module that follows, or choose other layers"
                )
            first = self._examples_first(name, value, n)
            if first is not None:
                calls[name] = calls.get(name, 0) + 1
                maps[name if calls[name] == 1 else f"{name}#{calls[name]}"] = first
        self.features.clear()
        if required:
            self._check(maps)
            if self.kinds is not None:
                maps.popitem()  # the logits
        return maps

    def _check(self, maps: Maps) -> None:
        if not maps:
            raise RuntimeError(
                f"no layer of the {self.side} was recorded with an axis of examples; run {self.side}(x) right before "
                "guidance(x), on the same batch"
            )
        if self.kinds is not None and len(maps) < 2:
            raise ValueError(
                f"the {self.side} has one layer of the types asked for, the last, which is left out; name layers of "
                f"its own: {_some(name for name, _ in self.network.named_modules() if name)}"
            )

    def _modules(self) -> list[str]:
        if self.kinds is None:
            return list(dict.fromkeys(name.split("#")[0] for name in self.names))
        found = [name for name, module in self.network.named_modules() if isinstance(module, self.kinds)]
        if not found:
            types_seen = _some(sorted({type(m).__name__ for m in self.network.modules()}))
            raise ValueError(
                f"the {self.side} has no module of the types {_some(kind.__name__ for kind in self.kinds)}; it is "
                f"made of {types_seen}; name its layers"
            )
        return found

    def _examples_first(self, name: str, value: Tensor, n: int) -> Tensor | None:
        """The features with the axis of examples first; `None` for outputs of a type search that have none."""
        if value.dim() > 1 and value.is_floating_point():
            axes = [self.batch_dim, *range(value.dim())] if value.dim() > self.batch_dim + 1 else range(value.dim())
            if (own := _batch_axis(self.network.get_submodule(name))) is not None and value.dim() == 3:
                axes = [own, *axes]
            axis = next((axis for axis in axes if value.shape[axis] == n), None)
            if axis is not None:
                return value.movedim(axis, 0)
        if self.kinds is None:
            raise ValueError(
                f"expected the {self.side}'s {name} to give features with an axis of {n} examples, got shape "
                f"{tuple(value.shape)} of {value.dtype}"
            )
        return None

    def __enter__(self) -> Recorder:
        self.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _tensors(module: nn.Module, output: object) -> list[Tensor]:
    """The tensors in a module's output: packed sequences padded, final states of recurrent modules left out."""
    if isinstance(output, PackedSequence):
        return [pad_packed_sequence(output, batch_first=bool(getattr(module, "batch_first", False)))[0]]
    if isinstance(output, Tensor):
        return [output]
    if isinstance(module, nn.RNNBase) and isinstance(output, tuple):
        return _tensors(module, output[0])
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _tensors(module, part)]
    return []


def _batch_axis(module: nn.Module) -> int | None:
    """The axis of the examples in the output of a layer that says it by `batch_first`; `None` of any other."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    elif not isinstance(module, nn.RNNBase):
        return None
    return 0 if getattr(module, "batch_first", False) else 1


def _types(layers: Select) -> tuple[type[nn.Module], ...] | None:
    """The types asked for; `None` if layers are asked for by name."""
    kinds = tuple(kind for kind in ([layers] if isinstance(layers, str | type) else layers) if isinstance(kind, type))
    return kinds or None


def _names(layers: Select | None) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers or ())  # pyright: ignore[reportArgumentType]
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None or not names:
        raise ValueError(f"expected layers by name or by type, got {layers if wrong is None else wrong!r}")
    return [str(name) for name in names]


def _examples(inputs: Sequence[Any], batch_dim: int) -> int:
    """Number of examples of a batch.

    Raises:
        ValueError: if there are too few to compare.
    """
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor) or x.dim() <= batch_dim:
        what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected the inputs to start with a tensor that has an axis {batch_dim}, got {what}")
    if x.shape[batch_dim] < 4:
        raise ValueError(
            f"expected a batch of at least 4 examples to compare representations on, got {x.shape[batch_dim]}; "
            "leave the last incomplete batch out (drop_last=True)"
        )
    return x.shape[batch_dim]


def _check_apart(target: nn.Module, guide: nn.Module) -> None:
    own = {id(p): name for name, p in target.named_parameters()}
    for name, p in guide.named_parameters():
        if id(p) in own:
            raise ValueError(
                f"the guide's {name} is the target's {own[id(p)]}: training would change the guide; pass a deepcopy"
            )


def _placed(x: Any, weight: Tensor) -> Any:
    """A tensor on the guide's device; floats in its precision too."""
    if not isinstance(x, Tensor):
        return x
    return x.to(weight.device, weight.dtype) if x.is_floating_point() else x.to(weight.device)


def _device(network: nn.Module) -> torch.device | None:
    return next((p.device for p in network.parameters()), None)


def _checksum(network: nn.Module) -> float:
    return sum(float(t.detach().double().abs().sum()) for t in network.state_dict().values())


def _some(names: Any, most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
