"""The audit log on real files, full ones among them."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snap.dataplane.errors import ResourceError
from snap.kernel.audit import AuditLog, AuditRecord


def record(number: int, reason: str = "") -> AuditRecord:
    return AuditRecord(
        action="mint", outcome="ok", cap=number, owner="app:1.1", rights=["send"], reason=reason
    )


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[], AuditLog]]:
    logs: list[AuditLog] = []

    def open_log() -> AuditLog:
        logs.append(AuditLog(path, clock=lambda: 1_700_000_000_000_000_042))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: a write over the line is short, a later one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_record_is_one_line_with_its_time_in_nanoseconds(
    path: Path, opened: Callable[[], AuditLog]
) -> None:
    opened().write(record(7, "line\nbreak"))
    (line,) = lines(path)
    assert line["time"] == "2023-11-14T22:13:20.000000042Z"
    assert (line["action"], line["outcome"], line["cap"]) == ("mint", "ok", 7)
    assert set(line) == {
        *("time", "action", "outcome", "cap", "parent", "object"),
        *("rights", "owner", "badge", "pid", "rule", "reason"),
    }


def test_the_file_is_its_owners_alone_and_keeps_what_it_held(
    path: Path, opened: Callable[[], AuditLog]
) -> None:
    path.write_text('{"cap": 0}\n')
    path.chmod(0o644)
    opened().write(record(1))
    opened().write(record(2))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [line["cap"] for line in lines(path)] == [0, 1, 2]


def test_half_a_line_left_by_a_crash_spoils_no_later_line(path: Path, opened: Callable[[], AuditLog]) -> None:
    path.write_text('{"cap": 0}\n{"ca')
    opened().write(record(1))
    texts = path.read_text().splitlines()
    assert texts[1] == '{"ca'
    assert json.loads(texts[2])["cap"] == 1


def test_a_full_disk_costs_lines_that_are_counted_and_told_later(
    path: Path, opened: Callable[[], AuditLog]
) -> None:
    log = opened()
    log.write(record(1))
    with disk_full_at(path.stat().st_size + 20):
        for number in (2, 3, 4):
            log.write(record(number))
        assert log.lost == 3
    log.write(record(5))
    assert log.lost == 0
    first, torn, told, last = path.read_text().splitlines()
    assert json.loads(first)["cap"] == 1
    assert len(torn) == 20
    assert (json.loads(told)["action"], json.loads(told)["count"]) == ("audit.lost", 3)
    assert json.loads(last)["cap"] == 5


def test_a_loss_that_happens_again_is_not_told_twice(path: Path, opened: Callable[[], AuditLog]) -> None:
    log = opened()
    for _ in range(2):
        log.write(record(0))
        with disk_full_at(path.stat().st_size):
            log.write(record(1))
    log.write(record(2))
    assert [line["count"] for line in lines(path) if line["action"] == "audit.lost"] == [1, 1]


def test_the_loss_line_that_fits_where_the_record_does_not_is_not_lost(
    path: Path, opened: Callable[[], AuditLog]
) -> None:
    log = opened()
    with disk_full_at(0):
        log.write(record(1))
    with disk_full_at(200):
        log.write(record(2, "x" * 500))
    assert log.lost == 1
    log.write(record(3))
    counts = [int(count) for count in re.findall(r'"count":(\d+)', path.read_text())]
    assert counts == [1, 1]


@pytest.mark.parametrize("size", [0, 100, 40_000])
def test_the_tail_is_the_last_lines_in_order(path: Path, opened: Callable[[], AuditLog], size: int) -> None:
    log = opened()
    for number in range(12):
        log.write(record(number, "é" * size))
    assert [json.loads(line)["cap"] for line in log.tail(5)] == [7, 8, 9, 10, 11]
    assert len(log.tail(100)) == 12
    assert log.tail(0) == log.tail(-1) == []


def test_an_empty_log_has_an_empty_tail(opened: Callable[[], AuditLog]) -> None:
    assert opened().tail(10) == []


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("pipe", "link", "absent/audit.jsonl"):
        with pytest.raises(ResourceError, match="cannot open the audit log"):
            AuditLog(tmp_path / name)
