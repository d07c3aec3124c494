"""Odd modules: what is drawn counts right, what is made of the drawing computes the same, and so do its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.diagrams import check_svg, draw


class Of(nn.Module):
    """A function of a module and tensors as a module, with parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *tensors):
        return self.function(self, *tensors)


def R(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def written_into(s, x):
    x = x.clone()
    x.mul_(2).add_(1)
    view = x.view(2, 6)
    view[0] = 0
    return x + 1


MODULES = {
    "shared": (Of(lambda s, x: s.l(s.l(x)), l=nn.Linear(4, 4)), (R(3, 4),)),
    "batch1": (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)), (R(1, 3),)),
    "c1": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.Flatten()), (R(1, 1, 5, 5),)),
    "bc": (Of(lambda s, x, y: x[:, :1] + y * x.unsqueeze(0)), (R(3, 4), R(3, 4))),
    "where": (Of(lambda s, x, y: torch.where(x > 0, x, y)), (R(3, 4), R(3, 4))),
    "argmax": (Of(lambda s, x: (x.argmax(1), x.exp())), (R(3, 4),)),
    "dict": (Of(lambda s, x: {"a": x * 2, "b": (x.sum(1), x.mean())}), (R(3, 4),)),
    "scalar": (Of(lambda s, x: (x**2).mean()), (R(3, 4),)),
    "std": (Of(lambda s, x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)), (R(3, 4),)),
    "norm": (Of(lambda s, x: F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T), (R(3, 4),)),
    "sort": (Of(lambda s, x: x.sort(1)[0].cumsum(1)), (R(3, 4),)),
    "gather": (Of(lambda s, x, i: x.gather(1, i)), (R(3, 4), torch.randint(0, 4, (3, 2)))),
    "ell": (Of(lambda s, x, y: torch.einsum("...ij,...jk->...ik", x, y)), (R(2, 3, 4), R(2, 4, 5))),
    "diag": (Of(lambda s, x: torch.einsum("ii->i", x)), (R(4, 4),)),
    "trace": (Of(lambda s, x: torch.einsum("bii->b", x)), (R(2, 4, 4),)),
    "outer": (Of(lambda s, x, y: torch.einsum("bi,bj->bij", x, y)), (R(2, 3), R(2, 4))),
    "stack": (Of(lambda s, x: torch.stack([x, x * 2, x.exp()], 1).sum(1)), (R(3, 4),)),
    "repeat": (Of(lambda s, x: x.repeat(1, 2) + x.flip(1).repeat(1, 2).roll(1, 1)), (R(3, 4),)),
    "pad": (Of(lambda s, x: F.pad(x, (1, 2))), (R(3, 4),)),
    "interp": (Of(lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear")), (R(2, 3, 4, 4),)),
    "unfold": (Of(lambda s, x: F.unfold(x, 3)), (R(2, 3, 5, 5),)),
    "pshuf": (nn.PixelShuffle(2), (R(2, 8, 3, 3),)),
    "idx": (Of(lambda s, x: x[:, [0, 2]]), (R(3, 4),)),
    "slices": (Of(lambda s, x: x[:, 1:3] + x[:, -2:] + x[:, ::2]), (R(3, 4),)),
    "narrow": (Of(lambda s, x: x.narrow(1, 1, 2)), (R(3, 4),)),
    "gn": (nn.GroupNorm(2, 4), (R(2, 4, 3, 3),)),
    "ln0": (nn.LayerNorm(4, elementwise_affine=False), (R(2, 3, 4),)),
    "ln2": (nn.LayerNorm((3, 4)), (R(2, 3, 4),)),
    "rms": (nn.RMSNorm(4), (R(2, 3, 4),)),
    "in": (nn.InstanceNorm2d(3, affine=True), (R(2, 3, 4, 4),)),
    "bn0": (nn.BatchNorm1d(4, track_running_stats=False), (R(5, 4),)),
    "bn1": (nn.BatchNorm2d(3).train(), (R(5, 3, 2, 2),)),
    "c1d": (nn.Conv1d(2, 3, 3, padding="same"), (R(2, 2, 7),)),
    "c3d": (nn.Conv3d(2, 3, 2), (R(2, 2, 4, 4, 4),)),
    "ctop": (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, dilation=1), (R(2, 2, 4, 4),)),
    "circ": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (R(2, 2, 4, 4),)),
    "amax": (nn.AdaptiveMaxPool2d(2), (R(2, 3, 5, 5),)),
    "aavg": (nn.AdaptiveAvgPool2d((3, 1)), (R(2, 3, 6, 5),)),
    "avgp": (nn.AvgPool2d(3, 2, 1), (R(2, 3, 7, 7),)),
    "maxp": (nn.MaxPool2d((2, 1)), (R(2, 3, 6, 5),)),
    "bilin": (nn.Bilinear(3, 4, 5), (R(2, 3), R(2, 4))),
    "dec": (nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (R(2, 5, 8), R(2, 7, 8))),
    "mham": (
        Of(
            lambda s, x: s.m(x, x, x, attn_mask=torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), need_weights=False)[
                0
            ],
            m=nn.MultiheadAttention(8, 2, batch_first=True),
        ),
        (R(2, 5, 8),),
    ),
    "sdpam": (Of(lambda s, q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m)), (R(2, 3, 5, 4), R(5, 5))),
    "sdpab": (Of(lambda s, q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m > -5)), (R(2, 3, 5, 4), R(5, 5))),
    "sdpascale": (Of(lambda s, q: F.scaled_dot_product_attention(q, q, q, scale=0.3)), (R(2, 3, 5, 4),)),
    "gqa": (
        Of(lambda s, q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)),
        (R(2, 4, 5, 4), R(2, 2, 5, 4)),
    ),
    "param": (
        Of(lambda s, x: x * s.p + s.p.sum() - s.q.softmax(1) @ x.T @ x, p=nn.Parameter(R(4)), q=nn.Parameter(R(4, 4))),
        (R(4, 4),),
    ),
    "paramlong": (Of(lambda s, x: x + s.p, p=nn.Parameter(R(5, 3, 4))), (R(3, 4),)),
    "wx": (Of(lambda s, x: s.w @ x, w=nn.Parameter(R(5, 3))), (R(2, 3, 4),)),
    "xw": (Of(lambda s, x: x @ s.w + s.b, w=nn.Parameter(R(4, 5)), b=nn.Parameter(R(5))), (R(2, 3, 4),)),
    "matvec": (Of(lambda s, x: x @ s.w, w=nn.Parameter(R(4))), (R(3, 4),)),
    "bmmw": (Of(lambda s, x: x @ s.w, w=nn.Parameter(R(2, 4, 5))), (R(2, 3, 4),)),
    "addmm": (Of(lambda s, x: torch.addmm(s.b, x, s.w), w=nn.Parameter(R(4, 5)), b=nn.Parameter(R(5))), (R(3, 4),)),
    "baddbmm": (Of(lambda s, x, y: torch.baddbmm(x, x, y)), (R(2, 4, 4), R(2, 4, 4))),
    "alpha": (
        Of(
            lambda s, x, y: torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=3) + torch.div(x, y, rounding_mode="floor")
        ),
        (R(3, 4), R(3, 4)),
    ),
    "reuse": (
        Of(lambda s, x: (lambda h: h * h.sigmoid() + h.mean(1, keepdim=True) * x)(s.l(x)), l=nn.Linear(4, 4)),
        (R(3, 4),),
    ),
    "sameout": (Of(lambda s, x: (x, x + 1, x)), (R(3, 4),)),
    "unused": (Of(lambda s, x, y: x * 2), (R(3, 4), R(3, 4))),
    "detach": (Of(lambda s, x: x * x.detach()), (R(3, 4),)),
    "clamp": (Of(lambda s, x: x.clamp(-0.5, 0.5) + x.clamp(min=0)), (R(3, 4),)),
    "pow": (Of(lambda s, x: x.abs() ** 1.5 + 2**x), (R(3, 4),)),
    "glu": (nn.GLU(), (R(3, 4),)),
    "prelu": (nn.PReLU(), (R(3, 4),)),
    "logsum": (Of(lambda s, x: x.logsumexp(1) + x.log_softmax(1).sum(1) + x.prod(1)), (R(3, 4),)),
    "ce": (Of(lambda s, x, y: F.cross_entropy(x, y)), (R(3, 4), torch.tensor([0, 1, 2]))),
    "lstm2": (nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), (R(2, 5, 3),)),
    "rnn": (nn.RNN(3, 4, batch_first=True), (R(2, 5, 3),)),
    "permres": (Of(lambda s, x: x.permute(2, 0, 1).reshape(4, 6).T.reshape(2, 3, 4) + x), (R(2, 3, 4),)),
    "viewodd": (Of(lambda s, x: x.reshape(4, 3) @ x.reshape(3, 4)), (R(2, 6),)),
    "swap": (Of(lambda s, x: x.swapaxes(0, 1).movedim(0, -1)), (R(2, 3, 4),)),
    "expand": (Of(lambda s, x: x[:, None, :].expand(3, 5, 4).sum(1)), (R(3, 4),)),
    "bcastmm": (Of(lambda s, x, y: x.unsqueeze(1) @ y), (R(2, 3, 4), R(5, 4, 6))),
    "onehot": (
        Of(lambda s, i: F.one_hot(i, 5).to(s.w.dtype) @ s.w, w=nn.Parameter(R(5, 3))),
        (torch.tensor([0, 3, 1]),),
    ),
    "embtie": (Of(lambda s, i: s.e(i) @ s.e.weight.T, e=nn.Embedding(5, 3)), (torch.tensor([[0, 3, 1]]),)),
    "embbag": (nn.EmbeddingBag(5, 3), (torch.tensor([[0, 3, 1]]),)),
    "inpl": (Of(written_into), (R(3, 4),)),
    "conv of one": (nn.Conv2d(3, 4, 3), (R(3, 5, 5),)),
    "transposed of one": (nn.ConvTranspose1d(3, 4, 2, 2), (R(3, 5),)),
    "conv by an input": (Of(lambda s, x, w: F.conv2d(x, w)), (R(2, 3, 5, 5), R(4, 3, 3, 3))),
    "embedding of an input": (Of(lambda s, i, w: F.embedding(i, w)), (torch.tensor([0, 2]), R(4, 3))),
    "implicit": (Of(lambda s, x, y: torch.einsum("ij,...jk", x, y)), (R(2, 3), R(5, 3, 4))),
    "scalar weight": (Of(lambda s, x: torch.inner(x, s.w), w=nn.Parameter(R(1)[0])), (R(3),)),
    "gru of a state": (Of(lambda s, x, h: s.g(x, h), g=nn.GRU(3, 4)), (R(5, 2, 3), R(1, 2, 4))),
    "stacked weight": (Of(lambda s, x: torch.stack([x, s.w]), w=nn.Parameter(R(2, 3))), (R(2, 3),)),
    "weight like an input": (Of(lambda s, x: s.w.view_as(x) * s.v.expand_as(x) * x, w=nn.Parameter(R(6)), v=nn.Parameter(R(3))), (R(2, 3),)),
    "of all": (Of(lambda s, x: x.max() + x.min() * x), (R(2, 3),)),
    "expanded": (Of(lambda s, x: x.expand(4, 3).exp()), (R(1, 3),)),
    "whole slice": (Of(lambda s, x: x[:, 0:] + x[:, :3]), (R(2, 3),)),
    "one part": (Of(lambda s, x: x.split(4, 1)[0] * x.chunk(1)[0]), (R(3, 4),)),
    "window of places": (nn.LocalResponseNorm(2), (R(2, 4, 5, 5),)),
}  # fmt: skip


def leaves(found):
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_odd_modules(name):
    net, inputs = MODULES[name]
    torch.manual_seed(0)
    net, inputs = copy.deepcopy(net).double(), [t.double() if t.is_floating_point() else t for t in inputs]
    drawing = draw(net, inputs, level="full")
    check = check_svg(drawing.svg())
    assert check.counts_agree
    assert not check.overlaps
    module, again = drawing.to_module(), copy.deepcopy(net)
    wanted, found = leaves(again(*[t.clone() for t in inputs])), leaves(module(*[t.clone() for t in inputs]))
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a)
    backward = drawing.backward()
    assert check_svg(backward.svg()).counts_agree
    given = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = leaves(net(*[t.clone() if t.requires_grad else t for t in given]))
    cotangents = [torch.randn_like(o) if o.is_floating_point() else o for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    weights = dict(net.named_parameters())
    sources = [*(t for t in given if t.requires_grad), *weights.values()]
    asked = torch.autograd.grad([o for o, _ in pairs], sources, [c for _, c in pairs], allow_unused=True)
    own, by_name = backward.gradients(inputs, cotangents)
    got = [*(g for g, t in zip(own, given, strict=True) if t.requires_grad), *(by_name.get(n) for n in weights)]
    for a, b in zip(got, asked, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)
