"""HLOP: a network learns task after task and keeps what it knew, by Hebbian subspaces and orthogonal projection.

Mingqing Xiao, Qingyan Meng, Zongpeng Zhang, Di He, Zhouchen Lin, "Hebbian Learning based Orthogonal Projection for
Continual Learning of Spiking Neural Networks", ICLR 2024, https://arxiv.org/abs/2402.11984.

Longer than most because a rule that guards what another one trains stands between it, the network and the optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from torchfolio.checks import between, one_of, whole
from torchfolio.engine import Backprop, LearningRule, evaluate
from torchfolio.engine.sync import average_buffers
from torchfolio.spiking.continual import continual_metrics
from torchfolio.spiking.credit import Credit, WeightLayer, credit_of, fan_in, rows_of, weight_layers
from torchfolio.spiking.dsr import DSR
from torchfolio.spiking.feedback import FeedbackAlignment, SignSymmetric
from torchfolio.spiking.guarded_layers import choose_layers, unguarded_weights
from torchfolio.spiking.hebbian import HebbianSubspace
from torchfolio.spiking.ottt import OTTT

__all__ = [
    "DSR",
    "HLOP",
    "OTTT",
    "FeedbackAlignment",
    "HebbianSubspace",
    "SignSymmetric",
    "continual_metrics",
]

Rows = int | float | Mapping[str, int]


class HLOP(LearningRule):
    """Puts Hebbian subspaces beside the layers of a network, on any learning rule.

    While a task is learned, new lateral rows of each layer learn the principal subspace of the layer's inputs
    (`HebbianSubspace`). `end_task` fixes them. From then on weights change only off the subspace of all tasks before,

    $$\\nabla W \\leftarrow \\nabla W - (\\nabla W H^\\top) H,$$

    so that what the layer answers to inputs of old tasks stays. The forward pass and the errors sent down are the
    rule's own. Works with rules for spiking networks and with `Backprop` or others on ordinary ones.

    Args:
        rule: learning rule of each task; `Backprop()` by default.
        sizes: lateral rows for the first task: a number, a fraction of each layer's inputs, or numbers by layer name.
        growth: number of rows for each further task, likewise.
        layers: names of the layers, or a predicate (name, layer); all linear and ungrouped convolution layers by
            default. A layer left out, such as a head of the task's own, is trained as usual. Layers that share a
            weight share lateral rows, by the name of the first.
        form: `"weight"` projects the gradients of the weights, once before each step of the optimizer; `"input"` the
            activity in the backward pass, as the lateral neurons would. Both give the same gradient.
        lr: rate of the Hebbian rule, or rates by layer name (0.01 for others); smaller where inputs are large.
        rows: activity that the Hebbian rule sees of a layer that runs several times in a step (over time): its `"mean"`,
            or `"all"`. Rules may say better (`DSR` gives rates).
        max_rows: rows of a batch at most, drawn at random: patches of convolutions are many.
        freeze_1d: whether to freeze, from the second task on, all biases, norms and thresholds, and run batch norms in
            evaluation mode.
        project_update: project the optimizer's step as well, which keeps the promise under momentum, Adam and weight
            decay.
        spiking: as in `HebbianSubspace`.
        seed: seed of the first rows, and of the rows drawn.

    Attributes:
        task: number of the present task, from 0.
        subspaces: `HebbianSubspace` of each layer by name.

    Raises:
        ValueError: in `prepare`, on a trained bias that is not frozen, names of no layer, more rows than inputs, or
            another network than before; on settings out of range.

    Note:
        A fresh optimizer for each task: momentum of an old one moves weights as it likes. Replay of stored examples is
        a `fit` with `hlop.rule` alone. Rows are all but never exactly orthonormal: see `orthonormality_error`.

    Example:
        >>> hlop = HLOP(BPTT(timesteps=4), sizes=0.25, growth=0.1)
        >>> for task in tasks:
        ...     fit(net, task, rule=hlop, optimizer=sgd(0.1, momentum=0))
        ...     hlop.end_task()
        >>> evaluate(net, tasks[0], rule=hlop)

    Reference:
        Xiao et al., ICLR 2024, equations 2 to 5, section 4; the weight form as in the released code.
    """

    def __init__(
        self,
        rule: LearningRule | None = None,
        *,
        sizes: Rows,
        growth: Rows,
        layers: Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
        form: Literal["weight", "input"] = "weight",
        lr: float | Mapping[str, float] = 0.01,
        rows: Literal["mean", "all"] = "mean",
        max_rows: int = 4096,
        freeze_1d: bool = True,
        project_update: bool = False,
        spiking: int | None = None,
        seed: int = 0,
    ) -> None:
        self.rule = rule or Backprop()
        self.sizes, self.growth = _checked("sizes", sizes), _checked("growth", growth)
        self.layers, self.lr, self.spiking = layers, lr, spiking
        self.form, self.rows = one_of("form", form, ("weight", "input")), one_of("rows", rows, ("mean", "all"))
        self.max_rows, self.seed = whole("max_rows", max_rows, 1), whole("seed", seed)
        self.freeze_1d, self.project_update = bool(freeze_1d), bool(project_update)
        self.generator = torch.Generator().manual_seed(seed)
        self.task = 0
        self.subspaces = nn.ModuleDict()
        self.model: nn.Module | None = None
        self._layers: dict[str, WeightLayer] = {}
        self._sharing: dict[str, list[WeightLayer]] = {}
        self._told: set[str] = set()
        self._seen: dict[str, list[tuple[Tensor, ...]]] = {}
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._handles: list[Any] = []
        self._watching = self._by_optimizer = False

    @property
    def loss(self) -> Any:
        """The criterion of the rule, where it has one."""
        return self.rule.loss  # pyright: ignore[reportAttributeAccessIssue]

    # Tasks

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        """Prepare the rule, and put lateral rows beside the layers, the ones of earlier tasks where there are any."""
        self.release()
        layers = self._chosen(model)
        if not len(self.subspaces):
            for name, layer in layers.items():
                lr = self.lr if isinstance(self.lr, float | int) else self.lr.get(name, 0.01)
                self.subspaces[_key(name)] = HebbianSubspace(fan_in(layer), lr=lr, spiking=self.spiking)
            self._layers = layers
            self._grow(self.sizes)
        widths = {_key(name): fan_in(layer) for name, layer in layers.items()}
        if widths != {name: s.n for name, s in self.subspaces.items()}:
            raise ValueError("expected the network of the tasks before, got one with other layers")
        module = self.rule.prepare(model, example)
        self.model, self._layers = model, layers
        known = weight_layers(model).values()
        self._sharing = {n: [m for m in known if m.weight is layer.weight] for n, layer in layers.items()}
        device = next(iter(layers.values())).weight.device
        self.subspaces.to(device)
        for name, credit in self._credits():
            credit.record = self._recorder(name)
        self._protect()
        return module

    def _chosen(self, model: nn.Module) -> dict[str, WeightLayer]:
        """The layers by name, checked."""
        if self.layers is None:
            self._tell_of_rest(model)
        chosen = choose_layers(model, self.layers)
        if not self.freeze_1d:
            for name, layer in chosen.items():
                if layer.bias is not None and layer.bias.requires_grad:
                    raise ValueError(
                        f"the bias of {name} moves old outputs whatever its weights do; build the layer with bias=False, "
                        "freeze the bias, or take freeze_1d=True"
                    )
        if isinstance(self.lr, Mapping):
            for name in self.lr:
                one_of("a layer with an lr of its own", name, chosen)
        for rows in (self.sizes, self.growth):
            if isinstance(rows, Mapping) and (odd := sorted(set(rows) ^ set(chosen))):
                raise ValueError(
                    f"expected numbers of rows for {', '.join(chosen)}; {odd[0]} is missing or no such layer"
                )
        return chosen

    def _tell_of_rest(self, model: nn.Module) -> None:
        """Warn of weights that nothing guards."""
        rest = unguarded_weights(model)
        if rest and not self._told.issuperset(rest):
            names = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
            warnings.warn(
                f"{names} are no weights of linear layers or ungrouped convolutions: they are trained without "
                "projection and forget; freeze them, or name the layers to guard",
                stacklevel=4,
            )
        self._told.update(rest)

    def _grow(self, rows: Rows) -> None:
        for name, layer in self._layers.items():
            count = rows[name] if isinstance(rows, Mapping) else rows
            count = round(count * fan_in(layer)) if isinstance(count, float) else count
            subspace = self._subspace(name)
            free = subspace.n - len(subspace.basis)
            if len(subspace.fixed) and count > free:
                warnings.warn(f"{name or 'the layer'} has room for {free} of {count} more lateral rows", stacklevel=3)
                count = free
            subspace.grow(count, self.generator)

    def _subspace(self, name: str) -> HebbianSubspace:
        return self.subspaces[_key(name)]  # pyright: ignore[reportReturnType]

    def end_task(self, growth: Rows | None = None, *, orthonormalize: bool = False) -> None:
        """Fix the lateral rows, and add new ones for the next task.

        Args:
            growth: rows of the next task; those of the rule by default.
            orthonormalize: whether rows are made orthonormal, see `HebbianSubspace.merge`.
        """
        if not len(self.subspaces):
            raise RuntimeError("call prepare(model, example), or fit, before end_task")
        for subspace in self.subspaces.values():
            subspace.merge(orthonormalize)  # pyright: ignore
        self._grow(self.growth if growth is None else _checked("growth", growth))
        self.task += 1
        if self.model is not None:
            self._protect()

    def _protect(self) -> None:
        """Freeze what belongs to all tasks, and project in the backward pass by the input form."""
        assert self.model is not None
        if self.task and self.freeze_1d and not self._flags:
            self._flags = [(p, p.requires_grad) for p in self.model.parameters() if p.dim() <= 1]
            for p, _ in self._flags:
                p.requires_grad_(False)
        if self.task and self.form == "input":
            for name, credit in self._credits():
                credit.project = self._subspace(name).project

    def _credits(self) -> list[tuple[str, Credit]]:
        """The backward passes of all layers, by the name of the lateral rows beside them."""
        return [(name, credit_of(layer)) for name, sharing in self._sharing.items() for layer in sharing]

    def release(self) -> None:
        """Give the network back as it was; lateral rows stay."""
        for _, credit in self._credits() if self.model is not None else ():
            credit.record = credit.project = None
            credit.release()
        for p, flag in self._flags:
            p.requires_grad_(flag)
        for handle in self._handles:
            handle.remove()
        self._flags, self._handles, self.model, self._by_optimizer = [], [], None, False
        self.rule.release()

    # Steps

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        weights = [layer.weight for layer in self._layers.values()]
        alone = self.form == "weight" and not self._by_optimizer and self.task
        before = [w.grad for w in weights] if alone else []
        for w in weights if alone else ():
            w.grad = None  # gradients of other batches are projected already
        with self._watched():
            scalars = self.rule.step(batch, backward)
        self._learn()
        if alone:
            self._project()
            for w, old in zip(weights, before, strict=True):
                if old is not None:
                    w.grad = old if w.grad is None else old.add_(w.grad)
        return scalars

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Activity is kept; batch norms of later tasks use the statistics they have."""
        assert self.model is not None
        norms = [m for m in self.model.modules() if isinstance(m, _NormBase) and m.training]
        norms = norms if self.task and self.freeze_1d else []
        self._watching, self._seen = True, {name: [] for name in self._layers}
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            self._watching = False
            for norm in norms:
                norm.train()

    def _recorder(self, name: str) -> Callable[[Tensor, Tensor], None]:
        def record(x: Tensor, activity: Tensor) -> None:
            if self._watching:
                same = activity is x or activity.data_ptr() == x.data_ptr()
                self._seen[name].append((x,) if same else (x, activity))

        return record

    def _learn(self) -> None:
        """The Hebbian steps of one batch."""
        host: Any = self.rule
        while not hasattr(host, "presynaptic") and hasattr(host, "rule"):
            host = host.rule
        for name, layer in self._layers.items():
            seen, self._seen[name] = self._seen[name], []
            if not seen and name not in self._told:
                self._told.add(name)
                warnings.warn(f"{name} was not called: its lateral rows learn nothing, and guard nothing", stacklevel=3)
            if not seen or not len(self._subspace(name).new):
                continue
            kinds = [list(kind) for kind in zip(*seen, strict=False)]  # inputs, and traces where there are any
            if hasattr(host, "presynaptic"):
                kinds = [[host.presynaptic(x) for x in kind] for kind in kinds]
            if self.rows == "mean":
                kinds = [_mean(kind) for kind in kinds]
            rows_by_kind = [rows_of(layer, x) for kind in kinds for x in kind]
            rows = torch.cat(rows_by_kind) if len(rows_by_kind) > 1 else rows_by_kind[0]
            if len(rows) > self.max_rows:
                drawn = torch.randperm(len(rows), generator=self.generator)[: self.max_rows]
                rows = rows[drawn.to(rows.device)]
            self._subspace(name).update(rows)
        if dist.is_available() and dist.is_initialized():
            average_buffers(self.subspaces)

    @torch.no_grad()
    def _project(self) -> None:
        for name, layer in self._layers.items():
            gradient = layer.weight.grad
            if gradient is not None:
                with torch.autocast(gradient.device.type, enabled=False):
                    gradient.copy_(self._subspace(name).project(gradient.flatten(1)).view_as(gradient))

    # Optimizer

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        """Project right before each step of the optimizer, and by `project_update` after it; warn of what breaks it."""
        self.rule.configure(optimizer, total_steps)
        if not self.task:
            return
        if not self.project_update:
            if any(group.get("weight_decay") for group in optimizer.param_groups):
                warnings.warn("weight decay moves old outputs; take none, or project_update=True", stacklevel=2)
            if optimizer.state:
                warnings.warn(
                    "the optimizer's state is of another task and moves old outputs; take a fresh one", stacklevel=2
                )
        weights = {name: layer.weight for name, layer in self._layers.items()}
        start: dict[str, Tensor] = {}

        def before(*_: Any) -> None:
            if self.form == "weight":
                self._project()
            if self.project_update:
                start.update({name: w.detach().clone() for name, w in weights.items()})

        @torch.no_grad()
        def after(*_: Any) -> None:
            for name, old in start.items():
                step = self._subspace(name).project((weights[name] - old).flatten(1))
                weights[name].copy_(old + step.view_as(old))
            start.clear()

        self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._by_optimizer = True

    # What every rule has

    def predictor(self, model: nn.Module) -> nn.Module:
        return self.rule.predictor(model)

    def evaluate(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Scores of the network as the rule runs it."""
        return evaluate(self.predictor(model), data)

    def orthonormality_error(self) -> dict[str, float]:
        """See `HebbianSubspace.orthonormality_error`, by layer."""
        return {name: self._subspace(name).orthonormality_error() for name in self._layers}

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict(), "task": self.task, "subspaces": dict(self.subspaces.state_dict()),
                "generator": self.generator.get_state()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not len(self.subspaces):
            raise RuntimeError("call prepare(model, example) before load_state_dict: it makes the lateral rows")
        self.rule.load_state_dict(state["rule"])
        self.task = int(state["task"])
        self.subspaces.load_state_dict(state["subspaces"])
        self.generator.set_state(state["generator"].cpu())
        if self.model is not None:
            self._protect()


def _mean(seen: list[Tensor]) -> list[Tensor]:
    """The mean of activities of one shape; what is of several shapes stays."""
    if len(seen) == 1 or any(x.shape != seen[0].shape for x in seen):
        return seen
    total = seen[0].clone()
    for x in seen[1:]:
        total += x
    return [total.div_(len(seen))]


def _key(name: str) -> str:
    """A layer's name as a module dict takes it; the network itself may be the layer."""
    return name.replace(".", "/") or "/"


def _checked(name: str, rows: Rows) -> Rows:
    for count in rows.values() if isinstance(rows, Mapping) else [rows]:
        if isinstance(count, float):
            between(f"{name} as a fraction", count, 0, 1)
        else:
            whole(name, count, 0)
    return rows
