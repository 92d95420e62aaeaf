"""Applications that mean ill: whatever they send, and however they stop, the engine answers, lives, and serves others.

Each test prints the seed of what it sends; `SNAP_SEED=<number>` repeats it.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from snap.dataplane.errors import DeadlineError, FullError
from snap.ipc import Channel, connect
from snap.modules.pony import (
    ClosedByPeerError,
    Connection,
    Place,
    Pony,
    PonyError,
    Region,
    Right,
    Status,
)
from snap.modules.pony.commands import ANSWER, SERVICE, Kind
from tests import pony_commands as commands
from tests.conftest import OWNER_MAY_ALL, KernelProcess

ARENA = 1 << 20
ALL = Right.READ | Right.WRITE | Right.ATOMIC
PATIENCE = 60
IMPATIENCE = 10
"""Seconds, where nothing at all goes on when it goes wrong."""
SILENT = {Kind.SEND_ARENA, Kind.POST}
"""Commands that may be answered later, when the peer does its part."""

EXTREMES = [0, 1, 7, 8, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 8, 2**64 - 1]


class Honest:
    """Two applications that go on doing what they do, and check it."""

    def __init__(self, kernel: KernelProcess, stack: ExitStack) -> None:
        clients = [stack.enter_context(connect(runtime_dir=kernel.directory)) for _ in range(2)]
        self.near, self.far = (stack.enter_context(Pony.open(client, ARENA)) for client in clients)
        self.far.bind("honest")
        self.out: Connection = self.near.connect("honest")
        self.back: Connection = self.far.accept(PATIENCE)
        self.place: Place = self.far.place(64)
        self.place.array()[:] = 0
        self.region: Region = self.far.register(self.place, ALL)
        self.source, self.target = self.near.place(5000), self.far.place(5000)
        self.rounds = 0

    def work(self, patience: float = PATIENCE) -> None:
        """One round: messages, a large one, and an atomic operation, all as they should be."""
        number = self.rounds
        self.rounds += 1
        self.out.send(b"%d" % number, timeout=patience)
        assert self.back.recv(patience).data == b"%d" % number
        self.source.array()[:] = number % 256
        posted = self.back.begin_receive_into(self.target)
        assert self.out.begin_send_from(self.source).result(patience) == posted.result(patience) == 5000
        assert (self.target.array() == number % 256).all()
        assert self.out.fetch_add(self.region.handle, 0, 1, timeout=patience) == number


class Stage:
    """A kernel, its engine's process, honest applications, and room for others."""

    def __init__(self, kernel: KernelProcess, stack: ExitStack) -> None:
        self.kernel, self.stack = kernel, stack
        self.honest = Honest(kernel, stack)
        self.pid = self.engine()

    def engine(self) -> int:
        with self.kernel.control() as operator:
            pid: int = operator.call("module.show", name="pony")["pid"]
            return pid

    def channel(self, slots: int = 0, arena: int = ARENA) -> Channel:
        client = self.stack.enter_context(connect(runtime_dir=self.kernel.directory))
        return self.stack.enter_context(client.open(SERVICE, slots=slots, arena_bytes=arena))

    def pony(self, slots: int = 0) -> Pony:
        return Pony(self.channel(slots))

    def unharmed(self, patience: float = PATIENCE) -> None:
        """The same process serves, and honest applications do not notice."""
        for _ in range(5):
            self.honest.work(patience)
        assert self.engine() == self.pid


@pytest.fixture
def stage(kernel: Callable[..., KernelProcess]) -> Iterator[Stage]:
    with ExitStack() as stack:
        made = Stage(kernel(policy=OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n"), stack)
        yield made


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("SNAP_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SNAP_SEED={seed}")
    return random.Random(seed)


def talk(
    channel: Channel, command: bytes, tag: int, pooled: bool = False, patience: float = PATIENCE
) -> Status | None:
    """What the engine answers; None for a command that waits for the peer. Raises DeadlineError without an answer."""
    if pooled:
        with channel.loan(len(command)) as loan:
            loan.view[:] = command
            channel.send_loan(loan, tag)
    else:
        channel.send(command, tag)
    silent = len(command) >= 8 and command[0] in SILENT
    try:
        while True:
            came, answer = channel.recv_tagged(0.01 if silent else patience)
            assert len(answer) >= ANSWER.size
            if came == tag and answer[0] not in {Kind.MESSAGE, Kind.CONNECTED, Kind.CLOSED}:
                return Status(answer[1])
    except DeadlineError:
        if not silent:
            raise
        return None


def take_all(connection: Connection) -> None:
    """Messages and datagrams that are here."""
    for take in (connection.recv, connection.recv_datagram):
        with suppress(DeadlineError, ClosedByPeerError):
            while True:
                take(0)


# -- commands that make no sense ------------------------------------------------------------------------------


def test_random_bytes_are_answered(stage: Stage, dice: random.Random) -> None:
    channel = stage.channel()
    for tag in range(1, 4001):
        size = dice.choice([0, 1, 7, 8, dice.randrange(100), dice.randrange(6000)])
        command = bytearray(dice.randbytes(size))
        if command and dice.random() < 0.5:
            command[0] = dice.randrange(20)
        status = talk(channel, bytes(command), tag, pooled=size > 0 and dice.random() < 0.3)
        # Nothing but names can be had without knowing a connection.
        if status == Status.OK:
            assert command[0] in {Kind.BIND, Kind.REGISTER}
        if tag % 200 == 0:
            stage.honest.work()
    stage.unharmed()


def valid_commands(number: int, handle: int, mine: int, table: int, eight: int) -> list[bytes]:
    """One of each kind, all of which would succeed. `eight`: where the numbers 0 to 7 are, of 4 bytes each."""
    return [
        commands.bind("hostile"),
        commands.connect("honest"),
        commands.send(number, b"hello", 3),
        commands.send_from(number, 0, 100),
        commands.receive_into(number, 0, 100),
        commands.register(0, 0, 64, ALL),
        commands.release(mine),
        commands.read(number, handle, 0, 16),
        commands.read(number, handle, 0, 16, 64),
        commands.write(number, handle, 0, b"written"),
        commands.write_from(number, handle, 0, 0, 64),
        commands.compare_swap(number, handle, 0, 0, 1),
        commands.fetch_add(number, handle, 8, 1),
        commands.indirect(number, table, 0, 16),
        commands.scan(number, table, 0, 0, 16, 4, 32, 8),
        commands.burst(Kind.READS, number, handle, 0, eight, 8, 4),
        commands.burst(Kind.WRITES, number, handle, 0, eight, 8, 4),
        commands.burst(Kind.INDIRECTS, number, table, 0, eight, 8, 8),
    ]


def mutated(dice: random.Random, command: bytes) -> bytes:
    """Flipped bits, extreme numbers where numbers are, cut or longer."""
    changed = bytearray(command)
    for _ in range(dice.choice([1, 1, 2, 4])):
        how = dice.randrange(5)
        if how == 0 and changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        elif how == 1 and len(changed) >= 16:
            at = 8 + dice.randrange((len(changed) - 8) // 8) * 8
            changed[at : at + 8] = struct.pack("<Q", dice.choice(EXTREMES))
        elif how == 2 and len(changed) >= 12:
            at = dice.randrange(1, len(changed) // 4) * 4
            changed[at : at + 4] = struct.pack("<I", dice.choice(EXTREMES) & 0xFFFF_FFFF)
        elif how == 3:
            del changed[dice.randrange(len(changed) + 1) :]
        else:
            changed += dice.randbytes(dice.choice([1, 8, 500, 5000]))
    return bytes(changed)


def test_commands_that_are_nearly_right_are_answered(stage: Stage, dice: random.Random) -> None:
    victim, channel = stage.pony(), stage.channel()
    victim.bind("victim")
    hostile = Pony(channel)
    out = hostile.connect("victim")
    back = victim.accept(PATIENCE)
    guarded, secret = victim.place(4096), victim.place(4096)
    guarded.array()[:] = 0
    secret.array()[:] = 77
    handle = victim.register(guarded, ALL).handle
    table = victim.place(4096)
    table.array()[:] = 0
    for entry in range(8):
        struct.pack_into("<QQQ", table.view, 8 + entry * 32, handle, 0, 16)
    of_table = victim.register(table, Right.READ).handle
    mine = hostile.register(hostile.place(64), ALL).handle
    eight = hostile.place(32)
    eight.array("<u4")[:] = range(8)
    valid = valid_commands(out.number, handle, mine, of_table, eight.offset)
    seen: set[Status | None] = set()
    for tag in range(1 << 32, (1 << 32) + 4000):
        command = dice.choice(valid)
        if dice.random() < 0.9:
            command = mutated(dice, command)
        kind = command[0] if command else 0
        # Else there would be nothing left to attack.
        if kind == Kind.CLOSE or (kind == Kind.CONNECT and dice.random() < 0.9):
            continue
        seen.add(
            talk(channel, command, tag, pooled=bool(command) and (kind >= Kind.READS or dice.random() < 0.1))
        )
        if tag % 100 == 0:
            victim.poll()
            take_all(back)
        if tag % 200 == 0:
            stage.honest.work()
    assert seen >= {Status.OK, Status.BAD, Status.NO_CONNECTION, Status.NO_REGION, Status.OUT_OF_RANGE}
    # Whatever was written, nothing was outside of the region.
    assert (secret.array() == 77).all()
    stage.unharmed()


def test_regions_of_others_cannot_be_had_by_guessing(stage: Stage, dice: random.Random) -> None:
    """By the right handle over a connection of one's own to somebody else, or by any number of a connection."""
    victim = stage.pony()
    victim.bind("victim")
    hostile = stage.pony()
    out = hostile.connect("victim")
    handle = stage.honest.region.handle
    with pytest.raises(Exception, match="no such region"):
        out.read(handle, 0, 8)
    for number in [*range(64), *(dice.randrange(1 << 32) for _ in range(500))]:
        if number != out.number:
            status = talk(hostile.channel, commands.read(number, handle, 0, 8), (1 << 40) + number)
            assert status == Status.NO_CONNECTION
    stage.unharmed()


# -- applications that do not read, or leave ------------------------------------------------------------------


def test_who_never_reads_completions_holds_up_only_itself(stage: Stage) -> None:
    channel = stage.channel(slots=64)
    sent = 0
    with pytest.raises(FullError):
        while True:
            channel.send(commands.bind("x" * 100), 1, 0) if sent % 2 else channel.send(b"?", 1, 0)
            sent += 1
            if sent % 16 == 0:
                stage.honest.work()
    stage.unharmed()
    # Nothing was lost: all that was sent is answered, once it is read.
    for _ in range(sent):
        assert Status(channel.recv(PATIENCE)[1]) == Status.BAD


def test_who_never_reads_messages_holds_up_only_those_who_send_to_it(stage: Stage) -> None:
    deaf, sender = stage.pony(slots=64), stage.pony()
    deaf.bind("deaf")
    outs = [sender.connect("deaf") for _ in range(8)]
    statuses = [talk(sender.channel, commands.send(out.number, bytes(4096)), 1 << 40) for out in outs * 80]
    assert set(statuses) == {Status.OK, Status.FULL}
    stage.unharmed()


def test_a_full_queue_of_commands_is_served_when_it_is_read(stage: Stage) -> None:
    """As many as there is room for, in one go, of the largest that there are."""
    channel = stage.channel(slots=64)
    pony = Pony(channel)
    out = pony.connect("honest")
    back = stage.honest.far.accept(PATIENCE)
    for _ in range(20):
        tags = 0
        with pytest.raises(FullError):
            while True:
                channel.send(commands.send(out.number, bytes(900)), tags + 1, 0)
                tags += 1
        got = [channel.recv_tagged(PATIENCE) for _ in range(tags)]
        assert [tag for tag, _ in got] == list(range(1, tags + 1))
        done = sum(not answer[1] for _, answer in got)
        for _ in range(done):
            assert len(back.recv(PATIENCE).data) == 900
    stage.unharmed()


DIES = """
import os, signal, sys
import numpy as np
from snap.ipc import connect
from snap.modules.pony import Pony, Right

client = connect(sys.argv[1])
pony = Pony.open(client, 1 << 20)
out = pony.connect("mourner")
place = pony.place(1 << 19)
pony.register(place, Right.READ)
pony.bind("gone")
for number in range(40):
    out.begin_send_from(place, 1000 + number)
    out.begin_receive_into(place)
    out.begin_send(b"%d" % number)
out.begin_reads(int(sys.argv[2]), np.zeros(1000, int), 8, place)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_that_dies_with_operations_under_way_is_cleaned_up(stage: Stage) -> None:
    mourner = stage.pony()
    mourner.bind("mourner")
    region = mourner.register(mourner.place(64), ALL)
    for _ in range(3):
        died = subprocess.run(
            [sys.executable, "-c", DIES, str(stage.kernel.directory), str(region.handle)], timeout=PATIENCE
        )
        assert died.returncode == -signal.SIGKILL
        back = mourner.accept(PATIENCE)
        sending = back.begin_send(b"x")
        with pytest.raises(ClosedByPeerError):
            while True:
                back.recv(PATIENCE)
        with pytest.raises(ClosedByPeerError):
            back.begin_receive_into(mourner.place(64)).result(PATIENCE)
        assert back.closed and (sending.done or sending.result(PATIENCE) is not None)
        back.close()
        # Its name is free again.
        with stage.pony() as other:
            other.bind("gone")
    stage.unharmed()


# -- limits that one application uses up for all --------------------------------------------------------------


def fill(sender: Pony, outs: list[Connection]) -> None:
    """Send over each of these until no more may wait."""
    for out in outs:
        command = commands.send(out.number, bytes(900))
        while talk(sender.channel, command, 1 << 40, patience=IMPATIENCE) == Status.OK:
            pass


def test_many_connections_of_who_never_reads_hold_up_nobody_else(stage: Stage) -> None:
    deaf, sender = stage.pony(slots=64), stage.pony()
    deaf.bind("deaf")
    outs = []
    for _ in range(70):
        outs.append(sender.connect("deaf"))
        deaf.poll()
    with suppress(DeadlineError):
        fill(sender, outs)
    stage.unharmed(IMPATIENCE)


def test_messages_that_wait_for_a_closed_connection_are_forgotten(stage: Stage) -> None:
    with stage.pony() as sender, stage.pony(slots=64) as deaf:
        deaf.bind("deaf")
        outs = [sender.connect("deaf") for _ in range(8)]
        backs = [deaf.accept(PATIENCE) for _ in outs]
        fill(sender, outs)
        for tag, back in enumerate(backs):
            deaf.channel.send(commands.close(back.number), (1 << 40) + tag)
        while deaf.channel.recv_tagged(PATIENCE)[0] != (1 << 40) + 7:
            # Not so fast that all has been delivered before.
            time.sleep(0.002)
    with stage.pony() as sender, stage.pony() as hearer:
        hearer.bind("hearer")
        for out in [sender.connect("hearer") for _ in range(20)]:
            out.send(b"x", timeout=PATIENCE)
            assert hearer.accept(PATIENCE).recv(PATIENCE).data == b"x"


def test_a_new_connection_has_no_messages_of_an_earlier_one(stage: Stage) -> None:
    deaf, sender = stage.pony(slots=64), stage.pony()
    deaf.bind("deaf")
    sender.bind("sender")
    for _ in range(20):
        fill(sender, [sender.connect("deaf")])
        deaf.accept(PATIENCE).close()
        new = deaf.connect("sender")
        deaf.register(deaf.place(64), ALL)
        with pytest.raises(DeadlineError):
            new.recv(0.2)


def test_who_leaves_many_connections_behind_does_not_end_the_engine(stage: Stage) -> None:
    left = stage.pony(slots=64)
    left.bind("left")
    with stage.pony() as leaver:
        for _ in range(6000):
            leaver.connect("left")
            left.poll()
    stage.unharmed(IMPATIENCE)


def test_one_application_cannot_take_all_names(stage: Stage) -> None:
    greedy, other = stage.pony(), stage.pony()
    with suppress(PonyError):
        for number in range(5000):
            greedy.bind(f"greedy-{number}")
    other.bind("modest")


def test_one_application_cannot_take_all_connections(stage: Stage) -> None:
    greedy, other = stage.pony(), stage.pony()
    greedy.bind("greedy")
    with suppress(PonyError):
        for _ in range(40_000):
            greedy.connect("greedy")
    other.connect("honest")


def test_large_messages_take_turns(stage: Stage) -> None:
    """Those of one application are not all copied before those of another; in the order in which the receiver of both
    hears of them."""
    near, greedy = stage.honest.near, stage.pony(slots=4096)
    greedy.bind("greedy")
    source, target = greedy.place(ARENA // 2), greedy.place(ARENA // 2)
    outs = [greedy.connect("greedy") for _ in range(8)]
    own = [greedy.accept(PATIENCE) for _ in outs]
    fair = [near.connect("greedy") for _ in range(24)]
    ends = [greedy.accept(PATIENCE) for _ in fair]
    for out in outs * 64:
        out.begin_send_from(source)
    for out in fair:
        out.begin_send_from(stage.honest.source)
    # They wait for places, which all come at once.
    for out in (*outs, fair[0]):
        out.send(b"in place", timeout=PATIENCE)
    for end in (*own, ends[0]):
        assert end.recv(PATIENCE).data == b"in place"
    posts = [commands.receive_into(end.number, target.offset, target.size) for end in (*own * 64, *ends)]
    greedy.channel.send_many(posts, 1 << 40)
    numbers, order = {end.number for end in ends}, []
    while len(numbers.intersection(order)) < len(fair):
        kind, _, _, number, _ = ANSWER.unpack_from(greedy.channel.recv_tagged(PATIENCE)[1])
        if kind == Kind.POSTED:
            order.append(number)
    # By turns it would be one or two of each of its connections, not all of one.
    assert len(order) - len(fair) < 64
