"""Seeds spread over a Ray cluster of two nodes, one of which dies in the middle."""

from __future__ import annotations

import threading
import time

import pytest

from tests.runs import slow_toy
from torchfolio.runs import plan, run_all


@pytest.mark.long
def test_a_node_that_dies_costs_no_result(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    worker = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    try:
        assert len([n for n in ray.nodes() if n["Alive"]]) == 2
        monkeypatch.chdir(tmp_path)  # workers began elsewhere: a relative folder means ours
        job = plan(slow_toy, "quick", (0, 1, 2, 3), device="cpu", out="runs")
        (alone,) = run_all([plan(slow_toy, "quick", (0, 1, 2, 3), device="cpu", out="alone")])
        said: list[str] = []
        outcomes: list = []
        thread = threading.Thread(target=lambda: outcomes.extend(run_all([job], ray=True, say=said.append)))
        thread.start()
        deadline = time.time() + 120
        while not list(job.folder.glob("seed-*/arms/first.json")) and time.time() < deadline:
            time.sleep(0.05)
        cluster.remove_node(worker, allow_graceful=False)
        thread.join(300)
        assert outcomes, said
        assert outcomes[0].status == "done"
        assert outcomes[0].claims == alone.claims
    finally:
        ray.shutdown()
        cluster.shutdown()
