"""Typed face of the Rust crate: see `dataplane/src/`."""

from collections.abc import Sequence
from typing import Final, Self, final

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

class Endpoint:
    """One end of a channel. Sending and receiving may each be used by one thread at a time.

    Descriptors are duplicated or mapped; the caller still owns (and closes) those it passes.
    `bells` are two eventfds: the first wakes the server, the second the client.
    `up_fd`/`down_fd` are the pools that the client and the server write payloads to; -1 where there is none.
    `rights`: bit 0 the client may send, bit 1 it may receive; each end holds the other to it.
    `gate_fd`/`gate_index` (server only, else -1): the module's gate page and this channel's line in it.
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
        """Receive one message without copying it; release the payload (or leave its `with`) to give the memory back."""
    def room(self) -> int:
        """Messages of any inline size that are sure to fit now (0 marks this end as waiting for room, see `Poller`)."""
    def arm_recv(self) -> bool:
        """Ask for the eventfd `recv_fd` to be rung by the next message. False: there is something now, do not wait."""
    def arm_send(self) -> bool:
        """The same for room to send, on the same eventfd."""
    def fileno(self) -> int:
        """This end's eventfd."""
    def drain_bell(self) -> None: ...
    def check(self) -> None:
        """Raise the error of the channel's state (RevokedError, PeerGoneError, FaultedError, ClosedError), if any."""
    def close(self) -> None:
        """Unmap; idempotent. Loans and payloads that are still held keep their memory mapped."""
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
        """True when some endpoint may have work or changed state, or after `wake()`; False when the timeout passed."""
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

class Worker:
    """A native thread that runs one Rust engine (`engine` names it, e.g. "echo")."""

    def __new__(
        cls,
        name: str,
        engine: str,
        stats_fd: int = -1,
        stats_index: int = 0,
        budget: int = 64,
        wait: int = ADAPTIVE,
    ) -> Self: ...
    def attach(self, channel: int, endpoint: Endpoint) -> None:
        """Move a server endpoint (consumed) into the engine through its mailbox."""
    def detach(self, channel: int) -> None: ...
    def take_faults(self) -> list[tuple[int, str]]:
        """Channels that the engine dropped since the last call, with the reason."""
    def fileno(self) -> int:
        """An eventfd that is rung when `take_faults` has news or the engine died."""
    @property
    def alive(self) -> bool: ...
    def stop(self, timeout: float = 1.0) -> None: ...

def engines() -> list[str]: ...
def install_sigbus_guard() -> None:
    """Turn a SIGBUS in a mapped segment (its other user shrank it) into a fault of that channel. Done at import."""

def measure_line(cpu_a: int, cpu_b: int, rounds: int = 20000) -> float:
    """Median round trip of one cache line between two cores, in ns (the "near"/"far" of the machine)."""

def measure_check(endpoint: Endpoint, rounds: int = 1_000_000) -> float:
    """Mean cost of the checks done per message on this endpoint (gate, state, rights, descriptor), in ns."""
