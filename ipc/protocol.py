"""What the kernel, modules, applications and operators say to each other: the one place that defines messages.

Three conversations, all msgpack by msgspec, a tagged union each way:

* *bootstrap* (SEQPACKET Unix socket `bootstrap.sock`): an application and the kernel; carries descriptors.
* *link* (SEQPACKET socketpair, inherited): a module and the kernel; the same requests, plus the kernel's orders.
* *control* (ZeroMQ ROUTER `control.sock`, PUB `events.sock`): operators and the kernel; no descriptors.

A message is one datagram of at most `MAX_MESSAGE` bytes (a principal's request: `MAX_REQUEST`; an answer of the
control plane: `MAX_CONTROL`); descriptors ride with the datagram that names them in the order that its class
states. Everything received is hostile until decoded: decoding errors are `ProtocolError` at the receiver, who
answers with `Failure` where it still can.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import msgspec

from snap.dataplane.errors import ProtocolError, SnapError, from_code

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE: Final = 64 * 1024
MAX_REQUEST: Final = 4 * 1024
MAX_CONTROL: Final = 16 * 1024 * 1024
MAX_FDS: Final = 64


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag=True, forbid_unknown_fields=True):
    """Base of bootstrap and link messages. `seq` pairs an answer with its request; 0 is unsolicited."""

    seq: int = 0


# -- requests of a principal (application or module) to the kernel ------------------------------------------


class Hello(Message, frozen=True):
    """First message of an application: who it says it is is only a label, identity is SO_PEERCRED."""

    version: int
    name: str = ""


class Lookup(Message, frozen=True):
    """Ask for a handle on a service. Policy decides the rights; answered by `Found` or `Failure`."""

    service: str


class Open(Message, frozen=True):
    """Open a channel to the service behind `handle`; `wait` seconds for the service to be ready.

    Sizes are wishes: 0 means the default, and no arena. `slots` is a power of two. Answered by `Opened` with
    descriptors.
    """

    handle: int
    slots: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    arena_bytes: int = 0
    wait: float = 0.0


class Mapped(Message, frozen=True):
    """The opener has mapped (and sealed) its side of `channel`; the kernel may now hand the rest to the provider.
    Answered by `Ready` when the provider has attached it."""

    channel: int


class CloseChannel(Message, frozen=True):
    channel: int


class ListCaps(Message, frozen=True):
    """Own handles, answered by `Caps`."""


class Attenuate(Message, frozen=True):
    """Derive a new handle with `rights` (a subset, else DeniedError), optionally expiring after `expires` seconds."""

    handle: int
    rights: list[str]
    expires: float | None = None


class Copy(Message, frozen=True):
    """A second handle with the same rights (needs the right `copy`)."""

    handle: int


class Delegate(Message, frozen=True):
    """Give `to` (a principal id) a copy (needs `delegate`) or, with `move`, the handle itself (needs `move`)."""

    handle: int
    to: str
    rights: list[str] | None = None
    move: bool = False


class Revoke(Message, frozen=True):
    """Revoke everything derived from `handle`, and the handle itself when `itself`."""

    handle: int
    itself: bool = True


# -- answers ------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    principal: str
    kernel_pid: int
    version: int = PROTOCOL_VERSION


class Adopted(Message, frozen=True):
    """Unsolicited: another kernel process serves this connection from now on. What had no answer may have been lost
    with the one before: ask again, with the same numbers, and expect that an answer comes twice."""

    kernel_pid: int


class Found(Message, frozen=True):
    handle: int
    rights: list[str]
    ready: bool


class Opened(Message, frozen=True):
    """Descriptors, in order: ring, up, down, server bell, client bell, and the arena if there is one. `seal_up`: map
    `up` writable, then seal it."""

    channel: int
    generation: int
    slots: int
    up_bytes: int
    down_bytes: int
    arena_bytes: int
    rights: list[str]
    backend: str
    seal_up: bool = False


class Ready(Message, frozen=True):
    channel: int


class Caps(Message, frozen=True):
    caps: list[CapView]


class Done(Message, frozen=True):
    """Success; `handle` where the request made one."""

    handle: int | None = None


class Failure(Message, frozen=True):
    code: str
    message: str
    hint: str = ""

    def error(self) -> SnapError:
        return from_code(self.code, self.message, self.hint)


# -- kernel to module (link) --------------------------------------------------------------------------------


class Configure(Message, frozen=True):
    """First order to a fresh module process. `manifest` is the parsed module.toml. fds: gate, stats, then one
    for each name in `kept` (what an earlier generation gave the kernel to keep). Answered by `Loaded`, in time."""

    name: str
    generation: int
    manifest: dict[str, Any]
    path: str
    kept: list[str] = []


class Prepare(Message, frozen=True):
    """Make `engine` ready to run on the state in fds[0], a segment that is either blank (format it), or of the
    engine's schema version (adopt it), or blank with fds[1], a segment of another version, to migrate from.
    Then wait for ownership: the SysV semaphore `semaphore` (an id). Answered by `Progress`..., then `Prepared`
    or `Refused`; `Took` follows when the semaphore was got. Sent again to a generation that waits, it replaces
    what it waits with."""

    engine: str
    semaphore: int


class Yield(Message, frozen=True):
    """Let `engine` go at its next poll boundary: last commit, snapshot, release the semaphore, wait for it
    again unless `retire` (then the engine ends in this process). Answered by `Yielded`."""

    engine: str
    retire: bool = False


class Check(Message, frozen=True):
    """How does the module find itself? Answered by `Health`."""


class Report(Message, frozen=True):
    """A kernel that took over asks for all that this process holds. Answered by `Holding`."""


class Attach(Message, frozen=True):
    """A client's channel to serve with `engine`. fds: ring, up, down, server bell, client bell, the arena if there is
    one. `badge` names the caller and comes from the kernel alone. Answered by `Attached` or `Failure`."""

    channel: int
    generation: int
    service: str
    engine: str
    badge: str
    rights: list[str]
    slots: int
    up_bytes: int
    down_bytes: int
    gate_index: int
    arena_bytes: int


class Detach(Message, frozen=True):
    """Unmap `channel`: it was revoked, closed, or its client is gone."""

    channel: int
    reason: str = ""


class Stop(Message, frozen=True):
    """Finish within `grace` seconds, then exit 0."""

    grace: float = 5.0


# -- module to kernel (link) --------------------------------------------------------------------------------


class Started(Message, frozen=True):
    """The process runs and has read `Configure`; nothing of the module is imported yet."""

    pid: int


class StateSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine's code says of its state: `version` is written, `oldest` the oldest that it can migrate from."""

    name: str
    version: int
    oldest: int


class Loaded(Message, frozen=True):
    """Imported, engines built, nothing polls: `Attach` and `Prepare` may come. Schemas by engine."""

    schemas: dict[str, StateSchema]


class Progress(Message, frozen=True):
    """Of a preparation: `stage` is format, verify, map, convert (rounds of a migration) or restore; in items."""

    engine: str
    stage: str
    done: int
    total: int
    round: int = 0


class Prepared(Message, frozen=True):
    """`engine` waits for ownership. `migrated` items were converted in `rounds`; `left` were dirty at the last
    look."""

    engine: str
    migrated: int = 0
    rounds: int = 0
    left: int = 0


class Refused(Message, frozen=True):
    """The state given to `engine` cannot be adopted: `code` is state_damaged, schema, or of another error. `held`: it
    was, and was found damaged in a poll; the engine has stopped, and its ownership is kept until the process ends."""

    engine: str
    code: str
    message: str
    held: bool = False


class Took(Message, frozen=True):
    """`engine` polls here now. Times are CLOCK_MONOTONIC: the last poll of who had it before (0: nobody), and
    the first one here. `undone` words of an unfinished poll were rolled back; `converted` items were migrated
    in the blackout."""

    engine: str
    last_poll_ns: int
    first_poll_ns: int
    undone: int = 0
    converted: int = 0


class Yielded(Message, frozen=True):
    engine: str
    last_poll_ns: int


class Health(Message, frozen=True):
    """Empty `reason`: well."""

    reason: str = ""


class Holding(Message, frozen=True):
    """Answer to `Report`. `engines` by name: loading, prepared, running or ended; `channels` by id: generation."""

    name: str
    generation: int
    pid: int
    engines: dict[str, str]
    channels: dict[int, int]


class Keep(Message, frozen=True):
    """Keep fds[0] as `name` for the generations to come; without a descriptor: forget it."""

    name: str


class Serving(Message, frozen=True):
    """Every engine polls here: the module is ready."""

    engines: list[str]


class Attached(Message, frozen=True):
    channel: int


class Dropped(Message, frozen=True):
    """An engine dropped a channel, with the reason (a fault of the client, in general)."""

    channel: int
    reason: str


class Broken(Message, frozen=True):
    """The module cannot go on; `stage` is import, start, or run. The process exits after it."""

    stage: str
    error: str
    traceback: str = ""


# -- control (ZeroMQ) ---------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`key` makes a mutating request idempotent: the same key gets the first answer again. `timeout` in seconds."""

    key: str
    op: str
    args: dict[str, Any] = {}
    timeout: float = 10.0


class Response(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    ok: bool
    result: Any = None
    code: str = ""
    message: str = ""
    hint: str = ""


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """`seq` counts from 1 without gaps per kernel; `time` is Unix seconds; `kind` is dotted, e.g. `module.ready`."""

    seq: int
    time: float
    kind: str
    subject: str
    data: dict[str, Any] = {}


class UpgradeEngineView(msgspec.Struct, frozen=True, kw_only=True):
    """`stage`: waiting, format, verify, map, convert, restore, prepared, flipped or returned. `blackout_ns`
    from the last poll of one generation, or its death, to the first of the other; -1 when it has not flipped.
    `converted`: in the blackout."""

    name: str
    stage: str = "waiting"
    done: int = 0
    total: int = 0
    rounds: int = 0
    migrated: int = 0
    converted: int = 0
    blackout_ns: int = -1


class UpgradeView(msgspec.Struct, frozen=True, kw_only=True):
    """`kind`: upgrade, rollback, recovery (a crash) or kernel. `phase`: queued, brownout, blackout, bake, done.
    `outcome`: "" while it runs, committed, rolled_back, or aborted (before any engine moved); of a recovery
    recovered or given_up (no process serves again). `client_gap_ns`: the longest that a client waited for a
    completion meanwhile, as its own end of the channel measured; -1 when none waited. Times in Unix seconds."""

    id: int
    module: str
    kind: str
    phase: str
    outcome: str
    reason: str
    from_version: str
    to_version: str
    from_generation: int
    to_generation: int
    from_path: str
    to_path: str
    started: float
    finished: float | None = None
    brownout_seconds: float = 0.0
    bake_seconds: float = 0.0
    client_gap_ns: int = -1
    engines: list[UpgradeEngineView] = []


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    polls: int = 0
    work: int = 0
    busy_ns: int = 0
    heartbeat_age_ns: int = -1
    channels: int = 0


class ModuleView(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: stopped, starting, ready, stopping, backoff, failed (crash loop or permanent). Times in Unix seconds.
    `cause` says in words why it is in that state; `faults`, `restarts` and `generation` are counted apart.
    `standby`: none (empty), starting, ready. `upgrade`: the id of the one that runs. `state_bytes`: memory
    that state segments take."""

    name: str
    version: str
    state: str
    cause: str
    pid: int | None
    generation: int
    restarts: int
    faults: int
    since: float
    path: str
    provides: list[str]
    requires: list[str]
    engines: list[EngineView] = []
    log_tail: list[str] = []
    sandbox: list[dict[str, str]] = []
    memory_bytes: int | None = None
    standby: str = ""
    upgrade: int | None = None
    state_bytes: int = 0


class CapView(msgspec.Struct, frozen=True, kw_only=True):
    """`id` is global and only for inspection; `handle` is the number in the owner's own table."""

    id: int
    handle: int
    object: str
    rights: list[str]
    badge: str
    owner: str
    parent: int | None
    expires: float | None
    rule: str


class ChannelView(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    service: str
    module: str
    client: str
    state: str
    generation: int
    cap: int
    slots: int
    up_bytes: int
    down_bytes: int
    arena_bytes: int
    depth_up: int
    depth_down: int
    since: float
    read_only: str


class KernelView(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    version: str
    runtime_dir: str
    started: float
    uid: int
    policy: str
    modules: list[ModuleView]
    channels: int
    principals: int
    capabilities: int
    events: dict[str, int]


FromPrincipal = (
    Hello | Lookup | Open | Mapped | CloseChannel | ListCaps | Attenuate | Copy | Delegate | Revoke
)
FromModule = (
    Lookup
    | Open
    | Mapped
    | CloseChannel
    | ListCaps
    | Attenuate
    | Copy
    | Delegate
    | Revoke
    | Started
    | Loaded
    | Progress
    | Prepared
    | Refused
    | Took
    | Yielded
    | Health
    | Holding
    | Keep
    | Serving
    | Attached
    | Dropped
    | Broken
    | Failure
)
ToPrincipal = Welcome | Adopted | Found | Opened | Ready | Caps | Done | Failure
ToModule = (
    Configure
    | Prepare
    | Yield
    | Check
    | Report
    | Attach
    | Detach
    | Stop
    | Found
    | Opened
    | Ready
    | Caps
    | Done
    | Failure
)

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct, limit: int = MAX_MESSAGE) -> bytes:
    """Encode any message of this file. Raises ProtocolError when it is larger than `limit` bytes."""
    data = _encoder.encode(message)
    if len(data) > limit:
        raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes exceeds {limit}")
    return data


T = TypeVar("T")


class Decoder(Generic[T]):
    """Decodes one direction of a conversation; `kinds` is one of the unions above or a single struct type."""

    def __init__(self, kinds: Any, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kinds)

    def decode(self, data: bytes) -> T:
        """Raises ProtocolError, naming what is wrong."""
        if len(data) > self._limit:
            raise ProtocolError(f"message of {len(data)} bytes exceeds {self._limit}")
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ProtocolError(f"message cannot be decoded: {error}") from error
