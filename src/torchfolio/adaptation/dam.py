"""DAM: merging finetuned checkpoints without inheriting a backdoor that one of them may carry.

Jinluan Yang, Anke Tang, Didi Zhu, Zhengyu Chen, Li Shen, Fei Wu, "Mitigating the Backdoor Effect for Multi-Task
Model Merging via Safety-Aware Subspace", ICLR 2025, https://arxiv.org/abs/2410.13910.

Checkpoints of one pretrained network that come from strangers can be merged into one network for all their tasks.
A backdoor in one of them then works in the merged network, on its own task and on others. DAM learns, from
unlabelled inputs alone, which entries of the task vectors to keep: one mask for the subspace that the tasks
share, another that closes the shortcuts which a universal perturbation of the inputs finds.
"""

from __future__ import annotations

from typing import Literal

from torchfolio.adaptation.mask_training import Bound, MaskTraining, warn_of_collapse
from torchfolio.adaptation.merge import Merge, MergeResult, Merging
from torchfolio.adaptation.merging import Stream, TaskVectors, adapt_weights, initial_weights
from torchfolio.checks import at_least, finite, number, one_of, positive, whole

__all__ = ["ConcreteMerging", "DefenseAwareMerging"]


class DefenseAwareMerging(Merge):
    """Merge checkpoints with a task-shared and a backdoor-detection mask over their task vectors.

    $$\\theta(\\lambda, M) = \\theta_0 + \\sum_i \\lambda_i (\\tau_i \\odot M), \\qquad M = M_1 \\odot M_2$$

    Each mask is a relaxed Bernoulli sample $m = \\sigma((\\varphi + \\ln u - \\ln(1 - u)) / T)$, divided by its mean
    over every tensor. A step, on one unlabelled batch $x_i$ of every task:

    1. sample the masks;
    2. move $\\lambda$ from $\\lambda^0$ by one gradient step on $\\sum_i H(f_i(x_i))$, the mask held fixed;
    3. move the universal perturbation $\\delta_i$ of every task towards what flips the network's predictions
       $\\hat y_i$, up $\\sum_i \\mathrm{CE}(f_i(x_i + \\delta_i), \\hat y_i)$, and clamp it to
       $\\lVert\\delta_i\\rVert_\\infty \\le \\varepsilon$;
    4. move $\\varphi_1$ down $L_\\text{perf} = \\sum_i H(f_i(x_i))$, $M_2$ held fixed;
    5. move $\\varphi_2$ down $L_\\text{perf} + \\alpha L_\\text{safe}$, $M_1$ and $\\delta$ held fixed, with
       $L_\\text{safe} = \\sum_i \\mathrm{CE}(f_i(x_i + \\delta_i), \\hat y_i)$.

    Afterwards the mask is fixed and $\\lambda$ may be adapted by least entropy. Perturbed inputs are clamped to
    their range; step 3 passes gradients through that clamp, for a pixel of a black border that a perturbation has
    once pushed below zero has no gradient and would stay there.

    Args:
        safety: $L_\\text{safe}$: `"consistency"` as above, or `"entropy"`, $\\sum_i H(f_i(x_i + \\delta_i))$, which
            the authors' code uses and which mostly makes perturbed predictions confident.
        masks: `"dual"` as in the paper, or `"single"`: one mask that takes both losses, as in the authors' code.
        alpha: weight $\\alpha$ of safety. Large values make a constant network the optimum.
        epsilon: bound of the perturbation, as a share of the input range. A trigger that flips no prediction at
            this strength is not found.
        search: way in which step 3 looks for $\\delta$: `"adam"`, one perturbation that starts at zero and follows
            Adam, as in the authors' code; or `"restarts"`: at every step a uniform draw within the bound and
            `delta_steps` steps of $2 \\varepsilon$ / `delta_steps` along the gradient's sign. Adam follows the mask
            into one corner of the ball, and the mask forgets the others; restarts keep showing it new ones.
        delta_steps: steps of the search at every step of the masks.
        temperature: $T$ of the masks.
        weight: $\\lambda^0$.
        layerwise: one coefficient per task and tensor rather than per task.
        inner_lr: step size on $\\lambda$ in 2; 0 keeps $\\lambda^0$. (The authors' code takes a step of Adam at rate
            1, a jump of one per coefficient.)
        mask_lr: learning rate of Adam on the masks' logits; 2e-2 suits small networks.
        delta_lr: learning rate of Adam on the perturbations; likewise. Restarts do without.
        steps: number of steps; the authors take 1000 to 2000 on CLIP, small networks need about 100.
        adapt_steps: steps of the adaptation of $\\lambda$ afterwards; 0 keeps $\\lambda^0$.
        adapt_lr: its learning rate.
        eval_mask: mask in the end: `"mean"`, $\\sigma(\\varphi)$; `"sample"`; or `"discrete"`, $[\\varphi > 0]$.
        batch_size: batch size of inputs given as tensors or data sets; loaders keep their own.
        input_range: least and greatest value of an input, numbers or one per channel (dimension 1); `None` does
            not clamp, and takes `epsilon` in the units of the input.
        seed: seed of masks and of the order of inputs.

    Example:
        >>> dam = DefenseAwareMerging(steps=120, mask_lr=2e-2, delta_lr=2e-2, alpha=0.05, weight=0.7, adapt_steps=0)
        >>> result = dam.fit(pretrained, [net_a, net_b], [images_a, images_b], heads=[head_a, head_b])
        >>> logits = head_a(result.model(x))

    Reference:
        Section 4; relaxed masks and inner step as in the authors' code (FusionBench's concrete AdaMerging).
    """

    needs_inputs = True

    def __init__(
        self,
        *,
        safety: Literal["consistency", "entropy"] = "consistency",
        masks: Literal["dual", "single"] = "dual",
        alpha: float = 0.1,
        epsilon: float = 0.15,
        search: Literal["adam", "restarts"] = "adam",
        delta_steps: int = 1,
        temperature: float = 0.5,
        weight: float = 0.3,
        layerwise: bool = False,
        inner_lr: float = 0.05,
        mask_lr: float = 1e-3,
        delta_lr: float = 1e-4,
        steps: int = 1000,
        adapt_steps: int = 1000,
        adapt_lr: float = 1e-3,
        eval_mask: Literal["mean", "sample", "discrete"] = "mean",
        batch_size: int = 16,
        input_range: tuple[Bound, Bound] | None = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        one_of("safety", safety, ("consistency", "entropy"))
        one_of("masks", masks, ("dual", "single"))
        one_of("search", search, ("adam", "restarts"))
        one_of("eval_mask", eval_mask, ("mean", "sample", "discrete"))
        numbers = {"alpha": alpha, "epsilon": epsilon, "inner_lr": inner_lr, "mask_lr": mask_lr, "delta_lr": delta_lr}
        for name, value in {**numbers, "adapt_lr": adapt_lr}.items():
            at_least(name, value, 0)
        for name, value, least in (
            ("steps", steps, 0),
            ("adapt_steps", adapt_steps, 0),
            ("delta_steps", delta_steps, 1),
        ):
            whole(name, value, least)
        whole("batch_size", batch_size, 1)
        whole("seed", seed)
        finite("weight", number("weight", weight))
        positive("temperature", temperature)
        self.safety, self.masks, self.alpha, self.epsilon = safety, masks, alpha, epsilon
        self.temperature, self.weight, self.layerwise, self.inner_lr = temperature, weight, layerwise, inner_lr
        self.mask_lr, self.delta_lr, self.steps = mask_lr, delta_lr, steps
        self.search, self.delta_steps = search, delta_steps
        self.adapt_steps, self.adapt_lr, self.eval_mask = adapt_steps, adapt_lr, eval_mask
        self.batch_size, self.input_range, self.seed = batch_size, input_range, seed

    def _merge(self, run: Merging) -> MergeResult:
        tasks = TaskVectors(run.pretrained, run.finetuned, heads=run.heads, forward=run.forward, buffers=run.buffers)
        stream = Stream(run.batches, len(tasks), self.batch_size, self.seed, tasks.base.device)
        start = initial_weights(tasks, self.weight, self.layerwise)
        training = MaskTraining(self, tasks, start)
        history = [training.step(stream.draw(), step) for step in range(self.steps)]
        warn_of_collapse(history)
        mask = training.final_mask()
        weights, adapted = adapt_weights(tasks, stream, start, mask, lr=self.adapt_lr, steps=self.adapt_steps)
        return MergeResult(
            tasks.merged(weights, mask),
            weights,
            {name: value.clone() for name, value in tasks.unflatten(mask).items()},
            tuple(delta.detach().clone() for delta in training.deltas),
            (*history, *adapted),
        )


class ConcreteMerging(DefenseAwareMerging):
    """Concrete subspace merging: the task-shared mask alone, without a search for backdoors.

    Args:
        **settings: those of `DefenseAwareMerging`, except `safety`, `masks`, `alpha` and those of the search: `epsilon`,
            `search`, `delta_steps` and `delta_lr`.

    Reference:
        A. Tang et al., "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion", 2023,
        https://arxiv.org/abs/2312.06173.
    """

    def __init__(self, **settings: object) -> None:
        fixed = {"safety", "masks", "alpha", "epsilon", "search", "delta_steps", "delta_lr"} & set(settings)
        if fixed:
            raise TypeError(f"ConcreteMerging takes no {', '.join(sorted(fixed))}")
        super().__init__(masks="single", alpha=0.0, **settings)  # type: ignore[arg-type]
