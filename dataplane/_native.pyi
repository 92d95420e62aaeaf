"""Typed face of the Rust crate: see `dataplane/src/`."""

from collections.abc import Callable, Sequence
from typing import Any, Final, Self, final

from typing_extensions import Buffer

SPIN: Final = 0
ADAPTIVE: Final = 1
BLOCK: Final = 2

CLIENT: Final = 0
SERVER: Final = 1

RIGHT_SEND: Final = 1
RIGHT_RECV: Final = 2

GATE_LINES: Final[int]
GATE_BYTES: Final[int]
STATS_LINES: Final[int]
STATS_BYTES: Final[int]
DESCRIPTOR_BYTES: Final = 64
INLINE_MAX: Final[int]
LAYOUT_VERSION: Final[int]

def ring_bytes(slots: int) -> int:
    """Bytes of a channel's ring segment with `slots` descriptors (a power of two, 64 to 65536) per direction."""

def make_wire(frames: int, mtu: int) -> int:
    """A sealed segment for a wire between two engines of Pony; the descriptor is the caller's. `frames`, a power of
    two: packets of up to `mtu` bytes that each direction holds. Raises ValueError, OSError."""

class Endpoint:
    """One end of a channel. Sending and receiving may each be used by one thread at a time.

    Descriptors are duplicated or mapped; the caller still owns (and closes) those it passes.
    `bells` are two eventfds: the first wakes the server, the second the client.
    `up_fd`/`down_fd` are the pools that the client and the server write payloads to; -1 where there is none.
    `rights`: bit 0 the client may send, bit 1 it may receive; each end holds the other to it.
    `gate_fd`/`gate_index` (server only, else -1): the module's gate page and this channel's line in it.
    `arena_fd`: memory that both ends write, for one-sided operations; -1 where there is none.
    Raises FaultedError (wrong magic, version, geometry), ResourceError (mmap), ValueError (arguments).
    """

    def __new__(
        cls,
        role: int,
        ring_fd: int,
        up_fd: int,
        down_fd: int,
        slots: int,
        up_bytes: int,
        down_bytes: int,
        bells: tuple[int, int],
        generation: int,
        gate_fd: int = -1,
        gate_index: int = -1,
        rights: int = 3,
        arena_fd: int = -1,
        arena_bytes: int = 0,
    ) -> Self: ...
    def send(self, data: Buffer, tag: int = 0, timeout: float | None = None, wait: int = ADAPTIVE) -> None:
        """Send one message; waits for room up to `timeout` seconds (None: for ever, 0: FullError at once)."""
    def recv(self, timeout: float | None = None, wait: int = ADAPTIVE) -> bytes:
        """Receive one message as bytes. Raises DeadlineError when none came (at once with timeout 0)."""
    def recv_tagged(self, timeout: float | None = None, wait: int = ADAPTIVE) -> tuple[int, bytes]: ...
    def try_recv(self) -> bytes | None:
        """One message, or None when there is none now."""
    def send_many(
        self, messages: Sequence[bytes], tag: int = 0, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> int:
        """Send a burst, published at once. Returns how many went: all, unless the timeout passed (0: what fits)."""
    def recv_many(self, limit: int, timeout: float | None = None, wait: int = ADAPTIVE) -> list[bytes]:
        """Receive 1 to `limit` messages; an empty list when the timeout passed."""
    def send_packed(
        self, records: Buffer, size: int, tag: int = 0, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> int:
        """Send len(records)/size messages of `size` bytes each from one contiguous buffer. Returns how many."""
    def recv_packed(self, out: Buffer, size: int, timeout: float | None = None, wait: int = ADAPTIVE) -> int:
        """Fill `out` with messages of exactly `size` bytes each; returns how many (0 when the timeout passed).
        A message of another size ends the burst, and raises MessageSizeError when it is the first."""
    def loan(self, size: int, timeout: float | None = None, wait: int = ADAPTIVE) -> Loan: ...
    def send_loan(
        self, loan: Loan, tag: int = 0, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> None: ...
    def receive(self, timeout: float | None = None, wait: int = ADAPTIVE) -> Payload:
        """Receive one message without copying it; release the payload (or leave its `with`) to give the memory
        back."""
    def unread(self, count: int) -> None:
        """Put back the last `count` messages received in this poll (server's end in a `Ledger` only): they
        come again."""
    def room(self) -> int:
        """Messages of any inline size that are sure to fit now (0 marks this end as waiting for room, see
        `Poller`)."""
    def arm_recv(self) -> bool:
        """Ask for the eventfd `recv_fd` to be rung by the next message. False: there is something now, do not
        wait."""
    def arm_send(self) -> bool:
        """The same for room to send, on the same eventfd."""
    def fileno(self) -> int:
        """This end's eventfd."""
    def drain_bell(self) -> None: ...
    def check(self) -> None:
        """Raise the error of the channel's state (RevokedError, PeerGoneError, FaultedError, ClosedError), if any."""
    def close(self) -> None:
        """Unmap; idempotent. Loans and payloads that are still held keep their memory mapped."""
    def abandon(self) -> None:
        """Close, and end the channel, which in a `Ledger` would outlive this end: nobody is left to serve it."""
    @property
    def arena(self) -> memoryview | None:
        """All of the arena, writable; None without one. It stays mapped as long as there is a view of it."""
    @property
    def closed(self) -> bool: ...
    @property
    def state(self) -> str:
        """open, paused, moved, revoked, gone, faulted or closed."""
    @property
    def fault(self) -> str:
        """Why the channel is faulted; empty otherwise."""
    @property
    def stats(self) -> dict[str, int]:
        """sent, received, sent_bytes, received_bytes, bells (rung at the other end), loans_out (not back yet)."""

@final
class Loan(Buffer):
    """Writable memory of the channel's pool: fill it, then `send_loan`. Leaving `with` unsent gives it back."""

    @property
    def view(self) -> memoryview: ...
    def release(self) -> None: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

@final
class Payload(Buffer):
    """A received message in place, read-only. After `release()` its `view` raises, and so does taking a new one;
    arrays already made from it stay valid: the memory goes back to the sender when the last of them is gone."""

    @property
    def tag(self) -> int: ...
    @property
    def view(self) -> memoryview: ...
    def release(self) -> None: ...
    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

class ChannelControl:
    """The kernel's hold on a channel: header, state word, doorbells. Never touches messages."""

    def __new__(cls, ring_fd: int, slots: int, bells: tuple[int, int]) -> Self: ...
    def init(self, channel: int, generation: int) -> None: ...
    def set_state(self, state: str, reason: str = "") -> None:
        """Write the state word (open, paused, moved, revoked, gone, faulted) and wake both ends."""
    @property
    def state(self) -> str: ...
    def longest_wait(self) -> int:
        """ns that the client's end waited for a message at the longest since `clear_longest_wait`; 0: never
        for long."""
    def clear_longest_wait(self) -> None: ...
    def depth(self) -> tuple[int, int]:
        """Descriptors waiting (to the server, to the client), as the indices claim; -1 when they are absurd."""
    def close(self) -> None: ...

class Gate:
    """The kernel's page of gate words for one module: one line per channel, mapped read-only by the module."""

    LINES: Final[int]
    BYTES: Final[int]
    def __new__(cls, fd: int) -> Self: ...
    def open(self, index: int, generation: int) -> None: ...
    def shut(self, index: int) -> None: ...
    def close(self) -> None: ...

class Poller:
    """Waits for any of many server endpoints (epoll over their eventfds, armed-flag protocol)."""

    def __new__(cls) -> Self: ...
    def add(self, endpoint: Endpoint, room: bool = False) -> None:
        """Wait for messages on `endpoint` (of either role), or, with `room`, for the peer to give back descriptors or
        pool memory after a send that did not fit, whatever messages wait meanwhile. Adding again changes `room`."""
    def remove(self, endpoint: Endpoint) -> None: ...
    def wait(self, timeout: float | None = None, wait: int = ADAPTIVE) -> bool:
        """True when some endpoint may have work or changed state, or after `wake()`; False when the timeout
        passed."""
    def wake(self) -> None:
        """End the current or the next wait, from any thread."""
    def close(self) -> None: ...

class StatsPage:
    """Engine statistics in shared memory under a seqlock: `LINES` records, written by the module, read by anyone."""

    LINES: Final[int]
    BYTES: Final[int]
    def __new__(cls, fd: int, writable: bool) -> Self: ...
    def read(self, index: int) -> dict[str, int]:
        """polls, work, busy_ns, heartbeat_ns, channels, delay histogram (delay_0 .. delay_15); retries when torn."""
    def write(self, index: int, *, polls: int, work: int, busy_ns: int, channels: int) -> None:
        """Publish a record of a Python engine, stamping the heartbeat (CLOCK_MONOTONIC ns)."""
    def close(self) -> None: ...

ObjectSpec = tuple[str, str, int, int, int, str]
"""kind (table, slab, array), name, key bytes (tables only, else 0), item bytes, count, fields (JSON, for
inspection)."""

class State:
    """An engine's state segment. Mutations belong to the poll under way until `Ledger.commit` (or `commit`)
    makes them permanent, all at once; a process that dies before leaves what was there after the last commit.
    One thread at a time. Opening checks magic, layout, header and directory. Raises StateDamagedError,
    SchemaError (layout), ResourceError."""

    MIN_BYTES: Final[int]
    def __new__(cls, fd: int, writable: bool = True) -> Self: ...
    @staticmethod
    def blank(fd: int) -> bool:
        """Nothing was ever written to this segment."""
    @staticmethod
    def format(
        fd: int,
        engine: str,
        schema: str,
        version: int,
        oldest: int,
        objects: Sequence[ObjectSpec],
        log_bytes: int | None = None,
    ) -> None:
        """Lay out a blank segment; its size is the descriptor's. `log_bytes` is what one poll may overwrite; None: a
        sixteenth of the segment if that fits, and at least 1 MiB. Raises StateFullError when the objects do not
        fit."""
    @property
    def header(self) -> dict[str, Any]:
        """engine, schema, version, oldest, generation, owner, phase, epoch, adoptions, last_poll_ns, first_poll_ns,
        tracking, used_bytes, size, objects (list of dicts: kind, name, key, item, count, fields, used)."""
    @property
    def phase(self) -> str:
        """blank, building (a migration fills it), serving, retired (its successor is another segment), poisoned."""
    def set_phase(self, phase: str) -> None: ...
    def verify(self) -> list[str]:
        """Check every checksum and link; what is wrong, in words (at most 16). Blocks that change meanwhile
        are looked at again, so that a segment in use can be verified by another process."""
    def recover(self) -> int:
        """Roll back the unfinished poll of a process that died; words undone. Raises StateDamagedError."""
    def commit(self) -> None:
        """Make what was written permanent (without channels: tests, tools; engines commit by their `Ledger`)."""
    def abort(self) -> int:
        """Take back what was written since the last commit."""
    def table(self, name: str) -> StateTable: ...
    def slab(self, name: str) -> StateSlab: ...
    def array(self, name: str) -> StateArray: ...
    def save(self, snapshot: bytes) -> None:
        """Store the engine's snapshot (at most 64 KiB), double-buffered and checksummed; part of the next commit."""
    def saved(self) -> bytes: ...
    def track(self, on: bool) -> None:
        """Ask the engine (in another process) to mark what it changes; it acknowledges at its next poll boundary."""
    def tracked(self) -> bool:
        """The engine has acknowledged the last `track`."""
    def copy_to(self, fd: int) -> int:
        """Copy the used bytes to another segment of at least that size (a checkpoint); bytes copied."""
    def close(self) -> None: ...

class StateTable:
    """Hash table of fixed-size keys and rows. A row keeps its slot for its life; slots are what is marked dirty."""

    key: Final[int]
    item: Final[int]
    count: Final[int]
    slot: Final[int]
    """Bytes of a slot: 8 (crc32c u32, state u32: 1 is live), key, row, rounded up to 8."""
    def __len__(self) -> int: ...
    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, row: bytes) -> None:
        """Insert or replace. Raises StateFullError."""
    def delete(self, key: bytes) -> bool: ...
    def get_packed(self, keys: Buffer, rows: Buffer, found: Buffer) -> int:
        """For each packed key: its row into `rows`, 1 or 0 into `found` (bytes). How many were found."""
    def put_packed(self, keys: Buffer, rows: Buffer) -> None: ...
    def delete_packed(self, keys: Buffer) -> int: ...
    def slots(self, start: int, out: Buffer) -> int:
        """Copy slots from `start` on into `out`; how many. Another process may be changing them: check crc and
        state."""
    def gather(self, slots: Buffer, out: Buffer) -> None:
        """Copy the slots whose numbers (u64) are given."""
    def take_dirty(self) -> bytes:
        """Numbers (packed u64) of the slots changed since the last call, under tracking."""
    def view(self) -> memoryview:
        """All slots, read-only, no copy."""

class StateSlab:
    """Fixed-size items under stable numbers."""

    item: Final[int]
    count: Final[int]
    def __len__(self) -> int: ...
    def allocate(self) -> int:
        """The number of a zeroed item. Raises StateFullError."""
    def free(self, index: int) -> None: ...
    def read(self, index: int) -> bytes: ...
    def write(self, index: int, data: bytes, offset: int = 0) -> None: ...
    def live(self) -> bytes:
        """Numbers (packed u64) of the items in use."""
    def take_dirty(self) -> bytes: ...
    def view(self) -> memoryview: ...
    def put_at(self, index: int, data: bytes) -> None:
        """For migrations: make item `index` live with these bytes."""

class StateArray:
    """`count` items in one piece. `per_block` items share a checksum and a dirty mark."""

    item: Final[int]
    count: Final[int]
    per_block: Final[int]
    def view(self) -> memoryview:
        """Read-only, no copy."""
    def read(self, start: int, count: int) -> bytes: ...
    def write(self, start: int, data: Buffer) -> None:
        """Write whole items from `start` on. Raises StateFullError when it is more than the undo log holds."""
    def edit(self, start: int, count: int) -> memoryview:
        """A writable view of these items, whose old bytes go to the undo log first. Checksums are made at the
        commit: do not keep the view beyond the poll."""
    def take_dirty(self) -> bytes:
        """Numbers (packed u64) of the blocks changed since the last call, under tracking."""

class Ownership:
    """A SysV semaphore (id `semaphore`, value 1 when free) taken with SEM_UNDO: the OS gives it back however
    we end."""

    def __new__(cls, semaphore: int) -> Self: ...
    def acquire(self, timeout: float | None = None) -> bool:
        """Wait with the GIL released; False when the timeout passed or `cancel` was called. Raises
        ResourceError when the semaphore was removed."""
    def release(self) -> None: ...
    def cancel(self) -> None:
        """End the wait of another thread within a few milliseconds."""
    @property
    def held(self) -> bool: ...

class Ledger:
    """Ties channels to a state: what was received, what was sent and what was written become permanent together.

    An endpoint that joined sends and gives back nothing before `commit`; a process that dies before that has, for its
    successor, not received those messages. Positions are kept per gate line in the state segment."""

    def __new__(cls, state: State) -> Self: ...
    def join(self, line: int, channel: int, endpoint: Endpoint) -> None:
        """A channel that this process may come to serve; nothing is touched before `take`, or at once after it."""
    def leave(self, line: int) -> None: ...
    def take(self, generation: int, source: State | None = None) -> int:
        """The caller has the ownership: roll back what its predecessor left unfinished (words undone), take
        every channel over where the last commit left it (of `source` after a migration, which is retired by
        this), publish again what was committed. Raises StateDamagedError; a channel whose memory was tampered
        with is faulted, others go on."""
    def commit(self) -> bool:
        """End of a poll: everything since the last one becomes permanent, then visible. True when there was
        anything."""
    def abort(self) -> int:
        """Take the poll back: state, messages received, messages sent."""
    def polled(self) -> None:
        """A whole poll has passed: the state did not kill its adopter. Acknowledges `State.track`."""
    def hand_over(self) -> int:
        """Last commit of a planned hand-over: stamps `last_poll_ns`, returned. Endpoints are idle until the
        next `take`."""

class Worker:
    """A native thread that runs one Rust engine on a `State` whenever it has the ownership."""

    def __new__(
        cls,
        name: str,
        engine: str,
        state: State,
        semaphore: int,
        generation: int,
        stats_fd: int = -1,
        stats_index: int = 0,
        budget: int = 64,
        wait: int = ADAPTIVE,
        source: State | None = None,
        finish: Callable[[], object] | None = None,
        channels: Sequence[tuple[int, Endpoint, int]] = (),
        fds: Sequence[int] = (),
    ) -> Self:
        """Begins to wait for ownership at once, with `channels` attached (see `attach`). `source`: see `Ledger.take`.
        `finish` is called once the ownership was got, on the engine's thread, before anything is taken over (the last
        rows of a migration); what it raises refuses the state. semaphore -1: none (tests, benchmarks).
        `fds` (sockets, say) are duplicated for the engine. Raises UsageError when it wants none."""
    def attach(self, channel: int, endpoint: Endpoint, line: int) -> None:
        """Move a server endpoint (consumed) to the engine through its mailbox, waiting or running."""
    def detach(self, channel: int) -> None: ...
    def control(self, request: bytes) -> bytes:
        """Have the engine answer a request between two polls. Raises NotRunningError when it does not run here, and
        what the engine raises."""
    def hand_over(self, retire: bool = False) -> None:
        """Let go at the next poll boundary, then wait for ownership again, or end."""
    def take_news(self) -> list[tuple[str, int, Any]]:
        """Since the last call: ("fault", channel, reason), ("took", first_poll_ns, {"last_poll_ns", "undone"}),
        ("yielded", last_poll_ns, None), ("refused", held, (code, message)) for state that cannot be adopted
        (held 0) or was found damaged in a poll (1: the ownership stays with the process), ("said", 0, bytes) for what
        the engine says of its own, ("ended", 0, error text or "")."""
    def fileno(self) -> int:
        """An eventfd that is rung when `take_news` has something."""
    @property
    def alive(self) -> bool: ...
    def stop(self, timeout: float = 1.0, last: bool = False) -> None:
        """`last`: nobody serves the channels after this, and they end."""

def engine_schema(engine: str) -> tuple[str, int, int, list[ObjectSpec]]:
    """Schema name, version, oldest readable version and objects of a native engine."""

def engine_convert(
    engine: str, name: str, from_version: int, to_version: int, old: Buffer, new: Buffer, count: int
) -> None:
    """Convert `count` packed rows of the object `name`; `new` is writable. Raises SchemaError, ValueError."""

def engines() -> list[str]: ...
def install_sigbus_guard() -> None:
    """Turn a SIGBUS in a mapped segment (its other user shrank it) into a fault of that channel. Done at import."""

def measure_line(cpu_a: int, cpu_b: int, rounds: int = 20000) -> float:
    """Median round trip of one cache line between two cores, in ns (the "near"/"far" of the machine)."""

def measure_check(endpoint: Endpoint, rounds: int = 1_000_000) -> float:
    """Mean cost of the checks done per message on this endpoint (gate, state, rights, descriptor), in ns."""
