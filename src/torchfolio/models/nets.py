"""Small reference networks. Those that are sequential are `nn.Sequential`, with the classifier last as `head`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.models.chain import remembered
from torchfolio.models.init import initialize

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """An activation by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


@remembered
class MLP(nn.Sequential):
    """A multilayer perceptron: `layer1`, …, `layerL`, `head`.

    Args:
        in_features: width of the input; inputs with more axes are flattened.
        out_features: width of the output.
        hidden: widths of the hidden layers; may be empty.
        activation: name in `ACTIVATIONS`.
        norm: `"batch"`, `"layer"` or `None`, between the linear map and the activation.
        dropout: probability of dropping a hidden unit.
        bias: whether linear maps have a bias.
        init: name of an initialisation (see `initialize`), or `None` for PyTorch's default.

    Shapes:
        `[B, ...]` with `in_features` numbers each, to `[B, out_features]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        norm: str | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        init: str | None = None,
    ) -> None:
        if norm not in (None, "batch", "layer"):
            raise ValueError(f"expected norm to be 'batch', 'layer' or None, got {norm!r}")
        children: OrderedDict[str, nn.Module] = OrderedDict()
        width = in_features
        for k, units in enumerate(hidden, start=1):
            parts: list[nn.Module] = [nn.Flatten()] if k == 1 else []
            parts.append(nn.Linear(width, units, bias=bias))
            if norm is not None:
                parts.append(nn.BatchNorm1d(units) if norm == "batch" else nn.LayerNorm(units))
            parts.append(ACTIVATIONS[activation]() if activation in ACTIVATIONS else _unknown(activation))
            if dropout:
                parts.append(nn.Dropout(dropout))
            children[f"layer{k}"] = nn.Sequential(*parts)
            width = units
        head = nn.Linear(width, out_features, bias=bias)
        children["head"] = head if hidden else nn.Sequential(nn.Flatten(), head)
        super().__init__(children)
        if init is not None:
            initialize(self, init)


def _unknown(name: str) -> nn.Module:
    raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def conv_block(in_channels: int, out_channels: int, stride: int = 1, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU, and a 2x2 max pool if asked for."""
    parts: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]
    return nn.Sequential(*parts, nn.MaxPool2d(2, ceil_mode=True)) if pool else nn.Sequential(*parts)


def pooled_head(channels: int, num_classes: int) -> nn.Sequential:
    """Global average pool and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@remembered
class ConvNet(nn.Sequential):
    """A small convolutional network: `layer1`, …, `layerL` (convolution, batch norm, ReLU, max pool), `head`.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        widths: channels of the layers; each halves the resolution (rounding up).

    Shapes:
        `[B, in_channels, H, W]` to `[B, num_classes]`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (32, 64, 128)) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for k, width in enumerate(widths, start=1):
            children[f"layer{k}"] = conv_block(channels, width, pool=True)
            channels = width
        children["head"] = pooled_head(channels, num_classes)
        super().__init__(children)


VGG_PLANS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


@remembered
class VGG(nn.Sequential):
    """VGG with batch norm for small images: `layer1`, …, `layerL`, and a pooled linear `head`.

    Args:
        plan: `"vgg11"`, `"vgg13"`, `"vgg16"`, `"vgg19"`, or the widths of each stage.
        num_classes: width of the output.
        in_channels: channels of the images.
        width: factor on all widths.

    Shapes:
        `[B, in_channels, H, W]` to `[B, num_classes]`; every stage halves the resolution (rounding up), so 16x16
        images do too.

    Reference:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, with
        batch norm and one linear layer, as is usual on CIFAR.
    """

    def __init__(
        self,
        plan: str | Sequence[Sequence[int]] = "vgg16",
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        if isinstance(plan, str) and plan not in VGG_PLANS:
            raise ValueError(f"expected plan to be one of {', '.join(VGG_PLANS)} or widths, got {plan!r}")
        stages = VGG_PLANS[plan] if isinstance(plan, str) else plan
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for stage in stages:
            for k, wanted in enumerate(stage):
                units = max(1, round(wanted * width))
                children[f"layer{len(children) + 1}"] = conv_block(channels, units, pool=k == len(stage) - 1)
                channels = units
        children["head"] = pooled_head(channels, num_classes)
        super().__init__(children)
        initialize(self, "he_fan_out")


def vgg11(**kwargs: object) -> VGG:
    """VGG-11 with batch norm; arguments of `VGG`."""
    return VGG("vgg11", **kwargs)  # pyright: ignore[reportArgumentType]


def vgg13(**kwargs: object) -> VGG:
    """VGG-13 with batch norm; arguments of `VGG`."""
    return VGG("vgg13", **kwargs)  # pyright: ignore[reportArgumentType]


def vgg16(**kwargs: object) -> VGG:
    """VGG-16 with batch norm; arguments of `VGG`."""
    return VGG("vgg16", **kwargs)  # pyright: ignore[reportArgumentType]


def vgg19(**kwargs: object) -> VGG:
    """VGG-19 with batch norm; arguments of `VGG`."""
    return VGG("vgg19", **kwargs)  # pyright: ignore[reportArgumentType]


class PatchEmbedding(nn.Module):
    """Patches as tokens, with learned positions: `[B, C, H, W] -> [B, (H/p)(W/p), D]`."""

    def __init__(self, image_size: int, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"expected image_size {image_size} to be a multiple of patch_size {patch_size}")
        self.project = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, dim))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


@remembered
class EncoderBlock(nn.Module):
    """A pre-norm transformer block: attention and a two-layer perceptron, each on a residual path.

    Args:
        dim: width of the tokens.
        heads: number of attention heads.
        mlp_ratio: hidden width of the perceptron over `dim`.
        dropout: on both residual paths.

    Shapes:
        `[B, T, dim]` to `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"expected dim {dim} to be a multiple of heads {heads}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = round(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self._attend(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class TokenMean(nn.Module):
    """The mean over tokens: `[B, T, D] -> [B, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@remembered
class ViT(nn.Sequential):
    """A small vision transformer: `embed`, `block1`, …, `blockL`, `head` (norm, mean over tokens, linear).

    Args:
        image_size: side of the square images.
        patch_size: side of a patch; divides `image_size`.
        num_classes: width of the output.
        in_channels: channels of the images.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads; divide `dim`.
        mlp_ratio: hidden width of the perceptrons over `dim`.
        dropout: on residual paths.

    Shapes:
        `[B, in_channels, image_size, image_size]` to `[B, num_classes]`.

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with mean pooling in place of a class token
        (Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022).
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        dim: int = 128,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        children["embed"] = PatchEmbedding(image_size, patch_size, in_channels, dim)
        for k in range(depth):
            children[f"block{k + 1}"] = EncoderBlock(dim, heads, mlp_ratio, dropout)
        children["head"] = nn.Sequential(nn.LayerNorm(dim), TokenMean(), nn.Linear(dim, num_classes))
        super().__init__(children)


def sinusoids(length: int, dim: int) -> Tensor:
    """Sinusoidal positions `[length, dim]` (Vaswani et al., 2017, section 3.5)."""
    rate = torch.exp(torch.arange(0, dim, 2) * (-torch.log(torch.tensor(10000.0)) / dim))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


@remembered
class Transformer(nn.Module):
    """An encoder-decoder transformer on token ids.

    Args:
        vocab_src: number of source tokens.
        vocab_tgt: number of target tokens.
        dim: width of the tokens; even.
        heads: attention heads.
        layers: encoder layers, and as many decoder layers.
        hidden: width inside the perceptrons; `4 * dim` by default.
        dropout: everywhere the original has it.
        norm_first: norms before the residual branches (pre-norm) or after them (post-norm, the original).
        max_length: longest sequence.
        pad: id of the padding token, masked out.

    Shapes:
        source `[B, S]` and target `[B, T]` of ids, to logits `[B, T, vocab_tgt]`.

    Reference:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    positions: Tensor

    def __init__(
        self,
        vocab_src: int,
        vocab_tgt: int,
        dim: int = 128,
        heads: int = 4,
        layers: int = 3,
        hidden: int | None = None,
        dropout: float = 0.1,
        norm_first: bool = True,
        max_length: int = 512,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.pad, self.max_length = dim, pad, max_length
        self.embed_src, self.embed_tgt = nn.Embedding(vocab_src, dim), nn.Embedding(vocab_tgt, dim)
        for embedding in (self.embed_src, self.embed_tgt):
            nn.init.normal_(embedding.weight, std=dim**-0.5)
        self.register_buffer("positions", sinusoids(max_length, dim), persistent=False)
        self.dropout = nn.Dropout(dropout)
        kind = {"nhead": heads, "dim_feedforward": hidden or 4 * dim, "dropout": dropout}
        encoder = nn.TransformerEncoderLayer(dim, batch_first=True, norm_first=norm_first, **kind)
        decoder = nn.TransformerDecoderLayer(dim, batch_first=True, norm_first=norm_first, **kind)
        final = (lambda: nn.LayerNorm(dim)) if norm_first else (lambda: None)
        self.encoder = nn.TransformerEncoder(encoder, layers, final(), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers, final())
        self.head = nn.Linear(dim, vocab_tgt)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states `[B, S, dim]` and the padding mask `[B, S]`."""
        mask = source == self.pad
        return self.encoder(self._embed(self.embed_src, source), src_key_padding_mask=mask), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Logits of every next token given the target so far."""
        length = target.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        states = self.decoder(
            self._embed(self.embed_tgt, target),
            memory,
            tgt_mask=causal,
            tgt_key_padding_mask=target == self.pad,
            memory_key_padding_mask=mask,
        )
        return self.head(states)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, *self.encode(source))

    @torch.no_grad()
    def greedy(self, source: Tensor, bos: int, eos: int, max_length: int = 64) -> Tensor:
        """The likeliest next token again and again, `[B, <= max_length]`, padded after `eos`."""
        memory, mask = self.encode(source)
        target = torch.full((len(source), 1), bos, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(max_length - 1):
            token = self.decode(target, memory, mask)[:, -1].argmax(-1).masked_fill(done, self.pad)
            target = torch.cat([target, token[:, None]], 1)
            done |= token == eos
            if done.all():
                break
        return target

    def _embed(self, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.max_length:
            raise ValueError(f"expected at most {self.max_length} tokens, got {ids.shape[1]}")
        return self.dropout(embedding(ids) * self.dim**0.5 + self.positions[: ids.shape[1]])


class UNetBlock(nn.Module):
    """Two convolutions with group norm on a residual path, shifted by a time embedding if there is one."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.GroupNorm(_groups(in_channels), in_channels),
            nn.GroupNorm(_groups(out_channels), out_channels),
        )
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


@remembered
class UNet(nn.Module):
    """A small U-Net, from image to image, with an optional time input for diffusion.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; those of the input by default.
        widths: channels at each resolution, finest first.
        timed: whether `forward` takes a time for each example.

    Shapes:
        `x` `[B, in_channels, H, W]` with H, W multiples of `2 ** (len(widths) - 1)`, `t` `[B]`, to
        `[B, out_channels, H, W]`.

    Reference:
        Ronneberger et al., "U-Net", MICCAI 2015; time embedding as in Ho et al., "Denoising Diffusion
        Probabilistic Models", NeurIPS 2020.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        widths: Sequence[int] = (32, 64, 128),
        timed: bool = False,
    ) -> None:
        super().__init__()
        time_dim = 4 * widths[0] if timed else 0
        self.time_width = widths[0]
        self.time = (
            nn.Sequential(nn.Linear(widths[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)) if timed else None
        )
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        self.down = nn.ModuleList([UNetBlock(a, b, time_dim) for a, b in pairs])
        self.middle = UNetBlock(widths[-1], widths[-1], time_dim)
        self.up = nn.ModuleList([UNetBlock(b + b, a, time_dim) for a, b in reversed(pairs)])
        self.head = nn.Sequential(
            nn.GroupNorm(_groups(widths[0]), widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], out_channels or in_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        factor = 2 ** (len(self.down) - 1)
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(f"expected height and width to be multiples of {factor}, got {tuple(x.shape[-2:])}")
        if (t is None) != (self.time is None):
            raise ValueError(
                "this network takes a time for each example" if t is None else "this network takes no time"
            )
        time = None if t is None or self.time is None else self.time(_time_features(t, self.time_width))
        h, skips = self.stem(x), []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if k else h, time)
            skips.append(h)
        h = self.middle(h, time)
        for k, block in enumerate(self.up):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0) if k else h, skips.pop()], 1), time)
        return self.head(h)


def _time_features(t: Tensor, dim: int) -> Tensor:
    rate = torch.exp(torch.arange(dim // 2, device=t.device) * (-9.2103 / (dim // 2)))
    angle = t[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)
