"""How two hosts agree on a pair of flows: messages, what follows from them, and which of two set-ups goes on.

No socket and no clock: bytes come in, decisions go out. The way of it, inside of TLS, one line of JSON each:

    who dials                            who listens
    Hello  ---------------------------->
           <----------------------------  Hello, or Refusal
    (attaches) Go  -------------------->  (attaches)

The third line is what lets a dialer give up a set-up that another one has overtaken: without it nothing has happened.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

from snap.dataplane.errors import SnapError

from .config import HostName

MOST: Final = 4096
"""Bytes of the longest line."""

SMALLEST_MTU: Final = 508
"""Bytes of UDP payload that every path of IPv4 carries."""

LARGEST_MTU: Final = 9000 - 28
ENCRYPTION: Final = "encryption"
FEATURES: Final = (ENCRYPTION,)
SECRET_BYTES: Final = 32
KEY_BYTES: Final = 32
MACHINE: Final = "machine-"
"""How the feature begins that says which machine a host runs on: those of one may have a wire of shared memory."""

WIRE_BYTES: Final = 32


class Reason(StrEnum):
    UNKNOWN = "unknown host"
    UNREACHABLE = "cannot connect"
    UNAUTHENTICATED = "not authenticated"
    VERSION = "no common version"
    ENCRYPTION = "encryption refused"
    PROTOCOL = "not understood"
    TIMEOUT = "no answer in time"
    CROSSED = "crossed"
    ENGINE = "the engine refused"


class SetupError(SnapError):
    """Two hosts did not come together; `reason` is the kind of it, the message begins with it."""

    code = "pony_setup"

    def __init__(self, reason: Reason, detail: str, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}", hint)
        self.reason, self.detail = reason, detail


class Hello(msgspec.Struct, frozen=True, tag_field="is", tag="hello"):
    """What one side is and can do. `mtu`: bytes of UDP payload. `secret`: random bytes of its own, in hexadecimal.
    `address`: where to send UDP to, "" for the other end of this connection. `wire`: how a host of the
    same machine gets the wire that the one who listens offers, "" for none."""

    name: HostName
    to: HostName
    versions: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]], msgspec.Meta(max_length=32)]
    mtu: Annotated[int, msgspec.Meta(ge=SMALLEST_MTU, le=65535)]
    flow: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    encrypt: bool
    secret: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    address: Annotated[str, msgspec.Meta(max_length=64)] = ""
    wire: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    features: Annotated[list[Annotated[str, msgspec.Meta(max_length=32)]], msgspec.Meta(max_length=32)] = (
        msgspec.field(default_factory=list)
    )


class Refusal(msgspec.Struct, frozen=True, tag_field="is", tag="refusal"):
    reason: Reason
    detail: Annotated[str, msgspec.Meta(max_length=400)] = ""


class Go(msgspec.Struct, frozen=True, tag_field="is", tag="go"):
    """`wire`: packets go by the one that was offered."""

    wire: bool = False


Message = Hello | Refusal | Go

_DECODER: Final[msgspec.json.Decoder[Message]] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    return msgspec.json.encode(message) + b"\n"


class Reader:
    """Messages out of a stream of bytes that a stranger writes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Message | None:
        """What `data` completes, if anything. Raises SetupError for what is no message, for more than one, and for a
        line that is too long."""
        self._rest += data
        line, end, rest = self._rest.partition(b"\n")
        if len(line) > MOST or rest:
            raise SetupError(Reason.PROTOCOL, "it says more than it should")
        if not end:
            return None
        self._rest = b""
        try:
            return _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SetupError(Reason.PROTOCOL, str(error)[:200]) from None


@dataclass(frozen=True)
class Keys:
    """Of the two directions, as one side sees them."""

    send: bytes
    receive: bytes


@dataclass(frozen=True)
class Agreed:
    """The same at both sides, but for the keys' directions, and `remote` and `address`, which are the other's."""

    host: str
    remote: int
    address: str
    version: int
    mtu: int
    keys: Keys | None


def check(own: Hello, theirs: Message, shown: str) -> Hello:
    """`theirs` if that is a greeting of the host `shown` (by its certificate) to us. Raises SetupError, with its reason
    if it refused."""
    if isinstance(theirs, Refusal):
        raise SetupError(theirs.reason, f"{shown} says: {theirs.detail}")
    if not isinstance(theirs, Hello):
        raise SetupError(Reason.PROTOCOL, f"{shown} began with something else than a greeting")
    if theirs.name == own.name:
        # The keys of the two directions differ by the names.
        raise SetupError(Reason.UNAUTHENTICATED, f"both hosts say that they are {own.name}")
    if theirs.name != shown:
        raise SetupError(
            Reason.UNAUTHENTICATED,
            f"the certificate is that of {shown}, but it says that it is {theirs.name}",
        )
    if theirs.to != own.name:
        raise SetupError(Reason.UNKNOWN, f"{shown} looks for {theirs.to}, and this is {own.name}")
    return theirs


def agree(own: Hello, theirs: Hello, seen: str) -> Agreed:
    """What both sides conclude. `seen`: the address of the other end of the connection. Raises SetupError."""
    common = set(own.versions) & set(theirs.versions)
    if not common:
        raise SetupError(
            Reason.VERSION, f"{own.name} speaks {_list(own.versions)}, {theirs.name} {_list(theirs.versions)}"
        )
    version = max(common)
    keys = None
    if own.encrypt or theirs.encrypt:
        for side in (own, theirs):
            if ENCRYPTION not in side.features or not side.secret:
                raise SetupError(
                    Reason.ENCRYPTION, f"{side.name} cannot encrypt, and the other side requires it"
                )
        keys = derive(own, theirs, version)
    try:
        address = ipaddress.ip_address(theirs.address or seen)
    except ValueError:
        raise SetupError(Reason.PROTOCOL, f"{theirs.address!r} is no address") from None
    if address.version != ipaddress.ip_address(seen).version:
        raise SetupError(Reason.PROTOCOL, f"{address} is not of the family of {seen}")
    place = f"[{address}]" if address.version == 6 else str(address)
    mtu = min(own.mtu, theirs.mtu, LARGEST_MTU)
    return Agreed(theirs.name, theirs.flow, f"{place}:{theirs.port}", version, mtu, keys)


def one_machine(own: Hello, theirs: Hello) -> bool:
    """Both hosts say that they run on the same one."""
    return any(each.startswith(MACHINE) for each in {*own.features} & {*theirs.features})


def derive(own: Hello, theirs: Hello, version: int) -> Keys:
    """A key for each direction, from the secrets of both."""
    first, second = sorted((own, theirs), key=lambda side: side.name)
    material = bytes.fromhex(first.secret + second.secret)

    def key(sender: Hello, receiver: Hello) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = f"snap pony {version} {sender.name}>{receiver.name}".encode()
        return HKDF(SHA256(), KEY_BYTES, None, info).derive(material)

    return Keys(send=key(own, theirs), receive=key(theirs, own))


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


# -- two set-ups at once ----------------------------------------------------------------------------------------


class Turn:
    """One set-up with a peer, seen from one side."""

    def __init__(self, kind: Literal["dials", "answers"]) -> None:
        self.kind = kind
        self.offered = False
        """A dialer that has greeted."""


class Meeting:
    """The one set-up with a peer that counts, at this side. A later one replaces it; but of two that cross, each
    greeted by its dialer, both sides take the one of the host whose name is smaller."""

    def __init__(self, own: str, host: str) -> None:
        self._first = own < host
        self._turn: Turn | None = None

    def dial(self) -> Turn | None:
        """None: there is a set-up under way already."""
        if self._turn is not None:
            return None
        self._turn = Turn("dials")
        return self._turn

    def offer(self, turn: Turn) -> bool:
        """May `turn` greet? Not when the peer was faster."""
        turn.offered = self.holds(turn)
        return turn.offered

    def hear(self) -> Turn | None:
        """The peer greets. None: our own greeting goes on, and the peer lets its own go."""
        if self._turn is not None and self._turn.offered and self._first:
            return None
        self._turn = Turn("answers")
        return self._turn

    def holds(self, turn: Turn) -> bool:
        """`turn` was not replaced, and may attach."""
        return self._turn is turn

    def end(self, turn: Turn) -> None:
        if self._turn is turn:
            self._turn = None

    @property
    def busy(self) -> bool:
        return self._turn is not None
