"""`snapctl bench upgrade`: that each part measures something and leaves nothing. How much is for people to read."""

from __future__ import annotations

import os

import pytest

from snap.cli.bench import upgrade
from snap.cli.bench.upgrade_report import percentile, targets

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a spinning client and an engine need two processors"
)
SMALL = upgrade.Size("small", 32, 4096)


def test_each_upgrade_has_a_blackout_of_the_engine_and_a_pause_of_the_client() -> None:
    flips = upgrade._flips(SMALL, 2)
    assert len(flips.blackouts) == len(flips.gaps) == len(flips.brownouts) == 2
    assert all(blackout > 0 for blackout in flips.blackouts)
    assert all(brownout > 0 for brownout in flips.brownouts)


def test_a_migration_says_what_it_converted_in_the_blackout() -> None:
    found = upgrade._migrations(SMALL.entries, busy=SMALL.entries // 2, times=2)
    assert len(found.converted) == len(found.blackouts) == len(found.gaps) == 2
    assert all(0 <= rows <= SMALL.entries // 2 for rows in found.converted)
    assert all(blackout > 0 for blackout in found.blackouts)


def test_stopping_and_restoring_interrupts_the_client_and_leaves_no_file() -> None:
    assert upgrade._usual(SMALL) > 0


def test_a_part_that_fails_is_told_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("the module is not ready")

    for part in ("_flips", "_migrations"):
        monkeypatch.setattr(upgrade, part, fail)
    monkeypatch.setattr(
        upgrade, "_crashes", lambda standby, times: [4000.0 if standby else 300_000.0] * times
    )
    told: list[str] = []
    results = upgrade.measure(quick=True, say=told.append)
    assert len(results.failures) == len(upgrade.SMALL) + len(upgrade.SMALL_MOVES)
    assert all("the module is not ready" in failure for failure in results.failures)
    # A target is reached by what was measured, and by nothing else.
    assert [target.met for target in targets(results) if target.met is not None] == [True]


def test_migrations_are_compared_at_as_many_rows_written() -> None:
    small, other, large = (
        upgrade.Migrations(entries, busy, blackouts=[blackout])
        for entries, busy, blackout in ((1000, 100, 50.0), (100_000, 10_000, 900.0), (100_000, 100, 150.0))
    )
    results = upgrade.Results(migrations=[small, other, large])
    assert next(target for target in targets(results) if "migration" in target.what).reached == 3.0


@pytest.mark.parametrize(("part", "value"), [(0.0, 1.0), (0.5, 3.0), (0.99, 4.0)])
def test_a_percentile_is_one_of_the_values(part: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], part) == value
