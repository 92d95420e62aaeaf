"""Pony Express against a model of it: random operations of two applications, on one host and on two, with engines that die
in between. Hypothesis prints what to repeat."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snap.modules.pony import (
    INDIRECTION,
    BusyError,
    Operation,
    Place,
    PonyError,
    Region,
    RegionError,
    Right,
    RightError,
    TooLongError,
)
from tests.pony_hosts import Host, join

SOON = 20.0
REGION = 4096
RIGHTS = st.sampled_from([Right.READ, Right.WRITE, Right.READ | Right.WRITE | Right.ATOMIC])
OFFSETS = st.one_of(st.integers(0, REGION + 64), st.just(2**63), st.just(2**64 - 1))
BYTES = st.binary(min_size=0, max_size=200)


class Known:
    """What the model knows of a region: its memory is compared with the real one after each step."""

    def __init__(self, handle: int, place: Place, rights: Right) -> None:
        self.handle, self.place, self.rights = handle, place, rights
        self.memory = bytearray(REGION)
        self.released = False

    def refusal(self, right: Right, offset: int, size: int) -> type[PonyError] | None:
        if self.released:
            return RegionError
        if not self.rights & right:
            return RightError
        return RegionError if offset + size > REGION else None


class Model(RuleBasedStateMachine):
    """`near` asks, `far` owns the memory; messages go both ways."""

    two_hosts = True
    regions = Bundle("regions")
    sends = Bundle("sends")

    def __init__(self) -> None:
        super().__init__()
        self.hosts = [Host("a")]
        if self.two_hosts:
            self.hosts.append(Host("b"))
            join(*self.hosts)
        self.near, self.far = self.hosts[0].open(), self.hosts[-1].open()
        self.far.bind("far")
        self.out = self.near.connect("b/far" if self.two_hosts else "far")
        self.back = self.far.accept(SOON)
        self.under_way: dict[bool, dict[int, deque[bytes]]] = {True: {}, False: {}}
        self.known: list[Known] = []
        self.large: deque[tuple[Operation, Place, bytes]] = deque()

    def teardown(self) -> None:
        for host in self.hosts:
            host.close()

    # -- messages ---------------------------------------------------------------------------------------------

    @rule(forth=st.booleans(), data=st.binary(max_size=4096), stream=st.integers(0, 2))
    def send(self, forth: bool, data: bytes, stream: int) -> None:
        try:
            (self.out if forth else self.back).send(data, stream, timeout=0)
        except BusyError:
            assert sum(map(len, self.under_way[forth].values())) >= 16
        else:
            self.under_way[forth].setdefault(stream, deque()).append(data)

    @precondition(lambda self: any(any(streams.values()) for streams in self.under_way.values()))
    @rule(forth=st.booleans())
    def receive(self, forth: bool) -> None:
        streams = self.under_way[forth]
        if any(streams.values()):
            message = (self.back if forth else self.out).recv(SOON)
            assert message.data == streams[message.stream].popleft()

    @rule(size=st.integers(1, 20_000), byte=st.integers(0, 255))
    def send_large(self, size: int, byte: int) -> None:
        if len(self.large) < 8:
            place = self.near.place(size)
            place.array()[:] = byte
            self.large.append((self.out.begin_send_from(place), place, bytes([byte]) * size))

    @precondition(lambda self: bool(self.large))
    @rule(room=st.integers(1, 25_000))
    def receive_large(self, room: int) -> None:
        target = self.far.place(room)
        posted = self.back.begin_receive_into(target)
        while self.large:
            send, place, data = self.large.popleft()
            fits = len(data) <= room
            if fits:
                assert send.result(SOON) == len(data) == posted.result(SOON)
                assert bytes(target.view[: len(data)]) == data
            else:
                with pytest.raises(TooLongError):
                    send.result(SOON)
            place.free()
            if fits:
                target.free()
                return
        # It waits for the next one.
        place = self.near.place(1)
        assert self.out.begin_send_from(place).result(SOON) == 1 == posted.result(SOON)
        place.free()
        target.free()

    # -- memory -----------------------------------------------------------------------------------------------

    @rule(target=regions, rights=RIGHTS)
    def register(self, rights: Right) -> Any:
        if len(self.known) >= 16:
            return multiple()
        place = self.far.place(REGION)
        place.array()[:] = 0
        known = Known(self.far.register(place, rights).handle, place, rights)
        self.known.append(known)
        return known

    @rule(region=consumes(regions))
    def release(self, region: Known) -> None:
        self.far.release(Region(region.handle, 0, REGION, region.rights))
        region.released = True
        with pytest.raises(RegionError):
            self.out.read(region.handle, 0, 8)

    @rule(region=regions, offset=OFFSETS, size=st.integers(0, 900))
    def read(self, region: Known, offset: int, size: int) -> None:
        refusal = region.refusal(Right.READ, offset, size)
        if refusal is not None:
            with pytest.raises(refusal):
                self.out.read(region.handle, offset, size)
        else:
            assert self.out.read(region.handle, offset, size) == region.memory[offset : offset + size]

    @rule(region=regions, offset=OFFSETS, data=BYTES)
    def write(self, region: Known, offset: int, data: bytes) -> None:
        refusal = region.refusal(Right.WRITE, offset, len(data))
        if refusal is not None:
            with pytest.raises(refusal):
                self.out.write(region.handle, offset, data)
        else:
            self.out.write(region.handle, offset, data)
            region.memory[offset : offset + len(data)] = data

    @rule(region=regions, word=st.integers(0, REGION // 8 - 1), add=st.integers(0, 2**64 - 1))
    def fetch_add(self, region: Known, word: int, add: int) -> None:
        refusal = region.refusal(Right.ATOMIC, word * 8, 8)
        if refusal is not None:
            with pytest.raises(refusal):
                self.out.fetch_add(region.handle, word * 8, add)
            return
        (old,) = struct.unpack_from("<Q", region.memory, word * 8)
        assert self.out.fetch_add(region.handle, word * 8, add) == old
        struct.pack_into("<Q", region.memory, word * 8, (old + add) % 2**64)

    @rule(region=regions, words=st.lists(st.integers(0, REGION // 8 + 1), max_size=40))
    def burst(self, region: Known, words: list[int]) -> None:
        import numpy as np

        into = self.near.place(max(len(words), 1) * 8)
        burst = self.out.begin_reads(region.handle, np.array(words, "u8") * 8, 8, into)
        good = next((at for at, word in enumerate(words) if word >= REGION // 8), len(words))
        refused = words and region.refusal(Right.READ, 0, 8)
        if refused or good < len(words):
            with pytest.raises(PonyError) as raised:
                burst.result(SOON)
            if not refused:
                assert raised.value.done == good
        else:
            assert burst.result(SOON) == len(words)
            for at, word in enumerate(words):
                assert into.view[at * 8 : at * 8 + 8] == region.memory[word * 8 : word * 8 + 8]
        into.free()

    @rule(region=regions, other=regions, offset=st.integers(0, REGION), size=st.integers(0, 500))
    def indirect(self, region: Known, other: Known, offset: int, size: int) -> None:
        INDIRECTION.pack_into(region.place.view, 0, other.handle, offset, size)
        INDIRECTION.pack_into(region.memory, 0, other.handle, offset, size)
        refusal = region.refusal(Right.READ, 0, INDIRECTION.size) or other.refusal(Right.READ, offset, size)
        if refusal is not None:
            with pytest.raises(refusal):
                self.out.read_indirect(region.handle, 0, 500)
        else:
            found = self.out.read_indirect(region.handle, 0, 500)
            assert found == other.memory[offset : offset + size]

    # -- engines ----------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.hosts[which % len(self.hosts)].restart()

    @initialize()
    def begin(self) -> None:
        self.out.send(b"begin")
        assert self.back.recv(SOON).data == b"begin"

    @invariant()
    def memory_is_as_the_model_has_it(self) -> None:
        for region in self.known:
            assert bytes(region.place.view) == bytes(region.memory)


class Local(Model):
    two_hosts = False


@pytest.mark.parametrize("machine", [Local, Model], ids=["one-host", "two-hosts"])
def test_it_does_what_the_model_does(machine: type[Model]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
