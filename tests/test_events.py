"""What the kernel remembers: events, totals, and files that cannot grow for ever."""

from __future__ import annotations

import json
from pathlib import Path

from snap.ipc.protocol import EventView
from snap.kernel import events
from snap.kernel.events import BoundedFile, Events


def test_overwritten_events_still_count() -> None:
    log = Events()
    for number in range(events.RING + 10):
        log.emit("module.ready", f"module:{number}")
    log.emit("module.failed", "module:x", cause="it fell over")
    assert log.totals == {"module.ready": events.RING + 10, "module.failed": 1}
    assert log.since(0, 1)[0].seq == 12


def test_events_are_numbered_without_gaps_and_given_from_any_number_on() -> None:
    log = Events()
    for _ in range(10):
        log.emit("a.b", "c")
    assert [event.seq for event in log.since(0, 100)] == list(range(1, 11))
    assert [event.seq for event in log.since(7, 2)] == [8, 9]
    assert log.since(10, 100) == []
    assert log.since(999, 100) == []


def test_every_event_is_a_line_of_json_in_the_log(tmp_path: Path) -> None:
    log = Events(tmp_path / "kernel.log")
    heard: list[EventView] = []
    log.listeners.append(heard.append)
    log.emit("module.failed", "module:x", cause="it\nfell over", event="shadow")
    log.close()
    (line,) = (tmp_path / "kernel.log").read_text().splitlines()
    written = json.loads(line)
    assert (written["event"], written["subject"], written["level"]) == (
        "module.failed",
        "module:x",
        "warning",
    )
    assert (written["cause"], written["event_"]) == ("it\nfell over", "shadow")
    assert [event.kind for event in heard] == ["module.failed"]


def test_a_full_file_is_kept_once_and_begun_anew(tmp_path: Path) -> None:
    file = BoundedFile(tmp_path / "log", limit=100)
    for number in range(50):
        file.write(f"line {number}\n")
    file.close()
    assert (tmp_path / "log").stat().st_size <= 100
    assert (tmp_path / "log.1").stat().st_size <= 100
    assert (tmp_path / "log").read_text().endswith("line 49\n")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_log_that_was_removed_is_begun_anew(tmp_path: Path) -> None:
    file = BoundedFile(tmp_path / "log", limit=10)
    file.write("123456789\n")
    (tmp_path / "log").unlink()
    file.write("new\n")
    file.close()
    assert (tmp_path / "log").read_text() == "new\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    file = BoundedFile(Path("/dev/full"), limit=1 << 60)
    assert file.write("lost\n") == 0
    file.close()
