"""Triggers: what turns an input into one that a backdoored network obeys.

Every trigger is a module from images `[N, C, H, W]` in [0, 1], not normalised, to images of the same shape. It leaves
its input alone, clamps its output to [0, 1], and is differentiable in the image and in its own parameters. Put the
normalisation into the network (`torchfolio.backdoor.zoo.Normalize`), so that triggers, norms and clamps stay in the
space of pixels.

Sources: patches and blends, Gu et al., "BadNets", 2017, and Chen et al., "Targeted Backdoor Attacks on Deep Learning
Systems Using Data Poisoning", 2017; sinusoids, Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption
Without Label Poisoning", ICIP 2019; warps, Nguyen and Tran, "WaNet", ICLR 2021.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks

__all__ = [
    "AdditiveTrigger",
    "BlendTrigger",
    "GeneratorTrigger",
    "PatchTrigger",
    "SinusoidTrigger",
    "TokenTrigger",
    "Trigger",
    "WarpTrigger",
    "keyed_uniform",
]

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]
ADDITIVE_SHAPES = ("bigX", "chessboard", "static", "cross", "square", "lshape", "X", "pixel")


class Trigger(nn.Module, ABC):
    """What all triggers of images share; subclasses say in `change` what they do.

    Call it as `trigger(x, index=index)`: `x` is `[N, C, H, W]` in [0, 1] and `index` `[N]` numbers the samples, for
    triggers that draw something for each (without it they count from 0).
    """

    def forward(self, x: Tensor, *, index: Tensor | None = None) -> Tensor:
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"expected float images [N, C, H, W], got {x.dtype} of shape {tuple(x.shape)}")
        expected = self.image_shape()
        if expected is not None and not _fits(x.shape[1:], expected):
            raise ValueError(f"expected images of shape {tuple(expected)}, got {tuple(x.shape[1:])}")
        if index is None:
            index = torch.arange(len(x), device=x.device)
        elif index.shape != (len(x),):
            raise ValueError(f"expected an index for each of {len(x)} images, got shape {tuple(index.shape)}")
        return self.change(x, index.to(x.device)).clamp(0, 1)

    @abstractmethod
    def change(self, x: Tensor, index: Tensor) -> Tensor:
        """The triggered images, before they are clamped."""

    def image_shape(self) -> Sequence[int] | None:
        """`[C, H, W]` of the images that the trigger is made for, 1 for any number of channels; `None` for any."""
        return None

    def settings(self) -> dict[str, Any]:
        """Constructor arguments other than tensors."""
        return {}

    def spec(self) -> dict[str, Any]:
        """`kind`, `settings` (JSON values) and `tensors`: all that `from_spec` needs."""
        tensors = {name: value.detach().clone() for name, value in self.state_dict().items()}
        return {"kind": type(self).__name__, "settings": self.settings(), "tensors": tensors}

    @staticmethod
    def from_spec(spec: Mapping[str, Any], **modules: nn.Module) -> Trigger:
        """A trigger from what `spec` gave.

        Args:
            spec: of the trigger.
            **modules: arguments that are modules (`net` of a `GeneratorTrigger`); their weights come from the spec.

        Raises:
            ValueError: if the kind is unknown.
        """
        kinds = {kind.__name__: kind for kind in Trigger.__subclasses__()}
        if spec["kind"] not in kinds:
            raise ValueError(f"expected a trigger of the kinds {', '.join(sorted(kinds))}, got {spec['kind']!r}")
        return kinds[spec["kind"]]._build(spec["settings"], dict(spec["tensors"]), modules)

    @classmethod
    def _build(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
    ) -> Trigger:
        return cls(**tensors, **settings)  # pyright: ignore[reportCallIssue]


def _fits(got: Sequence[int], expected: Sequence[int]) -> bool:
    return (expected[0] in (1, got[0])) and tuple(got[1:]) == tuple(expected[1:])


class PatchTrigger(Trigger):
    """A patch in the place of pixels, $x' = x + \\alpha\\, m \\odot (p - x)$.

    Args:
        pattern: $p$, `[C, H, W]` or `[1, H, W]` for all channels.
        mask: $m$ in [0, 1], `[H, W]` or `[1, H, W]`.
        alpha: $\\alpha$ in [0, 1].
        random_location: put the box that holds the patch at a place drawn for each image.
        seed: of those places.

    Raises:
        ValueError: on shapes that do not fit, values outside [0, 1], or an empty mask where its place is random.
    """

    pattern: Tensor
    mask: Tensor

    def __init__(
        self, pattern: Tensor, mask: Tensor, alpha: float = 1.0, *, random_location: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        mask = mask if mask.dim() == 3 else mask[None]
        if pattern.dim() != 3 or mask.shape[-2:] != pattern.shape[-2:] or len(mask) != 1:
            raise ValueError(
                f"expected a pattern [C, H, W] and a mask [H, W], got {tuple(pattern.shape)} and {tuple(mask.shape)}"
            )
        for name, value in {"pattern": pattern, "mask": mask, "alpha": torch.tensor(alpha)}.items():
            _check_unit(name, value)
        if random_location and not bool((mask > 0).any()):
            raise ValueError("a patch at a random place needs a mask that is not empty")
        self.register_buffer("pattern", pattern.float())
        self.register_buffer("mask", mask.float())
        self.alpha, self.random_location, self.seed = alpha, random_location, seed

    @classmethod
    def checkerboard(
        cls, shape: Sequence[int], size: int = 3, corner: Corner = "bottom-right", margin: int = 1, **settings: Any
    ) -> PatchTrigger:
        """The patch of BadNets: a checkerboard of `size` pixels, `margin` pixels from a corner.

        Args:
            shape: `[C, H, W]` of the images.
            size: side of the patch.
            corner: which one.
            margin: pixels between the patch and the border.
            **settings: of `PatchTrigger`.
        """
        rows, columns = _box(shape, size, corner, margin)
        pattern, mask = torch.zeros(1, *shape[-2:]), torch.zeros(*shape[-2:])
        pattern[0, rows, columns] = ((torch.arange(size)[:, None] + torch.arange(size)) % 2 == 0).float()
        mask[rows, columns] = 1
        return cls(pattern, mask, **settings)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        pattern, mask = self.pattern.to(x), self.mask.to(x)
        if self.random_location:
            pattern, mask = self._moved(pattern, mask, index)
        return torch.lerp(x, pattern.expand_as(x) if pattern.dim() == 4 else pattern, self.alpha * mask)

    def _moved(self, pattern: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        height, width = mask.shape[-2:]
        rows, columns = (mask[0] > 0).any(1).nonzero()[:, 0], (mask[0] > 0).any(0).nonzero()[:, 0]
        extent = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        u = keyed_uniform(self.seed, index, (2,))
        top, left = ((u[:, k] * (side - extent[k] + 1)).long() for k, side in enumerate((height, width)))
        # Roll every image's pattern so that its box begins at (top, left).
        i = (torch.arange(height, device=mask.device) - (top - rows[0])[:, None]) % height
        j = (torch.arange(width, device=mask.device) - (left - columns[0])[:, None]) % width
        place = i[:, :, None], j[:, None, :]
        return pattern[:, place[0], place[1]].transpose(0, 1), mask[:, place[0], place[1]].transpose(0, 1)

    def image_shape(self) -> Sequence[int]:
        return self.pattern.shape

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "random_location": self.random_location, "seed": self.seed}


def _box(shape: Sequence[int], size: int, corner: Corner, margin: int) -> tuple[slice, slice]:
    """Rows and columns of a square near a corner."""
    vertical, _, horizontal = corner.partition("-")
    if vertical not in ("top", "bottom") or horizontal not in ("left", "right"):
        raise ValueError(f"expected corner to be top-left, top-right, bottom-left or bottom-right, got {corner!r}")
    height, width = shape[-2:]
    if size < 1 or margin < 0 or size + margin > min(height, width):
        raise ValueError(f"a patch of {size} pixels, {margin} from the border, does not fit images of {height}x{width}")
    top = margin if vertical == "top" else height - margin - size
    left = margin if horizontal == "left" else width - margin - size
    return slice(top, top + size), slice(left, left + size)


class BlendTrigger(Trigger):
    """A pattern over the whole image, $x' = (1 - \\alpha) x + \\alpha p$.

    Args:
        pattern: $p$, `[C, H, W]` or `[1, H, W]`.
        alpha: $\\alpha$ in [0, 1].
    """

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float = 0.2) -> None:
        super().__init__()
        if pattern.dim() != 3:
            raise ValueError(f"expected a pattern [C, H, W], got shape {tuple(pattern.shape)}")
        _check_unit("pattern", pattern)
        _check_unit("alpha", torch.tensor(alpha))
        self.register_buffer("pattern", pattern.float())
        self.alpha = alpha

    @classmethod
    def noise(cls, shape: Sequence[int], alpha: float = 0.2, seed: int = 0, cells: int = 4) -> BlendTrigger:
        """A smooth random pattern: uniform noise on `cells` x `cells` points, enlarged to `shape` `[C, H, W]`."""
        coarse = torch.rand(1, shape[0], cells, cells, generator=torch.Generator().manual_seed(seed))
        return cls(F.interpolate(coarse, tuple(shape[-2:]), mode="bilinear", align_corners=True)[0].clamp(0, 1), alpha)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.lerp(x, self.pattern.to(x).expand_as(x), torch.as_tensor(self.alpha).to(x))

    def image_shape(self) -> Sequence[int]:
        return self.pattern.shape

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha}


class AdditiveTrigger(Trigger):
    """A pattern that is added, $x' = \\operatorname{round}(255 (x + \\delta)) / 255$, clamped.

    Args:
        delta: $\\delta$, `[C, H, W]` or `[1, H, W]`.
        quantize: round to whole grey levels, as a stored image is; the gradient passes straight through.
    """

    delta: Tensor

    def __init__(self, delta: Tensor, quantize: bool = True) -> None:
        super().__init__()
        if delta.dim() != 3 or not bool(delta.isfinite().all()):
            raise ValueError(f"expected a finite pattern [C, H, W], got shape {tuple(delta.shape)}")
        self.register_buffer("delta", delta.float())
        self.quantize = quantize

    @classmethod
    def shape(
        cls, name: str, shape: Sequence[int], amplitude: float = 15 / 255, *, seed: int = 0, quantize: bool = True
    ) -> AdditiveTrigger:
        """A pattern of constant amplitude.

        Args:
            name: `"bigX"` (both diagonals), `"chessboard"` (every other pixel), `"static"` (even rows and columns),
                or, small and at a place drawn by `seed`: `"cross"`, `"square"`, `"lshape"`, `"X"`, `"pixel"`.
            shape: `[C, H, W]` of the images.
            amplitude: of the pattern, in [0, 1].
            seed: of the place.
            quantize: see the class.
        """
        return cls(amplitude * _figure(name, shape[-2], shape[-1], seed)[None], quantize)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        y = (x + self.delta.to(x)).clamp(0, 1)
        # Exactly the rounded values, with the gradient of y.
        return (255 * y).round().detach() / 255 + (y - y.detach()) if self.quantize else y

    def image_shape(self) -> Sequence[int]:
        return self.delta.shape

    def settings(self) -> dict[str, Any]:
        return {"quantize": self.quantize}


def _figure(name: str, height: int, width: int, seed: int) -> Tensor:
    """The ones of a pattern, `[H, W]`."""
    i, j = torch.arange(height)[:, None], torch.arange(width)
    whole = {
        "bigX": lambda: (i * (width - 1) // max(1, height - 1) == j) | (i * (width - 1) // max(1, height - 1) == width - 1 - j),
        "chessboard": lambda: (i + j) % 2 == 0,
        "static": lambda: (i % 2 == 0) & (j % 2 == 0),
    }  # fmt: skip
    if name in whole:
        return whole[name]().float()
    small = {
        "cross": [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
        "square": [[1, 1], [1, 1]],
        "lshape": [[1, 0], [1, 0], [1, 1]],
        "X": [[1, 0, 1], [0, 1, 0], [1, 0, 1]],
        "pixel": [[1]],
    }
    if name not in small:
        raise ValueError(f"expected a shape among {', '.join(ADDITIVE_SHAPES)}, got {name!r}")
    figure, made = torch.tensor(small[name], dtype=torch.float32), torch.zeros(height, width)
    if height < len(figure) or width < len(figure[0]):
        raise ValueError(f"images of {height}x{width} are too small for the shape {name}")
    u = keyed_uniform(seed, torch.zeros(1, dtype=torch.long), (2,))[0]
    top, left = int(u[0] * (height - len(figure) + 1)), int(u[1] * (width - len(figure[0]) + 1))
    made[top : top + len(figure), left : left + len(figure[0])] = figure
    return made


class SinusoidTrigger(Trigger):
    """Vertical stripes, $x'_{\\cdot ij} = x_{\\cdot ij} + \\delta \\sin(2 \\pi j f / W)$; by tradition on images whose label is kept.

    Args:
        delta: amplitude $\\delta$ in [0, 1].
        freq: stripes $f$ over the width.
    """

    def __init__(self, delta: float = 40 / 255, freq: float = 6.0) -> None:
        super().__init__()
        _check_unit("delta", torch.tensor(delta))
        self.delta, self.freq = delta, checks.finite("freq", checks.number("freq", freq))

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        j = torch.arange(x.shape[3], device=x.device, dtype=x.dtype)
        return x + self.delta * (2 * math.pi * self.freq / x.shape[3] * j).sin()

    def settings(self) -> dict[str, Any]:
        return {"delta": self.delta, "freq": self.freq}


class WarpTrigger(Trigger):
    """A smooth warp of the image. A field $n \\sim U(-1, 1)$ on `k` x `k` points is divided by its mean magnitude and
    enlarged (bicubic) to the image; pixels are read at

    $$g = \\operatorname{clamp}\\bigl((\\text{identity} + s\\, n / H) \\cdot \\text{rescale}, -1, 1\\bigr).$$

    Args:
        k: points of the field on a side.
        s: strength $s$; 0 leaves the image as it is.
        grid_rescale: factor on the grid.
        noise: add $U(-1, 1) / H$ to the grid for every pixel and image: the "cover" version whose label is kept.
        seed: of the field and the noise.
        field: `[2, k, k]`; drawn by default.
    """

    field: Tensor

    def __init__(
        self,
        k: int = 4,
        s: float = 0.5,
        grid_rescale: float = 1.0,
        noise: bool = False,
        seed: int = 0,
        field: Tensor | None = None,
    ) -> None:
        super().__init__()
        checks.whole("k", k, 2)
        checks.whole("seed", seed)
        for name, value in (("s", s), ("grid_rescale", grid_rescale)):
            checks.finite(name, checks.number(name, value))
        if field is None:
            drawn = 2 * torch.rand(2, k, k, generator=torch.Generator().manual_seed(seed)) - 1
            field = drawn / drawn.abs().mean()
        if field.shape != (2, k, k):
            raise ValueError(f"expected a field of shape (2, {k}, {k}), got {tuple(field.shape)}")
        self.register_buffer("field", field.float())
        self.k, self.s, self.grid_rescale, self.noise, self.seed = k, s, grid_rescale, noise, seed

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        height, width = x.shape[2:]
        flow = F.interpolate(self.field.to(x)[None], (height, width), mode="bicubic", align_corners=True)
        theta = torch.eye(2, 3, dtype=x.dtype, device=x.device)[None]
        identity = F.affine_grid(theta, [1, 1, height, width], align_corners=True)
        grid = (identity + self.s * flow.permute(0, 2, 3, 1) / height) * self.grid_rescale
        if self.noise:
            u = keyed_uniform(self.seed + 1, index, (height, width, 2)).to(x)
            grid = grid + (2 * u - 1) / height
        grid = grid.clamp(-1, 1).expand(len(x), height, width, 2)
        return F.grid_sample(x, grid, align_corners=True)

    def settings(self) -> dict[str, Any]:
        names = ("k", "s", "grid_rescale", "noise", "seed")
        return {name: getattr(self, name) for name in names}


class GeneratorTrigger(Trigger):
    """A network's image within $\\varepsilon$ of the original, $x' = \\min(\\max(g(x), x - \\varepsilon), x + \\varepsilon)$.

    Args:
        net: $g$, from images to images.
        eps: $\\varepsilon$.
    """

    def __init__(self, net: nn.Module, eps: float = 8 / 255) -> None:
        super().__init__()
        self.net, self.eps = net, checks.at_least("eps", eps, 0)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(self.net(x), x - self.eps), x + self.eps)

    def settings(self) -> dict[str, Any]:
        return {"eps": self.eps}

    @classmethod
    def _build(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
    ) -> Trigger:
        if "net" not in modules:
            raise ValueError("a GeneratorTrigger is built around a network: pass it as net=")
        made = cls(modules["net"], **settings)
        made.load_state_dict(tensors)
        return made


class TokenTrigger(nn.Module):
    """A phrase, inserted in one piece into sequences of token ids.

    Args:
        tokens: ids of the phrase.
        position: `"random"`, between any two tokens, the ends included; `"start"` or `"end"`.
        seed: of the positions, drawn for each sequence by its index.

    Shapes:
        A list of id lists to the same; or padded ids `[N, L]` with lengths `[N]` to `[N, L + len(tokens)]` and lengths.

    Example:
        >>> TokenTrigger([7], position="end")([[1, 2], [3]])
        [[1, 2, 7], [3, 7]]
    """

    def __init__(
        self, tokens: Sequence[int], position: Literal["random", "start", "end"] = "random", seed: int = 0
    ) -> None:
        super().__init__()
        if not len(tokens):
            raise ValueError("expected a phrase of at least one token, got none")
        if position not in ("random", "start", "end"):
            raise ValueError(f"expected position to be 'random', 'start' or 'end', got {position!r}")
        self.tokens, self.position, self.seed = list(tokens), position, seed

    def forward(
        self,
        sequences: Sequence[Sequence[int]] | Tensor,
        lengths: Tensor | None = None,
        *,
        index: Tensor | None = None,
    ) -> Any:
        if isinstance(sequences, Tensor):
            if lengths is None or lengths.shape != (len(sequences),):
                raise ValueError("expected the length of every padded sequence")
            return self._padded(sequences, lengths, self._places(lengths, index))
        counts = torch.tensor([len(s) for s in sequences])
        places = self._places(counts, index).tolist()
        return [[*s[:p], *self.tokens, *s[p:]] for s, p in zip(map(list, sequences), places, strict=True)]

    def _places(self, lengths: Tensor, index: Tensor | None) -> Tensor:
        if self.position != "random":
            return torch.zeros_like(lengths) if self.position == "start" else lengths
        index = torch.arange(len(lengths)) if index is None else index
        u = keyed_uniform(self.seed, index.to(lengths.device), (1,))[:, 0]
        return (u * (lengths + 1)).long().clamp(max=lengths)

    def _padded(self, ids: Tensor, lengths: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.tokens)
        j = torch.arange(ids.shape[1] + count, device=ids.device)
        offset = j - places[:, None]
        source = torch.where(offset < 0, j, (j - count).clamp_min(0)).clamp(max=ids.shape[1] - 1)
        phrase = torch.tensor(self.tokens, device=ids.device, dtype=ids.dtype)[offset.clamp(0, count - 1)]
        inside = (offset >= 0) & (offset < count)
        return torch.where(inside, phrase, ids.gather(1, source)), lengths + count


def keyed_uniform(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed and each sample's index alone.

    Whatever batches samples come in, in whatever order, by however many workers, each gets the same numbers.

    Args:
        seed: of the stream.
        index: of the samples, integers `[N]`.
        shape: of the numbers of one sample.

    Returns:
        float64 `[N, *shape]`, from the SplitMix64 hash of (seed, index, position).
    """
    position = torch.arange(math.prod(shape), device=index.device)
    key = _splitmix(_splitmix(torch.full_like(index, seed, dtype=torch.long)) + index.long())
    bits = _splitmix(key[:, None] + position * _GAMMA)
    return ((bits >> 11) & ((1 << 53) - 1)).double().mul_(2.0**-53).view(len(index), *shape)


_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)


def _splitmix(z: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood, 2014) in wrapping 64-bit integers."""
    z = z + _GAMMA
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _check_unit(name: str, value: Tensor) -> None:
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"expected {name} in [0, 1], got {float(value.min()):g} to {float(value.max()):g}")
