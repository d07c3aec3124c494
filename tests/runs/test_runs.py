"""Runs: arms that resume, seeds that are paired, outcomes that tell the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from torchfolio.catalog import Claim
from torchfolio.engine import fit
from torchfolio.errors import TorchfolioError
from torchfolio.runs import Outcome, Run, experiment, plan, run_all, run_experiment, threads
from torchfolio.runs.outcome import aggregate_arms, aggregate_claims
from torchfolio.runs.record import digest, record, record_peers
from torchfolio.runs.settings import override, parse
from torchfolio.runs.store import append_json_line, read_json_lines, read_result, write_json, write_result

from . import toy


def measure(tmp_path, **arguments):
    return run_experiment(toy, **({"scale": "quick", "out": tmp_path, "device": "cpu"} | arguments))


def folder_of(tmp_path):
    (found,) = (tmp_path / "toy").iterdir()
    return found


def test_outcome_over_seeds(tmp_path):
    outcome = measure(tmp_path, seeds=(0, 1, 2))
    assert outcome.status == "done"
    assert outcome.ok
    claims = {claim["id"]: claim for claim in outcome.claims}
    assert claims["better"]["holds"] is True
    assert (claims["better"]["held_on"], claims["better"]["of"]) == (3, 3)
    value = claims["better"]["values"]["ours"]
    assert value["mean"] == pytest.approx(np.mean(value["seeds"]))
    assert value["sem"] == pytest.approx(np.std(value["seeds"], ddof=1) / 3**0.5)
    assert len(set(value["seeds"])) == 3
    assert outcome.arms["ours"]["accuracy"]["seeds"] == value["seeds"]
    assert Outcome.load(folder_of(tmp_path)) == outcome
    assert outcome.command == "torchfolio run toy --scale quick --seeds 3 --device cpu"


def test_arms_of_a_seed_are_paired_and_repeatable(tmp_path):
    first = measure(tmp_path / "a", seeds=(3,))
    second = measure(tmp_path / "b", seeds=(3,))
    assert first.arms == second.arms
    assert {claim["id"]: claim["holds"] for claim in first.claims}["paired"] is True


def test_a_truth_value_must_hold_on_every_seed(tmp_path):
    outcome = measure(tmp_path, seeds=(6, 7))
    claim = next(c for c in outcome.claims if c["id"] == "exact")
    assert (claim["holds"], claim["held_on"]) == (False, 1)
    assert not outcome.ok
    assert outcome.failed_claims == ["exact"]
    assert measure(tmp_path, scale="smoke", seeds=(7,)).ok


def test_files(tmp_path):
    measure(tmp_path, seeds=(0, 1))
    folder = folder_of(tmp_path)
    for name in ("config.json", "environment.json", "outcome.json", "figures/mean_curve.svg", "figures/mean_curve.png"):
        assert (folder / name).is_file()
    for name in ("metrics.jsonl", "arms/ours.json", "arms/ours.npz", "figures/curve.png"):
        assert (folder / "seed-1" / name).is_file()
    figures = json.loads((folder / "outcome.json").read_text())["figures"]
    assert [f["name"] for f in figures] == ["mean curve", "curve (seed 0)", "curve (seed 1)"]
    assert all((folder / f["svg"]).is_file() for f in figures)
    assert not list(folder.rglob(".*"))


def test_killed_run_resumes_at_the_first_unfinished_arm(tmp_path):
    log = tmp_path / "log"
    code = (
        "from tests.runs import toy\nfrom torchfolio.runs import run_experiment\n"
        f"run_experiment(toy, 'quick', (0, 1), {{'log': {str(log)!r}}}, out={str(tmp_path)!r}, device='cpu', resume=True)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    died = subprocess.run([sys.executable, "-c", code], env=environment | {"TOY_DIES_IN": "ours"})
    assert died.returncode == -9
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert log.read_text().split("\n")[:-1] == ["0 base", "0 ours", "0 ours", "1 base", "1 ours"]
    whole = measure(tmp_path / "whole", seeds=(0, 1))
    assert Outcome.load(folder_of(tmp_path)).arms == whole.arms
    again = measure(tmp_path, seeds=(0, 1), settings={"log": str(log)}, resume=True)
    assert again.status == "done"
    assert len(list((tmp_path / "toy").iterdir())) == 2, "a finished run is not taken up again"


def test_a_failure_is_in_the_outcome_and_stops_nothing_else(tmp_path):
    jobs = [plan(toy, "quick", (0,), {"name": name}, device="cpu", out=tmp_path / name) for name in ("broken", "fine")]
    failed, done = run_all(jobs)
    assert failed.status == "failed"
    assert failed.error["type"] == "RuntimeError"
    assert "the toy is broken" in failed.error["traceback"]
    assert not failed.ok
    assert done.ok
    assert all(claim["holds"] is None for claim in failed.claims)


def test_processes_give_what_one_gives(tmp_path):
    one = measure(tmp_path / "one", seeds=(0, 1))
    two = measure(tmp_path / "two", seeds=(0, 1), jobs=2)
    assert one.arms == two.arms
    assert one.claims == two.claims


def test_a_killed_worker_loses_nothing(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_DIES_IN", "a worker")
    outcome = measure(tmp_path / "killed", seeds=(0,), settings={"log": str(log)}, jobs=2)
    assert outcome.arms == measure(tmp_path / "one", seeds=(0,)).arms
    assert log.read_text().split("\n")[:-1] == ["0 base", "0 ours", "0 ours"], "what it had stored is kept"


def test_an_interrupt_ends_the_workers(tmp_path):
    log = tmp_path / "log"
    code = (
        "import signal\nfrom tests.runs import toy\nfrom torchfolio.runs import run_experiment\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs in the background of a shell ignore it
        f"    run_experiment(toy, 'quick', range(9), {{'log': {str(log)!r}, 'name': 'endless'}},"
        f" out={str(tmp_path)!r}, device='cpu', jobs=2)"
    )
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    words = [sys.executable, str(tmp_path / "script.py")]
    running = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    while not log.is_file() or log.read_text().count("ours") < 2:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)  # comes to an end only when no process holds the pipe any more
    assert "KeyboardInterrupt" in said
    assert said.count("Traceback") == 1, said
    assert sorted(path.name for path in folder_of(tmp_path).glob("seed-*/arms/*.json")) == ["base.json"] * 2


@pytest.mark.slow
def test_ray_gives_what_one_process_gives(tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        (outcome,) = run_all([plan(toy, "quick", (0, 1), device="cpu", out=tmp_path / "ray")], ray=True)
    finally:
        ray.shutdown()
    assert outcome.arms == measure(tmp_path / "one", seeds=(0, 1)).arms


def a_run(tmp_path, **arguments):
    return Run("toy", "quick", 0, toy.Settings(), torch.device("cpu"), tmp_path, **arguments)


def test_claims_are_checked(tmp_path):
    run = a_run(tmp_path, claims={"known": Claim("known", "", "", "measured > y")})
    with pytest.raises(ValueError, match="no claim 'other'"):
        run.values("other", 1.0)
    with pytest.raises(ValueError, match="speaks of 'y'"):
        run.values("known", 2.0)
    run.values("known", 2.0, y=1.0)
    assert run.measured == {"known": {"measured": 2.0, "y": 1.0}}
    with pytest.raises(ValueError, match="before"):
        run.values("known", 2.0, y=1.0)


def test_conditions_are_decided_on_means_or_on_every_seed():
    seeds = [{"c": {"x": 0.0}}, {"c": {"x": 4.0}}]
    (mean,) = aggregate_claims([Claim("c", "", "", "x > 1")], seeds)
    (each,) = aggregate_claims([Claim("c", "", "", "x > 1", every_seed=True)], seeds)
    assert (mean["holds"], mean["held_on"], mean["of"]) == (True, 1, 2)
    assert each["holds"] is False
    (toy_data,) = aggregate_claims([Claim("c", "", "", "x > 1")], seeds, judge=False)
    assert toy_data["holds"] is None
    assert toy_data["values"]["x"]["mean"] == 2.0


def test_arms_that_a_seed_lacks_are_summarised_over_the_others():
    tables = aggregate_arms([{"a": {"x": 1.0}}, {"a": {"x": 3.0}, "b": {"x": 5.0}}])
    assert tables["a"]["x"]["mean"] == 2.0
    assert tables["b"]["x"]["seeds"] == [5.0]


def test_not_a_number_does_not_hold():
    (claim,) = aggregate_claims([Claim("c", "", "", "x < 1")], [{"c": {"x": float("nan")}}])
    assert claim["holds"] is False
    assert "not a finite number" in claim["note"]


def test_a_record_is_short_and_notes_what_it_was_taken_with(tmp_path):
    outcome = measure(tmp_path / "runs", seeds=(0, 1))
    claims = [Claim(id, id, "", holds) for id, holds in toy.CLAIMS.items()]
    path = record(outcome, claims, tmp_path)
    record_peers("toy", {"work": {"peer": 2.0}}, tmp_path)
    again = json.loads(record(outcome, claims, tmp_path).read_text())
    assert again["peers"] == {"work": {"peer": 2.0}}
    assert len(path.read_text().splitlines()) <= 20
    assert again["digest"] == digest("toy", "quick", toy.SCALES["quick"], claims)
    assert again["digest"] != digest("toy", "quick", toy.Settings(steps=6), claims)
    assert again["digest"] != digest("toy", "quick", toy.SCALES["quick"], claims[:2])
    assert [len(claim["values"]) for claim in again["claims"]] == [2, 1, 1]


def test_every_generator_of_a_run_begins_at_its_seed(tmp_path):
    run = Run("toy", "smoke", 3, None, torch.device("cpu"), tmp_path)
    first, second = (torch.rand(2, generator=run.generator()) for _ in range(2))
    assert first.tolist() == second.tolist() == torch.rand(2, generator=torch.Generator().manual_seed(3)).tolist()


def test_a_run_trains_with_its_seed_on_its_device(tmp_path):
    run = Run("toy", "smoke", 3, None, torch.device("cpu"), tmp_path)
    data = torch.randn(12, 4), torch.arange(12) % 3
    nets = [torch.nn.Linear(4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, train in zip(nets, (run.fit, partial(fit, seed=3, device="cpu")), strict=True):
        train(net, data, epochs=2, batch_size=5, progress=False)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)
    assert run.fit(nets[0], data, epochs=1, batch_size=4, seed=5).steps == 3  # what is given comes first


def test_arm_names_are_checked(tmp_path):
    run = a_run(tmp_path)
    run.arm("a", dict)
    for name in ("a", "", "../b", ".c"):
        with pytest.raises(ValueError, match="name of an arm"):
            run.arm(name, dict)


def test_results_round_trip(tmp_path):
    given = {
        "n": 1, "x": 0.1, "t": "ä", "none": None, "yes": True, "list": [1, [2.5, "a"]], "table": {"k": np.float32(1.5)},
        "array": np.arange(6).reshape(2, 3), "tensor": torch.ones(2, dtype=torch.float64), "inf": float("inf"),
    }  # fmt: skip
    write_result(tmp_path / "r.json", given)
    back = read_result(tmp_path / "r.json")
    assert {k: back[k] for k in ("n", "x", "t", "none", "yes", "list", "inf")} == {
        k: given[k] for k in ("n", "x", "t", "none", "yes", "list", "inf")
    }
    assert back["table"] == {"k": 1.5}
    assert isinstance(back["array"], np.ndarray)
    assert (back["array"] == given["array"]).all()
    assert torch.equal(back["tensor"], given["tensor"])
    with pytest.raises(TypeError, match=r"set at 'a\.b'"):
        write_result(tmp_path / "bad.json", {"a": {"b": {1}}})
    assert not (tmp_path / "bad.json").exists()


def test_every_flipped_bit_of_an_arm_is_noticed(tmp_path):
    given = {"loss": 0.125, "curve": np.arange(3.0), "note": "x"}
    path = tmp_path / "arm.json"
    path.with_suffix(".jsonl").write_text('{"loss": 1}\n')
    write_result(path, given)
    for file in (path, path.with_suffix(".npz"), path.with_suffix(".jsonl")):
        content = file.read_bytes()
        for k in range(0, 8 * len(content), 7):
            spoiled = bytearray(content)
            spoiled[k // 8] ^= 1 << k % 8
            file.write_bytes(spoiled)
            noticed = False
            try:
                back = read_result(path)
            except ValueError as error:
                noticed = "is damaged" in str(error)
            # What is not noticed is white space or the case of a letter that JSON does not mind.
            assert noticed or (back["loss"], back["curve"].tolist()) == (0.125, [0, 1, 2])
        file.write_bytes(content)
    assert read_result(path)["loss"] == given["loss"]


def test_a_damaged_arm_is_computed_again(tmp_path):
    log = tmp_path / "log"
    whole = measure(tmp_path, settings={"log": str(log)})
    folder = folder_of(tmp_path)
    (folder / "outcome.json").unlink()
    arm = next(folder.rglob("arms/ours.json"))
    arm.write_text(arm.read_text().replace("ours", "hers", 1))
    with pytest.warns(UserWarning, match=r"ours\.json is damaged.*computed again"):
        again = measure(tmp_path, settings={"log": str(log)}, resume=True)
    assert again.arms == whole.arms
    assert log.read_text().split() == ["0", "base", "0", "ours", "0", "ours"]


def test_torn_lines_are_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": None}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_settings_from_text():
    changed = override(toy.Settings(), parse(["gain=2", "widths=3,4", "name=none", "loud=yes", "steps=9"]))
    assert changed == toy.Settings(2.0, 9, (3, 4), None, True)
    for pair, message in (("gian=1", "gain"), ("steps=x", "int"), ("loud=perhaps", "true or false")):
        with pytest.raises(ValueError, match=message):
            override(toy.Settings(), parse([pair]))
    with pytest.raises(ValueError, match="key=value"):
        parse(["steps"])


def test_bad_requests(tmp_path):
    with pytest.raises(TorchfolioError, match="no paper"):
        experiment("nosuch")
    with pytest.raises(TorchfolioError, match="scales"):
        measure(tmp_path, scale="huge")
    with pytest.raises(ValueError, match="seeds"):
        measure(tmp_path, seeds=(1, 1))
    with pytest.raises(ValueError, match="no setting"):
        measure(tmp_path, settings={"nosuch": 1})


def test_threads_are_restored():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_run_is_resumed_by_one_process_alone(tmp_path):
    code = (
        "import time\nfrom pathlib import Path\nfrom tests.runs import toy\nfrom torchfolio.runs import plan, run_all\n"
        f"job = plan(toy, 'quick', (0,), device='cpu', out={str(tmp_path)!r})\n"
        "def say(text):\n    print(text, flush=True)\n    time.sleep(60)\n"
        "run_all([job], say=say)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    first = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "toy seed 0: base\n"
        left = folder_of(tmp_path) / "seed-0" / "arms" / ".unfinished-x"
        left.parent.mkdir(parents=True)
        left.touch()
        with pytest.raises(ValueError, match=f"in use by process {first.pid}"):
            measure(tmp_path, resume=True)
        assert left.exists()
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert measure(tmp_path, resume=True).status == "done"
    assert not list(folder_of(tmp_path).rglob(".*")), "nothing is left of the killed run"


def test_rows_and_figures_are_the_same_however_a_run_came_about(tmp_path):
    measure(tmp_path / "one", seeds=(0, 1))
    measure(tmp_path / "two", seeds=(0, 1), jobs=2)
    again = measure(tmp_path / "again", seeds=(0, 1))
    folders = [folder_of(tmp_path / name) for name in ("one", "two", "again")]
    (folders[2] / "outcome.json").unlink()
    assert measure(tmp_path / "again", seeds=(0, 1), resume=True).arms == again.arms
    names = ("seed-0/metrics.jsonl", "seed-1/metrics.jsonl", "seed-1/figures/curve.svg", "figures/mean_curve.svg")
    for name in names:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    assert read_json_lines(folders[1] / "seed-0" / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_rows_of_a_stored_arm_come_back_in_their_place(tmp_path):
    for _ in range(2):
        run = a_run(tmp_path)
        run.record(at="start")
        run.arm("a", lambda run=run: run.record(step=1, loss=float("nan")) or {"x": 1})
        run.record(at="end")
        rows = read_json_lines(tmp_path / "metrics.jsonl")
        assert rows == [{"at": "start"}, {"step": 1, "loss": None}, {"at": "end"}]
