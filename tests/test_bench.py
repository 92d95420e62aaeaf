"""`snapctl bench`: that every figure is there and sound. How large they are is for people to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two spinning processes need two processors"
)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "snap.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_every_contender_that_can_run_here_has_its_figures() -> None:
    done = bench("--quick", "--rounds", "1", "-o", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["apiVersion"], document["kind"]) == ("snap/v1", "Benchmark")
    trips = {figure["contender"] for figure in document["figures"] if figure["scenario"] == "round trip"}
    wanted = {
        "Snap, spinning",
        "Snap, adaptive",
        "Snap, blocking",
        "Snap, Rust engine",
        "Unix socket",
        "Pipe",
        "ZeroMQ",
    }
    assert wanted <= trips
    for figure in document["figures"]:
        medians = figure["medians"]
        if figure["scenario"] == "round trip":
            assert 0 < medians["p50"] <= medians["p99"] <= medians["p999"]
        elif figure["scenario"] != "idle":
            assert medians["rates"] > 0
            assert medians["cpu"] >= 0
    if find_spec("iceoryx2") is None:
        assert "iceoryx2" in document["missing"]
    assert {target["met"] for target in document["targets"]} <= {True, False, None}


def test_a_part_can_be_measured_alone() -> None:
    done = bench("--quick", "--rounds", "1", "--only", "packed", "-o", "name")
    assert done.stdout.splitlines() == ["Snap, adaptive/packed"]


def test_an_unknown_scenario_is_a_usage_error() -> None:
    done = bench("--only", "teleport")
    assert done.returncode == 2
    assert "teleport" in done.stderr
