"""PowerNorm against the exact gradient of its batch form, its recursions, padding, recomputation, the fused path."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchfolio.layers import NormMonitor, PowerNorm, PowerNormV, SequenceBatchNorm, convert_layernorm, fold
from torchfolio.layers.powernorm import padding
from torchfolio.layers.token_norms import masks

NORMS = [lambda **k: PowerNorm(6, warmup_steps=2, **k), lambda **k: PowerNormV(6, **k),
         lambda **k: SequenceBatchNorm(6, **k)]  # fmt: skip
ALL = pytest.mark.parametrize("make", NORMS, ids=["pn", "pn-v", "bn"])


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_in_warm_up_the_gradient_is_exact_where_nu_is_the_mean(masked):
    x, weight = tokens(3, 5, 6) + 0.5, tokens(3, 5, 6, seed=1)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = masked
    exact, ours = PowerNormV(6, dtype=torch.float64), PowerNorm(6, warmup_steps=9, num_groups=None, dtype=torch.float64)
    with torch.no_grad():
        for norm in (exact, ours):
            norm.weight.copy_(tokens(6, seed=2))
            norm.bias.copy_(tokens(6, seed=3))

    def gradients(norm):
        inputs = x.clone().requires_grad_()
        out = norm(inputs, mask)
        loss = (out * weight)[~mask].square().sum()
        return out.detach(), torch.autograd.grad(loss, (inputs, norm.weight, norm.bias))

    out, expected = gradients(exact)
    with torch.no_grad():
        z = (out - exact.bias) / exact.weight
        g = 2 * out * weight.square() * exact.weight
    ours.nu.copy_((g * z)[~mask].mean(0))
    again, found = gradients(ours)
    assert torch.allclose(again, out, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))
    ours.nu.zero_()
    _, without = gradients(ours)
    assert not torch.allclose(without[0], expected[0], atol=1e-3), "without the term it is another gradient"
    assert torch.allclose(without[1], expected[1], atol=1e-10), "affine parameters do not depend on it"


def see(norm, z, g):
    norm._see_moments(z.square().mean(0), (g * z).mean(0), g, torch.ones(2))


def test_nu_converges_geometrically_stays_bounded_and_diverges_where_it_must():
    norm = PowerNorm(2, warmup_steps=0, num_groups=None, dtype=torch.float64)
    z, g = tokens(50, 2), tokens(50, 2, seed=1)
    gamma, lambda_ = z.square().mean(0), (g * z).mean(0)
    errors = []
    for _ in range(12):
        see(norm, z, g)
        errors.append((norm.nu - lambda_ / gamma).clone())
    for a, b in zip(errors, errors[1:], strict=False):
        assert torch.allclose(b, (1 - 0.1 * gamma) * a)
    largest, norm.nu[:] = 0.0, 0.0
    for k in range(200):
        z, g = tokens(50, 2, seed=k) + 2, tokens(50, 2, seed=k + 999)
        assert z.square().mean(0).min() >= 1
        largest = max(largest, float((g * z).mean(0).abs().max()))
        see(norm, z, g)
        assert float(norm.nu.abs().max()) <= largest / 1.0 + 1e-9, "moments of z are at least 1 here"
    norm.nu[:] = 1.0
    for _ in range(20):
        see(norm, 5 * tokens(50, 2), tokens(50, 2, seed=1))
    assert norm.nu.abs().min() > 1e3


def test_phi_is_the_mean_in_warm_up_and_evaluation_is_affine_and_folds():
    norm = PowerNorm(6, warmup_steps=9, alpha_fwd=1.0, num_groups=None)
    powers = []
    for k in range(7):
        x = tokens(20, 6, seed=k, dtype=torch.float32)
        powers.append(x.square().mean(0))
        norm(x)
    assert torch.allclose(norm.phi, torch.stack(powers).mean(0), atol=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    norm.eval()
    x, linear = tokens(4, 3, 6, dtype=torch.float32), nn.Linear(6, 2)
    assert torch.allclose(norm(x), x * norm.weight / (norm.phi + norm.eps).sqrt() + norm.bias, atol=1e-6)
    assert torch.allclose(fold(norm, linear)(x), linear(norm(x)), atol=1e-5)
    with pytest.raises(ValueError, match="num_groups"):
        fold(PowerNorm(6, warmup_steps=1), linear)


def test_after_warm_up_the_running_value_divides():
    x = tokens(30, 6, dtype=torch.float64)
    for divide_by in ("running", "batch"):
        norm = PowerNorm(6, warmup_steps=0, num_groups=None, divide_by=divide_by, dtype=torch.float64)
        norm.phi.fill_(4.0)
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        assert torch.allclose(out, x / (4.0 + norm.eps) ** 0.5)
        out.sum().backward()
        root = (4.0 + norm.eps) ** 0.5 if divide_by == "running" else (x.square().mean(0) + norm.eps).sqrt()
        assert torch.allclose(inputs.grad, torch.ones_like(x) / root), "nu was 0"


@ALL
def test_padding_counts_nowhere(make):
    x = tokens(2, 4, 6, dtype=torch.float32)
    mask = torch.tensor([[False, False, True, True], [False, False, False, True]])
    plain, masked, inside = make(), make(), make()
    expected = plain(x[~mask])
    assert torch.allclose(masked(x, mask)[~mask], expected, atol=1e-6)
    with padding(mask):
        assert torch.allclose(inside(x)[~mask], expected, atol=1e-6)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(masked.get_buffer(name).double(), buffer.double())


@ALL
def test_a_norm_is_a_good_module(make):
    norm, x = make(), tokens(3, 4, 6, dtype=torch.float32)
    norm(x.requires_grad_()).sum().backward()
    norm.eval()
    other = make().eval()
    other.load_state_dict(norm.state_dict())
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), other):
        assert torch.equal(twin(x), norm(x))
    assert norm(x[:1, :1]).shape == (1, 1, 6)
    low = copy.deepcopy(norm).bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert all(b.dtype != torch.bfloat16 for b in low.buffers())
    assert "affine=True" in repr(norm)
    for bad, match in ((x[..., :5], "6 channels"), (x[:0], "one token")):
        with pytest.raises(ValueError, match=match):
            norm(bad)
    with pytest.raises(ValueError, match="no padding"):
        norm.train()(x, torch.ones(3, 4, dtype=torch.bool))


def test_recomputation_counts_once_and_gives_the_same_gradient():
    norms = [PowerNorm(6, warmup_steps=1) for _ in range(2)]
    for k in range(4):
        x = tokens(8, 6, seed=k, dtype=torch.float32).requires_grad_()
        plain = torch.autograd.grad(norms[0](x).square().sum(), x)[0]
        again = torch.autograd.grad(checkpoint(norms[1], x, use_reentrant=False).square().sum(), x)[0]
        assert torch.allclose(plain, again)
    for name, buffer in norms[0].named_buffers():
        assert torch.equal(buffer, norms[1].get_buffer(name))


def test_conversion_of_a_transformer_runs_the_new_norm_and_knows_its_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    convert_layernorm(encoder, warmup_steps=5, num_groups=2)
    norms = [m for m in encoder.modules() if isinstance(m, PowerNorm)]
    assert len(norms) == 4
    assert norms[0].name == "layers.0.norm1"
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, True, True, True]])
    encoder(x, src_key_padding_mask=mask)
    assert all(int(norm.steps) == 1 for norm in norms)
    scaled = nn.functional.rms_norm(x.view(2, 5, 2, 4), (4,), eps=1e-5).view(2, 5, 8)[~mask]
    assert torch.allclose(norms[0].phi, scaled.square().mean(0), atol=1e-6)
    encoder.eval()
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=mask)
        expected = x
        for block in encoder.layers:
            inner = block.norm1(expected)
            expected = expected + block.self_attn(inner, inner, inner, key_padding_mask=mask, need_weights=False)[0]
            expected = expected + block.linear2(block.activation(block.linear1(block.norm2(expected))))
    assert torch.allclose(fast[~mask], expected[~mask], atol=1e-5)
    with pytest.raises(ValueError, match="no module matches"):
        convert_layernorm(nn.Sequential(nn.Linear(2, 2)), warmup_steps=1)


def test_norms_of_any_network_are_told_of_padding_by_its_own_mask():
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, True, True, True]])
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    for net, call in (
        (encoder, lambda x: encoder(x.transpose(0, 1), src_key_padding_mask=mask)),
        (decoder, lambda x: decoder(x, torch.ones(2, 3, 8), tgt_key_padding_mask=mask)),
    ):
        convert_layernorm(net, warmup_steps=5)
        norms = [m for m in net.modules() if isinstance(m, PowerNorm)]
        state = {k: v.clone() for k, v in net.state_dict().items()}
        call(x)
        seen = [norm.phi.clone() for norm in norms]
        net.load_state_dict(state)
        call(torch.where(mask[..., None], 100 * x + 7, x))
        assert all(torch.allclose(a, norm.phi, atol=1e-6) for a, norm in zip(seen, norms, strict=True))


def test_a_bert_trains_with_padding_that_counts_nowhere():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = convert_layernorm(transformers.BertForSequenceClassification(config).train(), warmup_steps=5, num_groups=2)
    norms = [m for m in bert.modules() if isinstance(m, PowerNorm)]
    assert len(norms) == 3
    state = {k: v.clone() for k, v in bert.state_dict().items()}
    seen = []
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    for filled in (0, 29):
        bert.load_state_dict(state)
        bert(torch.where(mask == 0, filled, ids), attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        seen.append([norm.phi.clone() for norm in norms])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*seen, strict=True))
    assert not masks


def test_the_quadratic_mean_bounds_gradients_at_least_as_tightly():
    x, g = tokens(100, 6) + torch.linspace(-2, 2, 6), tokens(100, 6, seed=1)
    norms = []
    for moment in (x.square().mean(0), x.var(0, correction=0)):
        z = x / moment.sqrt()
        norms.append(((g - z * (g * z).mean(0)) / moment.sqrt()).norm(dim=0))
    inputs = x.clone().requires_grad_()
    (PowerNormV(6, eps=1e-30, dtype=torch.float64)(inputs) * g).sum().backward()
    assert torch.allclose(inputs.grad.norm(dim=0), norms[0])
    assert (norms[0] <= norms[1]).all()


def test_monitor_double_backward_and_bad_input():
    norm = nn.Sequential(PowerNorm(6, warmup_steps=1))
    with NormMonitor(norm) as monitor:
        for k in range(3):
            norm(tokens(5, 6, seed=k, dtype=torch.float32).requires_grad_()).sum().backward()
    frame = monitor.to_frame()
    assert frame.step.tolist() == [1, 2, 3]
    assert set(frame.columns) == {"layer", "step", "deviation", "gamma", "nu", "gradient"}
    assert frame.notna().all(axis=None)
    x = tokens(5, 6, dtype=torch.float32).requires_grad_()
    grad = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad((grad + x).sum(), x)
    with pytest.raises(FloatingPointError, match="not finite in a PowerNorm"):
        PowerNorm(6, warmup_steps=1, num_groups=None)(torch.full((2, 6), torch.inf))
    for bad in (lambda: PowerNorm(6, warmup_steps=1, num_groups=4), lambda: PowerNorm(0, warmup_steps=1),
                lambda: PowerNorm(6, warmup_steps=1, alpha_fwd=float("nan")), lambda: PowerNorm(6, warmup_steps=-1),
                lambda: PowerNorm(6, warmup_steps=1, divide_by="x"), lambda: NormMonitor(nn.Linear(2, 2))):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()
