"""The demo's decisions, without a kernel: what is planned, what the writer accepts, whose a gap is."""

from __future__ import annotations

import os
import random
from pathlib import Path

import click
import pytest

import snap.modules
from snap.cli.commands.demo import parse_events, stretches
from snap.cli.demo import frames
from snap.cli.demo.gaps import Timeline
from snap.cli.demo.plan import CHUNK_BYTES, Chunk, Plan, scan
from snap.cli.demo.script import Happened, write_newer
from snap.cli.demo.verify import differences
from snap.cli.demo.writer import Assembler
from snap.ipc import manifest


def frame(seq: int, flags: int, data: bytes = b"", name: bytes = b"") -> frames.Frame:
    return frames.parse(memoryview(frames.head(seq, flags, name) + data))


def carry(plan: Plan, number: int) -> frames.Frame:
    """The frame of chunk `number`, as the sender makes it."""
    chunk = plan.chunks[number]
    name = plan.files[chunk.file] if chunk.flags & frames.FIRST else b""
    data = b""
    if chunk.file >= 0:
        data = Path(os.fsdecode(plan.root + b"/" + plan.files[chunk.file])).read_bytes()
    return frame(number, chunk.flags, data[chunk.offset : chunk.offset + chunk.size], name)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty").touch()
    (root / "exact").write_bytes(b"e" * CHUNK_BYTES)
    (root / "deep" / "large").write_bytes(random.Random(7).randbytes(3 * CHUNK_BYTES + 5))
    Path(os.fsdecode(os.fsencode(root) + b"/deep/er/odd \xff\n name")).write_bytes(b"odd")
    return root


def test_a_plan_has_every_chunk_of_every_file_and_one_that_carries_nothing(tree: Path) -> None:
    plan = scan(tree)
    assert plan.files == [b"empty", b"exact", b"deep/large", b"deep/er/odd \xff\n name"]
    assert plan.bytes == 4 * CHUNK_BYTES + 8
    assert [(chunk.file, chunk.size, chunk.flags) for chunk in plan.chunks] == [
        (0, 0, frames.FIRST | frames.LAST),
        (1, CHUNK_BYTES, frames.FIRST | frames.LAST),
        (2, CHUNK_BYTES, frames.FIRST),
        (2, CHUNK_BYTES, 0),
        (2, CHUNK_BYTES, 0),
        (2, 5, frames.LAST),
        (3, 3, frames.FIRST | frames.LAST),
        (-1, 0, 0),
    ]


def test_links_and_special_files_are_counted_and_never_opened(tree: Path) -> None:
    (tree / "link").symlink_to("exact")
    (tree / "folder-link").symlink_to("deep")
    os.mkfifo(tree / "fifo")
    plan = scan(tree)
    assert plan.skipped == {"symbolic links": 2, "special files": 1}
    assert len(plan.files) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_named_with_the_reason(tree: Path) -> None:
    (tree / "exact").chmod(0)
    assert scan(tree).unreadable == [f"{tree / 'exact'}: Permission denied"]


def test_a_folder_that_is_excluded_is_not_entered(tree: Path) -> None:
    assert scan(tree, frozenset({b"deep"})).files == [b"empty", b"exact"]


def test_a_root_that_is_no_folder_is_an_error(tree: Path) -> None:
    with pytest.raises(NotADirectoryError):
        scan(tree / "exact")


def test_the_writer_rebuilds_the_tree_from_its_frames(tree: Path, tmp_path: Path) -> None:
    plan = scan(tree)
    assembler = Assembler(tmp_path / "out")
    for number in range(len(plan.chunks)):
        assembler.accept(carry(plan, number))
    assert (assembler.files, assembler.lost, assembler.duplicated) == (4, 0, 0)
    for name in map(os.fsdecode, plan.files):
        assert (tmp_path / "out" / name).read_bytes() == (tree / name).read_bytes()


def test_the_writer_takes_each_number_once_and_counts_what_is_lost_or_comes_twice(tmp_path: Path) -> None:
    assembler = Assembler(tmp_path)
    both = frames.FIRST | frames.LAST
    assembler.accept(frame(0, both, b"first", b"a"))
    assembler.accept(frame(0, both, b"again", b"a"))
    assert (assembler.expected, assembler.duplicated, assembler.lost) == (1, 1, 0)
    assembler.accept(frame(4, both, b"late", b"b"))
    assert (assembler.expected, assembler.duplicated, assembler.lost) == (5, 1, 3)
    assert (tmp_path / "a").read_bytes() == b"first"
    assert not assembler.ended
    assembler.accept(frame(5, frames.END))
    assert assembler.ended


def test_a_second_lap_overwrites_the_first_and_nothing_of_it_stays(tmp_path: Path) -> None:
    assembler = Assembler(tmp_path)
    assembler.accept(frame(0, frames.FIRST, b"a long beginning", b"a"))
    assembler.accept(frame(1, frames.FIRST | frames.LAST, b"short", b"a"))
    assert (tmp_path / "a").read_bytes() == b"short"
    assert assembler.files == 1


@pytest.mark.parametrize("name", [b"/etc/passwd", b"../up", b"a/../../up"])
def test_the_writer_refuses_a_name_outside_its_folder(name: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves the folder"):
        Assembler(tmp_path / "out").accept(frame(0, frames.FIRST, b"x", name))


@pytest.mark.parametrize(
    "data", [b"", b"\0" * (frames.HEADER.size - 1), frames.HEADER.pack(1, 0, 9) + b"short"]
)
def test_a_frame_that_no_sender_makes_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        frames.parse(memoryview(data))


# -- gaps -------------------------------------------------------------------------------------------------------


def timeline(*what: int | str | tuple[int, str]) -> dict[str, tuple[int, int, int]]:
    """Deliveries of one byte at these times, and marks (time, name): gap, bytes and length of each period."""
    line = Timeline()
    for one in what:
        if isinstance(one, tuple):
            line.mark(*one)
        else:
            line.deliver(int(one), 1)
    return {p.name: (p.gap_ns, p.bytes, p.end_ns - p.begin_ns) for p in line.periods}


def test_each_period_has_its_longest_gap_its_bytes_and_its_length() -> None:
    assert timeline((0, "a"), 10, 12, 19, (20, "b"), 21, 24, 29) == {"a": (7, 3, 20), "b": (5, 3, 9)}


def test_a_gap_belongs_to_the_period_that_most_of_it_lies_in() -> None:
    assert timeline((0, "quiet"), 9, (10, "kill"), 50) == {"quiet": (0, 1, 10), "kill": (41, 1, 40)}
    assert timeline((0, "kill"), 10, (50, "quiet"), 51) == {"kill": (41, 1, 50), "quiet": (0, 1, 1)}


def test_a_mark_that_is_heard_of_late_still_counts_from_its_own_time() -> None:
    assert timeline((0, "quiet"), 9, 40, (10, "kill"), 50)["kill"] == (10, 1, 40)


def test_what_comes_before_the_first_mark_belongs_to_none() -> None:
    assert timeline(1, 5, (6, "a"), 8) == {"a": (3, 1, 2)}


def test_a_plan_of_nothing_has_something_to_send(tmp_path: Path) -> None:
    assert scan(tmp_path).chunks == [Chunk(-1, 0, 0, 0)]


def test_verification_names_what_differs_is_missing_or_was_never_sent(tree: Path, tmp_path: Path) -> None:
    plan = scan(tree)
    written = tmp_path / "out"
    assembler = Assembler(written)
    for number in range(len(plan.chunks)):
        assembler.accept(carry(plan, number))
    compared: list[int] = []
    assert differences(plan, written, compared.append) == []
    assert compared == [1, 2, 3, 4]
    (written / "exact").write_bytes(b"e" * (CHUNK_BYTES - 1) + b"f")
    (written / "empty").unlink()
    (written / "deep" / "more").touch()
    assert differences(plan, written, compared.append) == [
        "empty: No such file or directory",
        "exact: checksums differ",
        "deep/more: was never sent",
    ]


def test_the_newer_relay_is_a_whole_module_of_another_version(tmp_path: Path) -> None:
    newer = manifest.load(write_newer(tmp_path))
    shipped = manifest.load(Path(snap.modules.__path__[0]) / "relay")
    assert newer.module.version != shipped.module.version
    assert newer.to_builtins() | {"module": None} == shipped.to_builtins() | {"module": None}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", []),
        ("kill", ["kill"]),
        (
            "upgrade,rollback,upgrade,kernel,rollback",
            ["upgrade", "rollback", "upgrade", "kernel", "rollback"],
        ),
    ],
)
def test_events_are_a_list(text: str, names: list[str]) -> None:
    assert parse_events(text) == names


@pytest.mark.parametrize(
    "text", ["", "rollback", "kill,rollback", "upgrade,rollback,rollback", "none,kill", "kil"]
)
def test_events_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_events(text)


def test_the_quiet_stretches_are_one_and_each_event_has_its_own() -> None:
    def period(name: str, begin: int, end: int, gap: int) -> dict[str, object]:
        return {"name": name, "begin_ns": begin, "end_ns": end, "gap_ns": gap, "bytes": end - begin}

    quiet, (kill,) = stretches(
        [period("", 0, 10, 2), period("kill", 10, 40, 20), period("", 40, 90, 3)], [Happened("kill", "x", 18)]
    )
    assert (quiet.gap_ns, quiet.bytes_per_second) == (3, 1e9)
    assert (kill.event, kill.gap_ns, kill.engine_ns, kill.what) == ("kill", 20, 18, "x")
