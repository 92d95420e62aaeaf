//! What the engine knows of its applications, as rows of its state.

use super::command::{Handle, Piece, NAME};
use super::numbered::{of_link, Row};

/// A name that an application answers to.
pub struct Name {
    pub channel: u64,
    pub text: Vec<u8>,
}

/// The channel of what the engine itself answers: the name `.echo`.
pub const ECHO: u64 = u64::MAX;
/// The channel of an application that has gone, while what it sent is still on its way.
pub const NOBODY: u64 = u64::MAX - 1;

/// One application's end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    pub channel: u64,
    /// The end at the other application; 0: it is gone, or not there yet.
    pub peer: u32,
    /// The other host; 0: it is this one.
    pub link: u32,
    /// Tells this connection from an earlier one of the same number.
    pub cookie: u32,
    /// This end asked for it.
    pub asked: bool,
    /// The other host has not answered yet; `tag` is what the application calls the command.
    pub opening: bool,
    pub tag: u64,
    /// The name that is wanted there: a `Blob`.
    pub name: u32,
    /// The number of the next large message to another host.
    pub large: u64,
    /// Large messages, and operations, below were finished: the other host knows how.
    pub large_floor: u64,
    pub floor: u64,
}

/// Memory that an application lets its peers use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub channel: u64,
    pub key: u32,
    pub rights: u32,
    /// The owner's end of the only connection that may use it; 0: each of its connections.
    pub connection: u32,
    pub piece: Piece,
}

impl Region {
    pub fn handle(&self, id: u32) -> Handle {
        Handle { id, key: self.key }
    }
}

pub fn word(row: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*row.get(at..)?.first_chunk()?))
}

pub fn put(row: &mut [u8], at: usize, value: u64) {
    row[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

pub fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Row for Name {
    const TABLE: &'static str = "names";
    const BYTES: usize = 16 + NAME;
    const COUNT: usize = 4096;
    const FIELDS: &'static str = r#"{"channel":"u8","length":"u8","text":"S64"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 0, self.channel);
        put(row, 8, self.text.len() as u64);
        row[16..16 + self.text.len()].copy_from_slice(&self.text);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let length = usize::try_from(word(row, 8)?).ok().filter(|length| (1..=NAME).contains(length))?;
        Some(Name { channel: word(row, 0)?, text: row.get(16..16 + length)?.to_vec() })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.channel)
    }
}

impl Row for Connection {
    const TABLE: &'static str = "connections";
    const BYTES: usize = 64;
    const COUNT: usize = 65_536;
    const FIELDS: &'static str = r#"{"channel":"u8","peer":"u4","link":"u4","cookie":"u4","asked":"u2","opening":"u2","tag":"u8","large":"u8","large_floor":"u8","floor":"u8","name":"u8"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 0, self.channel);
        put(row, 8, pair(self.peer, self.link));
        put(row, 16, pair(self.cookie, u32::from(self.asked) | u32::from(self.opening) << 16));
        put(row, 24, self.tag);
        put(row, 32, self.large);
        put(row, 40, self.large_floor);
        put(row, 48, self.floor);
        put(row, 56, self.name.into());
    }

    fn read(row: &[u8]) -> Option<Self> {
        let (ends, opening) = (word(row, 8)?, word(row, 16)?);
        Some(Connection {
            channel: word(row, 0)?,
            peer: ends as u32,
            link: (ends >> 32) as u32,
            cookie: opening as u32,
            asked: (opening >> 32) as u16 != 0,
            opening: opening >> 48 != 0,
            tag: word(row, 24)?,
            large: word(row, 32)?,
            large_floor: word(row, 40)?,
            floor: word(row, 48)?,
            name: word(row, 56)? as u32,
        })
    }

    fn owner(&self) -> Option<u64> {
        match (self.asked, self.link) {
            (true, _) => Some(self.channel),
            (false, 0) => None,
            (false, link) => Some(of_link(link)),
        }
    }
}

impl Row for Region {
    const TABLE: &'static str = "regions";
    const BYTES: usize = 40;
    const COUNT: usize = 16_384;
    const FIELDS: &'static str =
        r#"{"channel":"u8","offset":"u8","length":"u8","key":"u4","rights":"u4","connection":"u8"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 0, self.channel);
        put(row, 8, self.piece.offset);
        put(row, 16, self.piece.len);
        put(row, 24, pair(self.key, self.rights));
        put(row, 32, u64::from(self.connection));
    }

    fn read(row: &[u8]) -> Option<Self> {
        let both = word(row, 24)?;
        let connection = u32::try_from(word(row, 32)?).ok()?;
        let piece = Piece { offset: word(row, 8)?, len: word(row, 16)? };
        Some(Region { channel: word(row, 0)?, key: both as u32, rights: (both >> 32) as u32, connection, piece })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.channel)
    }
}

/// A message to an application that left no room for it.
pub struct Waiting {
    pub channel: u64,
    /// Messages are delivered in this order.
    pub order: u64,
    /// The receiver's end of the connection that it came over.
    pub connection: u32,
    pub tag: u64,
    pub bytes: Vec<u8>,
}

/// The longest message that waits, and so the longest that is sent without a place posted for it.
pub const SMALL: usize = 4096;
/// Bytes before its data.
const WAITING: usize = 32;

impl Row for Waiting {
    const TABLE: &'static str = "waiting";
    const BYTES: usize = WAITING + super::command::ANSWER + SMALL;
    const COUNT: usize = 16_384;
    const FIELDS: &'static str =
        r#"{"channel":"u8","order":"u8","connection":"u4","length":"u4","tag":"u8","bytes":"S4112"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 0, self.channel);
        put(row, 8, self.order);
        put(row, 16, pair(self.connection, self.bytes.len() as u32));
        put(row, 24, self.tag);
        row[WAITING..WAITING + self.bytes.len()].copy_from_slice(&self.bytes);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let both = word(row, 16)?;
        let bytes = row.get(WAITING..WAITING.checked_add((both >> 32) as usize)?)?.to_vec();
        Some(Waiting {
            channel: word(row, 0)?,
            order: word(row, 8)?,
            connection: both as u32,
            tag: word(row, 24)?,
            bytes,
        })
    }

    fn owner(&self) -> Option<u64> {
        Some(self.channel)
    }
}

/// A large message, or a place for one; they meet in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The receiver's end of the connection.
    pub connection: u32,
    pub stream: u16,
    /// Whether it is a place.
    pub posted: bool,
    pub order: u64,
    /// What the application calls it.
    pub tag: u64,
    pub piece: Piece,
    /// Bytes that were copied.
    pub done: u64,
}

impl Row for Transfer {
    const TABLE: &'static str = "transfers";
    const BYTES: usize = 48;
    const COUNT: usize = 16_384;
    const FIELDS: &'static str = r#"{"connection":"u4","stream":"u2","posted":"u2","order":"u8","tag":"u8","offset":"u8","length":"u8","done":"u8"}"#;

    fn write(&self, row: &mut [u8]) {
        put(row, 0, pair(self.connection, u32::from(self.stream) | u32::from(self.posted) << 16));
        put(row, 8, self.order);
        put(row, 16, self.tag);
        put(row, 24, self.piece.offset);
        put(row, 32, self.piece.len);
        put(row, 40, self.done);
    }

    fn read(row: &[u8]) -> Option<Self> {
        let first = word(row, 0)?;
        Some(Transfer {
            connection: first as u32,
            stream: (first >> 32) as u16,
            posted: first >> 48 != 0,
            order: word(row, 8)?,
            tag: word(row, 16)?,
            piece: Piece { offset: word(row, 24)?, len: word(row, 32)? },
            done: word(row, 40)?,
        })
    }
}
