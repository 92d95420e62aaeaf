"""`snapctl bench pony`: that each part measures something and leaves nothing. How much is for people to read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from snap.cli.bench import pony, pony_hosts
from snap.cli.bench.pony_report import BEGIN, END, baseline, document, markdown, targets
from snap.ipc import UsageError

pytestmark = [
    pytest.mark.skipif(
        len(os.sched_getaffinity(0)) < 2, reason="applications and an engine need two processors"
    ),
]


def _silent(_: str) -> None:
    pass


def test_reads_and_round_trips_have_figures() -> None:
    results = pony.measure(True, _silent, frozenset({"reads", "trips"}))
    assert not [failure for failure in results.failures if "grpcio" not in failure]
    assert {figure.scenario for figure in results.figures} == {"reads in 1 MiB", "round trip, one host"}
    assert all(value > 0 for figure in results.figures for value in figure.rounds)
    assert all(len(figure.rounds) == pony.QUICK_ROUNDS for figure in results.figures)
    found = baseline(results, "round trip, one host", "Snap, blocking")
    assert found is not None and found[0] == "TCP, blocking"
    # A target is reached or missed by what was measured, and by nothing else.
    judged = [target for target in targets(results) if target.met is not None]
    assert 0 < len(judged) < len(targets(results))
    assert len(document(results)["targets"]) == len(targets(results))


@pytest.mark.skipif(pony_hosts.unable() != "", reason=pony_hosts.unable() or "able")
@pytest.mark.netns
@pytest.mark.root
def test_two_hosts_talk_and_leave_no_namespace() -> None:
    with pony_hosts.two_hosts(1500) as site, site.apps(0, 0) as (near, far):
        far.ask("bind", name="target")
        far.begin("accept", count=1)
        near.ask("connect", name=site.prefix + "target", count=1)
        far.result()
        for on in (False, True):
            near.ask("offload", device=site.links[0], on=on)
        names = site.namespaces
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not [name for name in names if name in left]


def test_a_part_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pony, "unable", lambda: "network namespaces need root")
    results = pony.measure(True, _silent, frozenset({"hosts", "loss"}))
    assert len(results.failures) == len(pony.MTUS) + 1
    assert all("need root" in failure for failure in results.failures)


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    results = pony.Results()
    results.add("reads in 1 MiB", f"bursts of {pony.BURST}", rate=20.0, per_core=25.0)
    file = tmp_path / "README.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        markdown(results, file)
        text = file.read_text()
        assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"|\n{END}\nafter\n")
        assert "old" not in text and "| 25 M | at least 20 M | yes |" in text
    file.write_text("no markers")
    with pytest.raises(UsageError):
        markdown(results, file)
