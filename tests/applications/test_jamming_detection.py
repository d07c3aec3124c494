"""Jamming detection: the standard's sequences, simulated jammers, features, the Gamma law, the two thresholds."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.utils.estimator_checks import check_estimator

from torchfolio.applications import (
    DTDDNN,
    Barrage,
    Channel,
    EPNREDetector,
    PartialBand,
    Pulsed,
    Spoofing,
    SSBFeatures,
    Tones,
    detection_report,
    epnre,
    nr,
    read_iq,
    simulate,
)
from torchfolio.applications.jamming_detection import select_thresholds
from torchfolio.applications.jamming_features import pss_correlation, wavelet

LENGTH = 4 * 274


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def register(start, taps, length):
    x = list(start)
    for i in range(length):
        x.append(sum(x[i + t] for t in taps) % 2)
    return x


def test_synchronisation_signals_are_those_of_the_standard():
    x = register([0, 1, 1, 0, 1, 1, 1], (4, 0), 260)
    for n2 in range(3):
        assert nr.pss(n2).tolist() == [1 - 2 * x[(n + 43 * n2) % 127] for n in range(127)]
    assert nr.pss(0)[:16].tolist() == [1, -1, -1, 1, -1, -1, -1, -1, 1, 1, -1, -1, -1, 1, 1, -1]
    roots = nr.pss(torch.arange(3))
    assert torch.equal(roots @ roots.T, 128 * torch.eye(3) - 1)
    x0, x1 = (register([1, 0, 0, 0, 0, 0, 0], taps, 127) for taps in ((4, 0), (1, 0)))
    for cell in range(0, 1008, 9):
        n1, n2 = divmod(cell, 3)
        m0, m1 = 15 * (n1 // 112) + 5 * n2, n1 % 112
        expected = [(1 - 2 * x0[(n + m0) % 127]) * (1 - 2 * x1[(n + m1) % 127]) for n in range(127)]
        assert nr.sss(cell).tolist() == expected
    assert len({tuple(row) for row in nr.sss(torch.arange(1008)).tolist()}) == 1008


def test_gold_sequences_and_reference_signals():
    for c_init in (1, 12345, 2**31 - 1):
        first = register([1, *[0] * 30], (3, 0), 1700)
        second = register([c_init >> k & 1 for k in range(31)], (3, 2, 1, 0), 1700)
        assert nr.gold(c_init, 100).tolist() == [(first[n + 1600] + second[n + 1600]) % 2 for n in range(100)]
    cell, issb = 77, 2
    bits = nr.gold(2**11 * (issb + 1) * (cell // 4 + 1) + 2**6 * (issb + 1) + cell % 4, 288).reshape(144, 2)
    expected = torch.complex(*((1 - 2 * bits.float()) / 2**0.5).unbind(1))
    assert torch.equal(nr.dmrs(cell, issb), expected)
    grid = nr.ssb_grid(cell, issb)
    assert torch.equal(grid[nr.dmrs_mask(cell)], expected)
    for v in range(4):
        mask = nr.dmrs_mask(v)
        assert mask.sum(1).tolist() == [0, 60, 24, 60]
        assert mask[1].nonzero()[0] == v


def test_blocks_have_their_shape_and_come_back_from_their_signal():
    assert nr.null_mask().sum(1).tolist() == [113, 0, 17, 0]
    assert nr.pbch_mask().sum() == 576
    cells = torch.arange(0, 1008, 5)
    grid = nr.ssb_grid(cells, 3, generator=seeded())
    assert (grid[:, nr.null_mask()] == 0).all()
    assert torch.allclose(grid[:, ~nr.null_mask()].abs(), torch.ones(()), atol=1e-6)
    signal = nr.ofdm_modulate(grid)
    assert signal.shape == (len(cells), LENGTH)
    assert (nr.ofdm_demodulate(signal) - grid).abs().max() <= 1e-5
    symbols = signal.unflatten(1, (4, 274))
    assert torch.equal(symbols[..., :18], symbols[..., 256:])
    payload = torch.randint(2, (864,), generator=seeded())
    one = nr.ssb_grid(5, 1, payload)
    assert torch.equal(one, nr.ssb_grid(torch.tensor([5]), torch.tensor([1]), payload[None])[0])
    data = one[nr.pbch_mask() & ~nr.dmrs_mask(5)]
    bits = payload ^ nr.gold(5, 8 * 864)[864 : 2 * 864]
    assert torch.equal(data, torch.complex(*((1 - 2 * bits.float()) * 0.5**0.5).view(-1, 2).unbind(1)))
    for call, message in ((lambda: nr.pss(3), "n2 from 0 to 2"), (lambda: nr.ssb_grid(1008), "cell_id from 0 to 1007"),
                          (lambda: nr.ofdm_demodulate(signal[:, 1:]), "whole number of symbols"),
                          (lambda: nr.ssb_grid(1, payload=torch.zeros(3)), "864 bits")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "jammer", [Barrage(), PartialBand(), PartialBand(timed=True), Tones(2), Pulsed(0.3), Spoofing()]
)
def test_jammers_have_their_power_where_they_should(jammer):
    elements = nr.ofdm_demodulate(jammer.signal(1500, seeded())).abs().square()
    spread = 1.0 if not isinstance(jammer, Pulsed) else 0.95  # pulses also fall into prefixes and beside the band
    assert elements.mean().item() == pytest.approx(spread, abs=0.06)
    silent = isinstance(jammer, PartialBand | Spoofing)
    assert (elements[:, nr.null_mask()].mean() < 1e-10) == silent


def test_the_energy_of_empty_elements_follows_the_gamma_law():
    noise = 10**-2.0
    data = simulate(3000, 20.0, 25.0, generator=seeded(1))
    scaled = 130 * epnre(data.iq).double() / (noise + 10 ** (-data.sjr.double() / 10))
    assert kstest(scaled.numpy(), "gamma", (130,)).pvalue > 0.01
    detector = EPNREDetector(0.01)
    powers = detector.power(noise, 10 ** (-np.array([15, 20, 25, 30]) / 10))
    assert np.allclose(powers, [1, 1, 0.807, 0.118], atol=5e-4)
    assert detector.power(noise, 0) == pytest.approx(0.01)
    for sjr, power in ((25.0, 0.807), (30.0, 0.118)):
        jammed = simulate(3000, 20.0, sjr, jammed=1.0, generator=seeded(2))
        assert detector.predict(epnre(jammed.iq), noise).mean() == pytest.approx(power, abs=0.03)


def test_wavelets_are_those_of_pywavelets():
    pywt = pytest.importorskip("pywt")
    for n in (64, 33, 50):
        x = torch.randn(3, 2, n, dtype=torch.float64, generator=seeded(n))
        for ours, theirs in zip(wavelet(x, 2), pywt.wavedec(x.numpy(), "db4", "symmetric", 2), strict=True):
            assert np.allclose(ours.numpy(), theirs, atol=1e-9)
    assert [part.shape[-1] for part in wavelet(torch.zeros(64))] == [21, 21, 35]


def test_features_find_time_root_and_carrier():
    data = simulate(40, 25.0, jammed=0.0, channel=Channel(timing=200, cfo=0.2), generator=seeded(3))
    features = SSBFeatures()
    names = features.get_feature_names_out().tolist()
    searched, told = features.transform(data.iq), features.transform(data.iq, data.cell_id, data.timing)
    assert searched.shape == (40, len(names)) == (40, 51)
    same = [name != "pss_second_root" for name in names]  # which is looked for at other times too
    assert np.allclose(searched[:, same], told[:, same])
    assert (searched[:, names.index("pss_root")] == (data.cell_id % 3).numpy()).all()
    correlation = pss_correlation(data.iq)
    assert correlation.max() <= 1 + 1e-5
    assert torch.equal(correlation.amax(1).argmax(1), data.timing + 18)
    energy = searched[:, names.index("epnre_all")]
    assert np.allclose(energy, np.log(10**-2.5), atol=0.4)  # the offset is undone: nothing leaks
    assert SSBFeatures(correct_cfo=False).transform(data.iq)[:, names.index("epnre_all")].mean() > energy.mean() + 0.5
    one = np.concatenate([features.transform(data.iq[k : k + 1]) for k in range(3)])
    assert np.allclose(one, searched[:3], atol=1e-6)
    burst = simulate(6, 20.0, burst=4, channel=Channel(taps=3, phase_noise=0.01), generator=seeded())
    assert burst.iq.shape == (6, 4, LENGTH)
    assert features.transform(burst.iq)[:, names.index("epnre_all")].std() < 1
    for X, message in (
        (data.iq.real, "complex samples"),
        (data.iq[:, :1000], "1096 samples"),
        (data.iq * torch.nan, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            features.transform(X)
    with pytest.raises(ValueError, match="resample"):
        SSBFeatures(sample_rate=1e6).transform(data.iq)
    with pytest.raises(ValueError, match="begin at samples 0 to 200"):
        features.transform(data.iq, timing=data.timing + 201)


def test_files_are_read(tmp_path):
    iq = simulate(1, generator=seeded()).iq[0].numpy()
    np.save(tmp_path / "a.npy", iq)
    np.stack([iq.real, iq.imag], 1).astype("<f4").tofile(tmp_path / "a.iq")
    (tmp_path / "a.sigmf-data").write_bytes((tmp_path / "a.iq").read_bytes())
    about = {"global": {"core:datatype": "cf32_le", "core:sample_rate": 7.68e6}}
    (tmp_path / "a.sigmf-meta").write_text(json.dumps(about))
    for name in ("a.npy", "a.iq", "a.sigmf-meta", "a.sigmf-data"):
        assert torch.equal(read_iq(tmp_path / name, 7.68e6), torch.from_numpy(iq))
    with pytest.raises(ValueError, match=r"recording at 7\.68e"):
        read_iq(tmp_path / "a.sigmf-meta", 1e6)
    np.save(tmp_path / "real.npy", iq.real)
    with pytest.raises(ValueError, match="expected complex samples"):
        read_iq(tmp_path / "real.npy")


def test_thresholds_are_the_tightest_with_few_errors():
    p = np.linspace(0, 1, 101)
    y = (p > 0.5).astype(int)
    y[[30, 70]] = 1 - y[[30, 70]]
    low, high = select_thresholds(p, y, 0.02)
    assert y[p <= low].mean() <= 0.02
    assert 1 - y[p >= high].mean() <= 0.0201
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.71) or high < 0.71
    assert select_thresholds(np.full(100, 0.5), np.arange(100) % 2) == (0.1, 0.9)


def examples(n=600, seed=0):
    data = simulate(n, (21.5, 22.5), generator=seeded(seed))
    return SSBFeatures().transform(data.iq), data.label.numpy(), data.sjr.numpy()


def test_the_detector_decides_in_two_stages():
    X, y, sjr = examples(400)
    x, truth, ratio = examples(200, 1)
    settings = {"epochs": 10, "folds": 2, "stage_epochs": 20, "random_state": 0}
    model = DTDDNN(thresholds=(0.1, 0.9), **settings).fit(X, y, sjr)
    p, stage = model.predict_proba(x), model.decision_path(x)
    assert model.score(x, truth) > 0.8
    assert np.allclose(p.sum(1), 1)
    assert ((p[:, 1] >= 0.5) == model.predict(x)).all()
    net = model.to_module()
    with torch.no_grad():
        p1, _ = net.probabilities(torch.from_numpy(x).float())
        assert np.array_equal(net(torch.from_numpy(x).float()).numpy(), p[:, 1])
    p1 = p1.numpy()
    assert ((stage == 2) == ((p1 > 0.1) & (p1 < 0.9))).all()
    assert np.allclose(p[stage == 1, 1], p1[stage == 1])
    assert ((p[stage == 2, 1] >= 0.1) & (p[stage == 2, 1] <= 0.9)).all()
    equal = DTDDNN(thresholds=(0.5, 0.5), **settings).fit(X, y, sjr)
    assert np.array_equal(equal.predict_proba(x)[:, 1], p1)  # equal thresholds leave the first network
    assert (equal.decision_path(x) == 1).all()
    twin = pickle.loads(pickle.dumps(model))
    assert np.array_equal(twin.predict_proba(x), p)
    assert np.array_equal(copy.deepcopy(net)(torch.from_numpy(x).float()).numpy(), p[:, 1])
    state = torch.get_rng_state()
    assert np.array_equal(DTDDNN(thresholds=(0.1, 0.9), **settings).fit(X, y, sjr).predict_proba(x), p)
    assert torch.equal(state, torch.get_rng_state())
    report = detection_report(model, x, truth, ratio, 22.0)
    assert report.loc["clean", "n"] == 100
    assert report.n.sum() == 200
    assert (report.energy_bound.dropna() <= 1).all()
    named = DTDDNN(thresholds=(0.5, 0.5), **(settings | {"epochs": 1})).fit(X, np.where(y == 1, "jammed", "clean"))
    assert set(named.predict(x)) == {"clean", "jammed"}


def test_what_cannot_be_learned_is_said():
    X, y, sjr = examples(200)
    with pytest.warns(UserWarning, match="single threshold"):
        model = DTDDNN(thresholds=(0.49999, 0.50001), epochs=2, folds=2, random_state=0).fit(X, y)
    assert (model.decision_path(X) == 1).all()
    with pytest.raises(ValueError, match="2 classes, got 1"):
        DTDDNN().fit(X, np.zeros(200))
    with pytest.raises(ValueError, match="low <= high"):
        DTDDNN(thresholds=(0.9, 0.1)).fit(X, y)
    with pytest.raises(ValueError, match="a ratio for each"):
        DTDDNN().fit(X, y, sjr[:5])
    with pytest.raises(ValueError, match="upper end of sjr_db"):
        simulate(5, sjr_db=(30.0, 15.0))


@pytest.mark.filterwarnings("ignore:.*single threshold")
def test_it_is_a_scikit_learn_classifier():
    check_estimator(
        DTDDNN(
            hidden=(16,),
            stages=(8,),
            epochs=8,
            stage_epochs=5,
            folds=2,
            learning_rate=0.05,
            batch_size=64,
            random_state=0,
        )
    )
