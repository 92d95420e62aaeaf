//! What applications and the engine say to each other over a channel: commands up, completions down.
//!
//! A command is `kind u8 | flags u8 | stream u16 | connection u32`, then what its kind needs; all little endian. The
//! message's tag is the application's name for the operation, and comes back with its completion, which is `kind u8 |
//! status u8 | stream u16 | connection u32 | value u64`, then data. Kinds from `EVENT` on were not asked for.

use std::fmt;

/// The longest name that can be bound.
pub const NAME: usize = 64;
/// Bytes before the data of a completion.
pub const ANSWER: usize = 16;
/// Bytes of a command before what its kind needs.
pub const HEAD: usize = 8;
/// Where an operation has no place in the arena: its data is in the message itself.
pub const INLINE: u64 = u64::MAX;
pub const EVENT: u8 = 0x80;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Bind = 1,
    Connect = 2,
    Close = 3,
    Send = 4,
    SendArena = 5,
    Post = 6,
    Register = 7,
    Release = 8,
    Read = 9,
    Write = 10,
    CompareSwap = 11,
    FetchAdd = 12,
    Indirect = 13,
    Scan = 14,
    Reads = 15,
    Writes = 16,
    Indirects = 17,
    SendDatagram = 18,
    Connected = EVENT | 1,
    Message = EVENT | 2,
    Posted = EVENT | 3,
    Closed = EVENT | 4,
    Datagram = EVENT | 5,
}

impl Kind {
    pub fn of(byte: u8) -> Option<Kind> {
        use Kind::*;
        const ALL: [Kind; 23] = [
            Bind,
            Connect,
            Close,
            Send,
            SendArena,
            Post,
            Register,
            Release,
            Read,
            Write,
            CompareSwap,
            FetchAdd,
            Indirect,
            Scan,
            Reads,
            Writes,
            Indirects,
            SendDatagram,
            Connected,
            Message,
            Posted,
            Closed,
            Datagram,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    /// The command itself cannot be understood.
    Bad = 1,
    NoConnection = 2,
    NoRegion = 3,
    Revoked = 4,
    OutOfRange = 5,
    Denied = 6,
    /// The message is longer than what was posted for it.
    TooLong = 7,
    /// Nobody is bound to that name.
    NoPeer = 8,
    Unreachable = 9,
    Closed = 10,
    /// More is under way than is allowed.
    Full = 11,
    /// A scan found nothing.
    NoMatch = 12,
    Taken = 13,
    Misaligned = 14,
}

impl Status {
    pub fn of(byte: u8) -> Option<Status> {
        use Status::*;
        const ALL: [Status; 15] = [
            Ok,
            Bad,
            NoConnection,
            NoRegion,
            Revoked,
            OutOfRange,
            Denied,
            TooLong,
            NoPeer,
            Unreachable,
            Closed,
            Full,
            NoMatch,
            Taken,
            Misaligned,
        ];
        ALL.get(usize::from(byte)).copied()
    }
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Status::Ok => "ok",
            Status::Bad => "not a command",
            Status::NoConnection => "no such connection",
            Status::NoRegion => "no such region",
            Status::Revoked => "the region was revoked",
            Status::OutOfRange => "outside of the region",
            Status::Denied => "the region does not allow it",
            Status::TooLong => "longer than what was posted",
            Status::NoPeer => "nobody is bound to that name",
            Status::Unreachable => "the host cannot be reached",
            Status::Closed => "the peer closed the connection",
            Status::Full => "too much is under way",
            Status::NoMatch => "nothing matches",
            Status::Taken => "the name is taken",
            Status::Misaligned => "not aligned to 8 bytes",
        })
    }
}

pub const READ: u32 = 1;
pub const WRITE: u32 = 2;
pub const ATOMIC: u32 = 4;

/// A region as an application names it: its number, and a key that changes when the number is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    pub id: u32,
    pub key: u32,
}

impl Handle {
    pub fn of(word: u64) -> Handle {
        Handle { id: word as u32, key: (word >> 32) as u32 }
    }

    pub fn word(self) -> u64 {
        u64::from(self.id) | u64::from(self.key) << 32
    }
}

/// A piece of an arena, as somebody claims it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub len: u64,
}

impl Piece {
    /// The range in a memory of `size` bytes, if it lies in it.
    pub fn within(self, size: u64) -> Option<std::ops::Range<usize>> {
        let end = self.offset.checked_add(self.len)?;
        (end <= size).then_some(self.offset as usize..end as usize)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub kind: Kind,
    pub stream: u16,
    pub connection: u32,
}

/// A request to somebody's memory, the same from an application and from another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access<'a> {
    Read {
        at: u64,
        len: u32,
    },
    Write {
        at: u64,
        bytes: &'a [u8],
    },
    CompareSwap {
        at: u64,
        expected: u64,
        desired: u64,
    },
    FetchAdd {
        at: u64,
        add: u64,
    },
    /// Entry `index` of a table in the region: where to read.
    Indirect {
        index: u64,
        len: u32,
    },
    Scan(Scan),
}

impl Access<'_> {
    /// The most bytes that it brings.
    pub fn brings(&self) -> u64 {
        match self {
            Access::Read { len, .. } | Access::Indirect { len, .. } | Access::Scan(Scan { len, .. }) => u64::from(*len),
            Access::Write { .. } | Access::CompareSwap { .. } | Access::FetchAdd { .. } => 0,
        }
    }
}

/// Entries of `stride` bytes from `at` on: the first whose word at 0 is `needle` has an indirection at `pointer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    pub at: u64,
    pub needle: u64,
    pub len: u32,
    pub entries: u16,
    pub stride: u16,
    pub pointer: u16,
}

/// Bytes of an indirection: region handle u64, offset u64, length u64.
pub const INDIRECTION: usize = 24;

/// Reads a message of a peer from its beginning.
pub struct Reader<'a> {
    bytes: &'a [u8],
}

/// The message ends too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short;

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let (first, rest) = self.bytes.split_first_chunk::<N>().ok_or(Short)?;
        self.bytes = rest;
        Ok(*first)
    }

    pub fn u8(&mut self) -> Result<u8, Short> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Result<u16, Short> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Short> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Short> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn handle(&mut self) -> Result<Handle, Short> {
        self.u64().map(Handle::of)
    }

    pub fn piece(&mut self) -> Result<Piece, Short> {
        Ok(Piece { offset: self.u64()?, len: self.u64()? })
    }

    /// Bytes with their length before them.
    pub fn long(&mut self) -> Result<&'a [u8], Short> {
        let len = self.u16()?;
        let (first, rest) = self.bytes.split_at_checked(usize::from(len)).ok_or(Short)?;
        self.bytes = rest;
        Ok(first)
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn rest(self) -> &'a [u8] {
        self.bytes
    }

    /// None for an unknown kind, and for the engine's own ones.
    pub fn head(&mut self) -> Result<Option<Head>, Short> {
        let (kind, _flags) = (self.u8()?, self.u8()?);
        let (stream, connection) = (self.u16()?, self.u32()?);
        Ok(Kind::of(kind).filter(|_| kind < EVENT).map(|kind| Head { kind, stream, connection }))
    }
}

/// An operation on somebody's memory that stands alone: what is wanted, where its result goes (an offset in the own
/// arena, or `INLINE`).
pub struct Single<'a> {
    pub region: Handle,
    pub into: u64,
    pub access: Access<'a>,
}

impl<'a> Single<'a> {
    /// What follows the head of a command of this kind. For a write from the arena `bytes` is empty, and the place
    /// `from` is given: None means that the bytes are in the message.
    pub fn parse(kind: Kind, mut reader: Reader<'a>) -> Result<(Single<'a>, Option<Piece>), Short> {
        let region = reader.handle()?;
        let mut from = None;
        let (into, access) = match kind {
            Kind::Write => {
                let (at, place, len) = (reader.u64()?, reader.u64()?, reader.u64()?);
                let bytes = reader.rest();
                if place != INLINE {
                    from = Some(Piece { offset: place, len });
                } else if bytes.len() as u64 != len {
                    return Err(Short);
                }
                (INLINE, Access::Write { at, bytes })
            }
            Kind::CompareSwap => {
                let (at, expected, desired) = (reader.u64()?, reader.u64()?, reader.u64()?);
                (INLINE, Access::CompareSwap { at, expected, desired })
            }
            Kind::FetchAdd => (INLINE, Access::FetchAdd { at: reader.u64()?, add: reader.u64()? }),
            Kind::Indirect => {
                let (index, into) = (reader.u64()?, reader.u64()?);
                (into, Access::Indirect { index, len: reader.u32()? })
            }
            Kind::Scan => {
                let (at, needle, into) = (reader.u64()?, reader.u64()?, reader.u64()?);
                let (len, entries, stride, pointer) = (reader.u32()?, reader.u16()?, reader.u16()?, reader.u16()?);
                (into, Access::Scan(Scan { at, needle, len, entries, stride, pointer }))
            }
            _ => {
                let (at, into) = (reader.u64()?, reader.u64()?);
                (into, Access::Read { at, len: reader.u32()? })
            }
        };
        Ok((Single { region, into, access }, from))
    }
}

/// Many operations of one size and kind: results are packed from `into` on (for writes: the bytes are packed there), the
/// numbers of what to do from `numbers` on, both in the initiator's arena.
#[derive(Clone, Copy, Debug)]
pub struct Burst {
    pub region: Handle,
    pub into: u64,
    pub numbers: u64,
    pub size: u32,
    pub count: u32,
}

impl Burst {
    pub fn parse(reader: &mut Reader<'_>) -> Result<Burst, Short> {
        let (region, into, numbers) = (reader.handle()?, reader.u64()?, reader.u64()?);
        Ok(Burst { region, into, numbers, size: reader.u32()?, count: reader.u32()? })
    }
}

/// The first bytes of a completion.
pub fn answer(kind: Kind, status: Status, stream: u16, connection: u32, value: u64) -> [u8; ANSWER] {
    let mut bytes = [0; ANSWER];
    bytes[0] = kind as u8;
    bytes[1] = status as u8;
    bytes[2..4].copy_from_slice(&stream.to_le_bytes());
    bytes[4..8].copy_from_slice(&connection.to_le_bytes());
    bytes[8..].copy_from_slice(&value.to_le_bytes());
    bytes
}
