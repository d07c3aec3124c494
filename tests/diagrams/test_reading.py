"""That drawings can be read: few crossings, large enough text, names for what is used far away, fences apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.diagrams.test_modules import Of, R
from torchfolio.diagrams import check_svg, draw


def kinds(drawing):
    return [s.kind for column in drawing.sheet.columns for s in column]


def overlapping(drawing):
    """Pairs of fences of which neither is inside the other and that share room."""
    boxes = [f.box for f in drawing.geometry.fences]
    inside = lambda a, b: b.left <= a.left and a.right <= b.right and b.top <= a.top and a.bottom <= b.bottom  # noqa: E731
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]
            if a.overlaps(b, 1.0) and not inside(a, b) and not inside(b, a)]  # fmt: skip


@pytest.mark.parametrize("first", [False, True])
def test_a_transformer_layer_is_easy_to_follow(first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=first).eval()
    drawing = draw(layer, R(2, 5, 16))
    check = check_svg(drawing.svg())
    assert check.crossings <= 12
    assert check.smallest >= 9
    assert not check.overlaps
    assert not check.through
    assert not overlapping(drawing)
    assert not {"reshape", "transpose"} & set(kinds(drawing))  # heads are split and joined by the linear maps


def test_crossings_are_counted():
    crossed = draw(Of(lambda s, x: x.permute(2, 1, 0) + 0), R(2, 3, 4), level="full")
    assert check_svg(crossed.svg()).crossings == 3
    assert check_svg(draw(nn.ReLU(), R(2, 3, 4)).svg()).crossings == 0


def test_what_is_used_far_away_is_named_and_picked_up():
    net = Of(lambda s, x: s.m(x) + x, m=nn.Sequential(*(nn.Linear(6, 6) for _ in range(8))))
    drawing = draw(net, R(2, 5, 6), level="full")
    assert kinds(drawing).count("save") == 1
    (added,) = [s for column in drawing.sheet.columns for s in column if s.kind == "binary"]
    assert len(added.inputs) == 1
    assert "→ C" in drawing.text()
    near = draw(Of(lambda s, x: s.m(x) + x, m=nn.Linear(6, 6)), R(2, 5, 6), level="full")
    assert "save" not in kinds(near)
    assert len(drawing.sheet.columns) == len(near.sheet.columns) + 7
    # It is alive nevertheless: what is read of memory counts it.
    assert drawing.cost().peak() == 2 * 2 * 5 * 6


def test_the_right_number_of_tensors_comes_from_memory():
    def function(s, x):
        kept = s.a(x)
        y = kept
        for _ in range(4):
            y = s.b(y.relu())
        return y * kept - kept @ s.b(y).mT @ y

    net = Of(function, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    drawing, x = draw(net, R(2, 5, 6), level="full"), R(2, 5, 6)
    assert check_svg(drawing.svg()).counts_agree
    numbers = [s.params["index"] for column in drawing.sheet.columns for s in column if "index" in s.params]
    assert len(set(numbers)) == kinds(drawing).count("save") < len(numbers)
    torch.testing.assert_close(drawing.to_module()(x), net(x))


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_and_a_decoder_stand_beside_each_other():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=24, vocab_size=30)
    net = Of(
        lambda s, a, b: s.m(input_ids=a, decoder_input_ids=b, use_cache=False).last_hidden_state,
        m=transformers.T5Model(config).eval(),
    )
    ids = torch.arange(10).view(2, 5)
    drawing = draw(net.eval(), (ids, ids[:, :4]))
    check = check_svg(drawing.svg())
    assert check.counts_agree
    assert not check.overlaps
    assert not check.through
    assert not overlapping(drawing)


@pytest.mark.filterwarnings("ignore")
def test_the_time_of_a_diffusion_network_is_picked_up_where_it_is_used():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    net = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, **blocks)
    drawing = draw(Of(lambda s, x, t: s.m(x, t).sample, m=net.eval()), (R(2, 1, 8, 8), torch.tensor([1, 2])))
    assert max(len(level) for level in drawing.sheet.levels) <= 4
    assert kinds(drawing).count("load") >= 8
    assert check_svg(drawing.svg()).counts_agree
    assert not overlapping(drawing)
