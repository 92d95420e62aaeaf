//! What the engine knows of other hosts, and of operations with them that are under way, as rows of its state.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::pony::command::{Piece, Status};
use crate::pony::flow::{Algorithm, Version};
use crate::pony::numbered::Row;
use crate::pony::rows::{pair, put, word, SMALL};

/// The longest name of a host.
pub const HOST: usize = 64;
/// Bytes of a command that an operation on another host's memory is known by.
pub const BODY: usize = 56;

/// The way to another host's engine, as both agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The flow's number there.
    pub remote: u32,
    pub address: SocketAddr,
    pub version: Version,
    pub algorithm: Algorithm,
    /// The longest packet, in bytes.
    pub mtu: u16,
    /// To seal with, to open with.
    pub keys: Option<[[u8; 32]; 2]>,
    /// Whether it began with a wire of shared memory.
    pub wired: bool,
}

impl Attached {
    /// Bytes for frames in a packet.
    pub fn room(&self) -> usize {
        let tag = if self.keys.is_some() { super::seal::TAG } else { 0 };
        usize::from(self.mtu) - self.version.header() - tag
    }
}

/// Another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub host: Vec<u8>,
    /// Changes with each set-up, so that packets of an earlier one are not taken for ours.
    pub salt: u16,
    /// How often this engine has lost what it knew.
    pub epoch: u32,
    pub attached: Option<Attached>,
}

/// One stream of messages of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    pub owner: u64,
    pub connection: u32,
    pub stream: u16,
    /// The numbers of the next message that goes out, and that comes in.
    pub out: u64,
    pub next: u64,
}

/// A message that its receiver's engine does not have yet, or one that came too early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel<const OUT: bool> {
    pub owner: u64,
    pub id: u64,
    pub connection: u32,
    pub stream: u16,
    pub seq: u64,
    pub bytes: Vec<u8>,
}

pub type Sending = Parcel<true>;
pub type Held = Parcel<false>;

/// A large message that goes to another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    pub owner: u64,
    pub connection: u32,
    pub stream: u16,
    pub seq: u64,
    pub tag: u64,
    pub piece: Piece,
    /// Tells it from a later one in the same row. Not in the state, for packets under way are not either.
    pub id: u64,
}

/// An operation on another host's memory that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    pub owner: u64,
    pub connection: u32,
    /// The command's kind, and what follows its head.
    pub kind: u8,
    pub body: [u8; BODY],
    pub id: u64,
    pub tag: u64,
    /// The bytes of a write that are not in the arena: a `Blob`; 0: they are, or there are none.
    pub blob: u32,
}

pub struct Blob {
    pub owner: u64,
    pub bytes: Vec<u8>,
}

/// How an operation of another host ended here: said again when it asks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    pub owner: u64,
    pub connection: u32,
    pub id: u64,
    /// Which part of it.
    pub part: u32,
    pub status: Status,
    pub value: u64,
}

impl Row for Link {
    const TABLE: &'static str = "links";
    const BYTES: usize = 224;
    const COUNT: usize = 4096;
    const FIELDS: &'static str = r#"{"host_length":"u8","host":"S64","salt":"u4","epoch":"u4","spare":"u8","remote":"u4","version":"u1","algorithm":"u1","mtu":"u2","address":"S16","port":"u4","attached":"u4","sealed":"u8","keys":"S64"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 0, self.host.len() as u64);
        row[8..8 + self.host.len()].copy_from_slice(&self.host);
        put(row, 72, pair(u32::from(self.salt), self.epoch));
        let Some(attached) = &self.attached else { return };
        let algorithm = u8::from(attached.algorithm == Algorithm::Timely);
        let how = [attached.version as u8, algorithm, attached.mtu as u8, (attached.mtu >> 8) as u8];
        put(row, 88, pair(attached.remote, u32::from_le_bytes(how)));
        let ip = match attached.address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        row[96..112].copy_from_slice(&ip.octets());
        put(row, 112, pair(u32::from(attached.address.port()), 1 | u32::from(attached.wired) << 1));
        if let Some(keys) = attached.keys {
            put(row, 120, 1);
            row[128..160].copy_from_slice(&keys[0]);
            row[160..192].copy_from_slice(&keys[1]);
        }
    }

    fn read(row: &[u8]) -> Option<Self> {
        let length = usize::try_from(word(row, 0)?).ok().filter(|length| (1..=HOST).contains(length))?;
        let first = word(row, 72)?;
        Some(Link {
            host: row.get(8..8 + length)?.to_vec(),
            salt: first as u16,
            epoch: (first >> 32) as u32,
            attached: if word(row, 112)? >> 32 == 0 { None } else { Some(attached(row)?) },
        })
    }
}

fn attached(row: &[u8]) -> Option<Attached> {
    let how = word(row, 88)?;
    let [version, algorithm, mtu @ ..] = ((how >> 32) as u32).to_le_bytes();
    let ip = Ipv6Addr::from(*row.get(96..)?.first_chunk::<16>()?);
    let ip = ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4);
    let key = |at: usize| row.get(at..)?.first_chunk::<32>().copied();
    Some(Attached {
        remote: how as u32,
        address: SocketAddr::new(ip, word(row, 112)? as u16),
        version: Version::of(version)?,
        algorithm: if algorithm == 0 { Algorithm::Swift } else { Algorithm::Timely },
        mtu: u16::from_le_bytes(mtu),
        keys: if word(row, 120)? == 0 { None } else { Some([key(128)?, key(160)?]) },
        wired: word(row, 112)? >> 33 & 1 == 1,
    })
}

impl Row for Stream {
    const TABLE: &'static str = "streams";
    const BYTES: usize = 32;
    const COUNT: usize = 131_072;
    const FIELDS: &'static str = r#"{"connection":"u4","stream":"u4","out":"u8","next":"u8","owner":"u8"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 24, self.owner);
        put(row, 0, pair(self.connection, self.stream.into()));
        put(row, 8, self.out);
        put(row, 16, self.next);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let first = word(row, 0)?;
        Some(Stream {
            owner: word(row, 24)?,
            connection: first as u32,
            stream: (first >> 32) as u16,
            out: word(row, 8)?,
            next: word(row, 16)?,
        })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.owner)
    }
}

const PARCEL: usize = 40;

impl<const OUT: bool> Row for Parcel<OUT> {
    const TABLE: &'static str = if OUT { "sending" } else { "held" };
    const BYTES: usize = PARCEL + SMALL;
    const COUNT: usize = 4096;
    const FIELDS: &'static str =
        r#"{"id":"u8","seq":"u8","connection":"u4","stream":"u4","length":"u8","owner":"u8","bytes":"S4096"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 32, self.owner);
        put(row, 0, self.id);
        put(row, 8, self.seq);
        put(row, 16, pair(self.connection, self.stream.into()));
        put(row, 24, self.bytes.len() as u64);
        row[PARCEL..PARCEL + self.bytes.len()].copy_from_slice(&self.bytes);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let both = word(row, 16)?;
        let end = PARCEL.checked_add(usize::try_from(word(row, 24)?).ok()?)?;
        Some(Parcel {
            owner: word(row, 32)?,
            id: word(row, 0)?,
            seq: word(row, 8)?,
            connection: both as u32,
            stream: (both >> 32) as u16,
            bytes: row.get(PARCEL..end)?.to_vec(),
        })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.owner)
    }
}

impl Row for Export {
    const TABLE: &'static str = "exports";
    const BYTES: usize = 48;
    const COUNT: usize = 16_384;
    const FIELDS: &'static str =
        r#"{"connection":"u4","stream":"u4","seq":"u8","tag":"u8","offset":"u8","length":"u8","owner":"u8"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 40, self.owner);
        put(row, 0, pair(self.connection, self.stream.into()));
        put(row, 8, self.seq);
        put(row, 16, self.tag);
        put(row, 24, self.piece.offset);
        put(row, 32, self.piece.len);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let first = word(row, 0)?;
        Some(Export {
            owner: word(row, 40)?,
            connection: first as u32,
            stream: (first >> 32) as u16,
            seq: word(row, 8)?,
            tag: word(row, 16)?,
            piece: Piece { offset: word(row, 24)?, len: word(row, 32)? },
            id: 0,
        })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.owner)
    }
}

impl Row for Ask {
    const TABLE: &'static str = "asks";
    const BYTES: usize = 40 + BODY;
    const COUNT: usize = 16_384;
    const FIELDS: &'static str =
        r#"{"connection":"u4","kind":"u4","id":"u8","tag":"u8","blob":"u8","owner":"u8","body":"S56"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 32, self.owner);
        put(row, 0, pair(self.connection, self.kind.into()));
        put(row, 8, self.id);
        put(row, 16, self.tag);
        put(row, 24, self.blob.into());
        row[40..40 + BODY].copy_from_slice(&self.body);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let first = word(row, 0)?;
        Some(Ask {
            owner: word(row, 32)?,
            connection: first as u32,
            kind: (first >> 32) as u8,
            id: word(row, 8)?,
            tag: word(row, 16)?,
            blob: word(row, 24)? as u32,
            body: *row.get(40..)?.first_chunk()?,
        })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.owner)
    }
}

impl Row for Blob {
    const TABLE: &'static str = "blobs";
    const BYTES: usize = 16 + SMALL;
    const COUNT: usize = 2048;
    const FIELDS: &'static str = r#"{"length":"u8","owner":"u8","bytes":"S4096"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 8, self.owner);
        put(row, 0, self.bytes.len() as u64);
        row[16..16 + self.bytes.len()].copy_from_slice(&self.bytes);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let end = usize::try_from(word(row, 0)?).ok()?.checked_add(16)?;
        Some(Blob { owner: word(row, 8)?, bytes: row.get(16..end)?.to_vec() })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.owner)
    }
}

impl Row for Ending {
    const TABLE: &'static str = "endings";
    const BYTES: usize = 40;
    const COUNT: usize = 131_072;
    const FIELDS: &'static str = r#"{"connection":"u4","part":"u4","id":"u8","value":"u8","status":"u8","owner":"u8"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 32, self.owner);
        put(row, 0, pair(self.connection, self.part));
        put(row, 8, self.id);
        put(row, 16, self.value);
        put(row, 24, self.status as u64);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let first = word(row, 0)?;
        Some(Ending {
            owner: word(row, 32)?,
            connection: first as u32,
            part: (first >> 32) as u32,
            id: word(row, 8)?,
            value: word(row, 16)?,
            status: Status::of(word(row, 24)? as u8)?,
        })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.owner)
    }
}
