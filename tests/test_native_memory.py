"""Loans, views and arrays: the lifetime of a channel's memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from snap.dataplane import _native
from snap.dataplane.errors import (
    FullError,
    ReleasedError,
    UsageError,
)
from tests.native_rig import Pairs, with_rights
from tests.waiting import LIMIT, Background, until


def test_a_loan_is_filled_sent_and_read_in_place(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    with client.loan(10_000) as loan:
        assert len(loan) == 10_000
        array = np.frombuffer(loan.view, dtype=np.uint8)
        array[:] = 7
        with pytest.raises(BufferError, match="views"):
            client.send_loan(loan)
        del array
        client.send_loan(loan, tag=3)
    with pytest.raises(ReleasedError):
        _ = loan.view
    with pytest.raises(ReleasedError):
        client.send_loan(loan)
    with server.receive(timeout=LIMIT) as payload:
        assert (payload.tag, len(payload), bytes(payload)) == (3, 10_000, b"\7" * 10_000)
        assert client.stats["loans_out"] == 1
    assert client.stats["loans_out"] == 0


def test_a_view_used_after_release_raises(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    for size in (10, 10_000):
        client.send(b"a" * size)
        payload = server.receive(timeout=LIMIT)
        view = payload.view
        assert bytes(view[:3]) == b"aaa"
        payload.release()
        payload.release()
        with pytest.raises(ValueError, match="released"):
            view[0]
        for use in (lambda p=payload: p.view, lambda p=payload: bytes(p), lambda p=payload: memoryview(p)):
            with pytest.raises(ReleasedError):
                use()


def test_an_array_outlives_release_and_delays_only_the_giving_back(channel_pair: Pairs) -> None:
    client, server = channel_pair(up_bytes=8192)
    client.send(b"k" * 8192)
    payload = server.receive(timeout=LIMIT)
    array = np.frombuffer(payload, dtype=np.uint8)
    part = array[100:200]
    payload.release()
    assert client.stats["loans_out"] == 1
    with pytest.raises(FullError):
        client.loan(64, timeout=0)
    del array
    assert part.tobytes() == b"k" * 100
    assert client.stats["loans_out"] == 1
    del part
    assert client.stats["loans_out"] == 0
    client.loan(8192, timeout=0).release()


def test_a_received_array_cannot_be_written(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    for size in (10, 10_000):
        client.send(b"a" * size)
        with server.receive(timeout=LIMIT) as payload:
            array = np.frombuffer(payload.view, dtype=np.uint8)
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
            with pytest.raises(TypeError):
                payload.view[0] = 1
            with pytest.raises(BufferError):
                server.recv_packed(payload, 1, timeout=0)
            del array


def test_memory_stays_mapped_as_long_as_something_shows_it(channel_pair: Pairs) -> None:
    pair = channel_pair()
    end = with_rights(pair, 3)[1]
    pair.client.send(b"z" * 5000)
    array = np.frombuffer(end.receive(timeout=LIMIT), dtype=np.uint8)
    end.close()
    del end
    gc.collect()
    assert array.tobytes() == b"z" * 5000


def test_a_loan_left_unsent_goes_back(channel_pair: Pairs) -> None:
    client, _ = channel_pair()
    with client.loan(5000):
        assert client.stats["loans_out"] == 1
    assert client.stats["loans_out"] == 0
    loan = client.loan(5000)
    del loan
    assert client.stats["loans_out"] == 0
    loan = client.loan(5000)
    view = np.frombuffer(loan.view, dtype=np.uint8)
    with pytest.raises(BufferError):
        loan.release()
    del view
    loan.release()
    loan.release()
    assert client.stats["loans_out"] == 0


def test_a_loan_belongs_to_its_channel(channel_pair: Pairs) -> None:
    one, other = channel_pair().client, channel_pair().client
    with one.loan(100) as loan, pytest.raises(UsageError, match="another channel"):
        other.send_loan(loan)


def test_a_loan_on_its_way_cannot_be_written_or_taken_back(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    loan = client.loan(100)
    loan.view[:] = b"s" * 100
    client.send_many([b"x"] * 64)
    sending = Background(lambda: client.send_loan(loan, timeout=LIMIT, wait=_native.BLOCK))

    def held() -> bool:
        try:
            memoryview(loan).release()
        except ReleasedError:
            return True
        return False

    until(held, "send_loan waits for room")
    loan.release()
    assert server.recv_many(64) == [b"x"] * 64
    assert server.recv(timeout=LIMIT) == b"s" * 100
    sending.finish()
    assert client.stats["loans_out"] == 0
    client.check()


def test_a_loan_that_found_no_room_is_lent_as_before(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    loan = client.loan(100)
    client.send_many([b"x"] * 64)
    with pytest.raises(FullError):
        client.send_loan(loan, timeout=0)
    loan.view[:] = b"t" * 100
    server.recv_many(64)
    client.send_loan(loan, timeout=LIMIT)
    assert server.recv(timeout=LIMIT) == b"t" * 100
