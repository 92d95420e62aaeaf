"""The demo's decisions, without a kernel: what is planned, which chunk goes next, what the writer accepts."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snap.cli.demo import frames
from snap.cli.demo.plan import CHUNK_BYTES, Chunk, Plan, scan
from snap.cli.demo.verify import differences
from snap.cli.demo.window import Window
from snap.cli.demo.writer import Assembler


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


def test_a_plan_numbers_every_chunk_of_every_file_and_ends_with_end(tree: Path) -> None:
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
        (-1, 0, frames.END),
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
    assert all(assembler.accept(carry(plan, number)) for number in range(len(plan.chunks)))
    assert (assembler.files, assembler.bytes) == (4, plan.bytes)
    for name in map(os.fsdecode, plan.files):
        assert (tmp_path / "out" / name).read_bytes() == (tree / name).read_bytes()


def test_the_writer_takes_each_number_once_and_none_too_early(tmp_path: Path) -> None:
    assembler = Assembler(tmp_path)
    both = frames.FIRST | frames.LAST
    assert not assembler.accept(frame(1, both, b"early", b"b"))
    assert assembler.accept(frame(0, both, b"first", b"a"))
    assert not assembler.accept(frame(0, both, b"again", b"a"))
    assert (assembler.expected, assembler.duplicates) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


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


def test_a_window_sends_no_more_than_its_size_ahead() -> None:
    window = Window(total=10, size=3)
    assert [window.take() for _ in range(4)] == [0, 1, 2, None]
    window.acknowledge(2)
    assert [window.take() for _ in range(3)] == [3, 4, None]


def test_a_window_sends_again_only_what_is_not_acknowledged_and_counts_it() -> None:
    window = Window(total=10, size=4)
    sent = [window.take() for _ in range(4)]
    window.acknowledge(2)
    window.rewind()
    sent += [window.take() for _ in range(4)]
    assert sent == [0, 1, 2, 3, 2, 3, 4, 5]
    assert window.resent == 2


def test_a_window_holds_back_its_end_until_it_is_freed() -> None:
    window = Window(total=4, size=10, hold=3)
    assert [window.take() for _ in range(4)] == [0, 1, 2, None]
    window.free()
    assert [window.take() for _ in range(2)] == [3, None]
    window.acknowledge(4)
    assert window.done


def test_a_window_refuses_an_acknowledgement_of_what_was_never_sent() -> None:
    window = Window(total=4, size=10)
    window.take()
    with pytest.raises(ValueError, match="acknowledgement of 2"):
        window.acknowledge(2)


@given(st.integers(0, 40), st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_number_arrives_once_and_in_order_over_a_way_that_loses_everything_now_and_then(
    total: int, size: int, chance: random.Random
) -> None:
    window = Window(total, size)
    way: list[int] = []
    arrived: list[int] = []
    while not window.done:
        number = window.take()
        if number is not None:
            way.append(number)
        if chance.random() < 0.1:
            way.clear()
            window.rewind()
        while way and chance.random() < 0.5:
            first = way.pop(0)
            if first == len(arrived):
                arrived.append(first)
        if chance.random() < 0.5:
            window.acknowledge(len(arrived))
    assert arrived == list(range(total))


def test_a_plan_of_nothing_still_ends(tmp_path: Path) -> None:
    assert scan(tmp_path).chunks == [Chunk(-1, 0, 0, frames.END)]


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
