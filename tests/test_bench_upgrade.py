"""`snapctl bench upgrade`: that each part measures something and leaves nothing. How much is for people to read."""

from __future__ import annotations

import os

import pytest

from snap.cli.bench import upgrade
from snap.cli.bench.upgrade_report import percentile

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


@pytest.mark.parametrize(("part", "value"), [(0.0, 1.0), (0.5, 3.0), (0.99, 4.0)])
def test_a_percentile_is_one_of_the_values(part: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], part) == value
