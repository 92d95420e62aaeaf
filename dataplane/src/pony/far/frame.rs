//! What two engines say to each other: frames, of which a packet carries as many as fit.
//!
//! A frame is `kind u8 | cookie u8 | stream u16 | to u32 | from u32`, the ends of the connection as receiver and sender
//! count them and the end of its cookie, then what its kind needs; all little endian.

use crate::pony::command::{Reader, Short};

pub const HEAD: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    pub to: u32,
    pub from: u32,
    pub stream: u16,
    pub cookie: u8,
}

/// Which part of which operation; `attempt` tells answers of an earlier attempt apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub id: u64,
    pub attempt: u32,
    pub part: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Somebody wants a connection to a name; `cookie` tells it from an earlier one of the same number.
    Open {
        cookie: u32,
        name: &'a [u8],
    },
    Accept {
        cookie: u32,
    },
    Refuse {
        cookie: u32,
        status: u8,
    },
    Close,
    /// There is no such connection here.
    Gone,
    /// I have this connection: do you?
    Alive,
    /// Bytes of message `seq` of a stream, `total` long.
    Message {
        seq: u64,
        total: u16,
        offset: u16,
        bytes: &'a [u8],
    },
    Datagram {
        bytes: &'a [u8],
    },
    /// Messages of this connection that the application has taken, modulo 2^32.
    Credit {
        taken: u32,
    },
    /// A large message waits; those below `floor` are done with.
    Offer {
        seq: u64,
        floor: u64,
        len: u64,
    },
    /// There is a place for it: send from `at` on.
    Grant {
        seq: u64,
        at: u64,
    },
    Piece {
        seq: u64,
        offset: u64,
        bytes: &'a [u8],
    },
    Finish {
        seq: u64,
        status: u8,
        value: u64,
    },
    /// A part of an operation on the receiver's memory; those below `floor` are done with.
    Request {
        part: Part,
        floor: u64,
        kind: u8,
        body: &'a [u8],
    },
    Reply {
        part: Part,
        status: u8,
        value: u64,
        bytes: &'a [u8],
    },
}

/// Bytes of a frame without those of variable length.
pub const OPEN: usize = HEAD + 6;
pub const MESSAGE: usize = HEAD + 14;
pub const DATAGRAM: usize = HEAD + 2;
pub const PIECE: usize = HEAD + 18;
pub const REQUEST: usize = HEAD + 16 + 8 + 3;
pub const REPLY: usize = HEAD + 16 + 9 + 2;
/// No frame without bytes of variable length is longer.
pub const SHORT: usize = HEAD + 24;

/// Frames are written one after the other.
pub struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Writer<'a> {
        Writer { bytes, at: 0 }
    }

    pub fn room(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub fn len(&self) -> usize {
        self.at
    }

    /// Forget what was written after `len`.
    pub fn cut(&mut self, len: usize) {
        self.at = len;
    }

    /// The next `len` bytes, for whoever fills them. Panics when there is no room.
    pub fn take(&mut self, len: usize) -> &mut [u8] {
        self.at += len;
        &mut self.bytes[self.at - len..self.at]
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.take(bytes.len()).copy_from_slice(bytes);
    }

    pub fn u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    pub fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    pub fn halves(&mut self, values: &[u32]) {
        values.iter().for_each(|value| self.u32(*value));
    }

    pub fn words(&mut self, values: &[u64]) {
        values.iter().for_each(|value| self.u64(*value));
    }

    fn head(&mut self, kind: u8, ends: Ends) {
        self.put(&[kind, ends.cookie]);
        self.u16(ends.stream);
        self.u32(ends.to);
        self.u32(ends.from);
    }

    fn part(&mut self, part: Part) {
        self.u64(part.id);
        self.u32(part.attempt);
        self.u32(part.part);
    }

    /// Begin a `Request`: the caller appends `len` bytes of body.
    pub fn request(&mut self, ends: Ends, part: Part, floor: u64, kind: u8, len: usize) {
        self.head(14, ends);
        self.part(part);
        self.u64(floor);
        self.u8(kind);
        self.u16(len as u16);
    }

    /// Begin a `Reply` whose data are the next `len` bytes.
    pub fn reply(&mut self, ends: Ends, part: Part, status: u8, value: u64, len: usize) {
        self.head(15, ends);
        self.part(part);
        self.u8(status);
        self.u64(value);
        self.u16(len as u16);
    }

    /// Panics when there is no room.
    pub fn frame(&mut self, ends: Ends, frame: &Frame<'_>) {
        match *frame {
            Frame::Open { cookie, name } => {
                self.head(1, ends);
                self.u32(cookie);
                self.u16(name.len() as u16);
                self.put(name);
            }
            Frame::Accept { cookie } => {
                self.head(2, ends);
                self.u32(cookie);
            }
            Frame::Refuse { cookie, status } => {
                self.head(3, ends);
                self.u32(cookie);
                self.u8(status);
            }
            Frame::Close => self.head(4, ends),
            Frame::Gone => self.head(5, ends),
            Frame::Alive => self.head(6, ends),
            Frame::Message { seq, total, offset, bytes } => {
                self.head(7, ends);
                self.u64(seq);
                self.u16(total);
                self.u16(offset);
                self.u16(bytes.len() as u16);
                self.put(bytes);
            }
            Frame::Datagram { bytes } => {
                self.head(8, ends);
                self.u16(bytes.len() as u16);
                self.put(bytes);
            }
            Frame::Credit { taken } => {
                self.head(9, ends);
                self.u32(taken);
            }
            Frame::Offer { seq, floor, len } => {
                self.head(10, ends);
                self.words(&[seq, floor, len]);
            }
            Frame::Grant { seq, at } => {
                self.head(11, ends);
                self.words(&[seq, at]);
            }
            Frame::Piece { seq, offset, bytes } => {
                self.piece(ends, seq, offset, bytes.len());
                self.put(bytes);
            }
            Frame::Finish { seq, status, value } => {
                self.head(13, ends);
                self.u64(seq);
                self.u8(status);
                self.u64(value);
            }
            Frame::Request { part, floor, kind, body } => {
                self.request(ends, part, floor, kind, body.len());
                self.put(body);
            }
            Frame::Reply { part, status, value, bytes } => {
                self.reply(ends, part, status, value, bytes.len());
                self.put(bytes);
            }
        }
    }

    /// Begin a `Piece`: the caller fills the next `len` bytes.
    pub fn piece(&mut self, ends: Ends, seq: u64, offset: u64, len: usize) {
        self.head(12, ends);
        self.u64(seq);
        self.u64(offset);
        self.u16(len as u16);
    }
}

/// The next frame. `Short` also for a kind that there is not: what follows cannot be found.
pub fn parse<'a>(reader: &mut Reader<'a>) -> Result<(Ends, Frame<'a>), Short> {
    let (kind, cookie) = (reader.u8()?, reader.u8()?);
    let stream = reader.u16()?;
    let ends = Ends { to: reader.u32()?, from: reader.u32()?, stream, cookie };
    let part = |reader: &mut Reader<'a>| -> Result<Part, Short> {
        Ok(Part { id: reader.u64()?, attempt: reader.u32()?, part: reader.u32()? })
    };
    let frame = match kind {
        1 => Frame::Open { cookie: reader.u32()?, name: reader.long()? },
        2 => Frame::Accept { cookie: reader.u32()? },
        3 => Frame::Refuse { cookie: reader.u32()?, status: reader.u8()? },
        4 => Frame::Close,
        5 => Frame::Gone,
        6 => Frame::Alive,
        7 => Frame::Message { seq: reader.u64()?, total: reader.u16()?, offset: reader.u16()?, bytes: reader.long()? },
        8 => Frame::Datagram { bytes: reader.long()? },
        9 => Frame::Credit { taken: reader.u32()? },
        10 => Frame::Offer { seq: reader.u64()?, floor: reader.u64()?, len: reader.u64()? },
        11 => Frame::Grant { seq: reader.u64()?, at: reader.u64()? },
        12 => Frame::Piece { seq: reader.u64()?, offset: reader.u64()?, bytes: reader.long()? },
        13 => Frame::Finish { seq: reader.u64()?, status: reader.u8()?, value: reader.u64()? },
        14 => {
            let part = part(reader)?;
            Frame::Request { part, floor: reader.u64()?, kind: reader.u8()?, body: reader.long()? }
        }
        15 => {
            let part = part(reader)?;
            Frame::Reply { part, status: reader.u8()?, value: reader.u64()?, bytes: reader.long()? }
        }
        _ => return Err(Short),
    };
    Ok((ends, frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(bytes: &[u8]) -> Vec<Frame<'_>> {
        let part = Part { id: 1 << 40, attempt: 7, part: 9 };
        vec![
            Frame::Open { cookie: 1, name: bytes },
            Frame::Accept { cookie: 2 },
            Frame::Refuse { cookie: 3, status: 4 },
            Frame::Close,
            Frame::Gone,
            Frame::Alive,
            Frame::Message { seq: 5, total: 60_000, offset: 6, bytes },
            Frame::Datagram { bytes },
            Frame::Credit { taken: 8 },
            Frame::Offer { seq: 9, floor: 10, len: 11 },
            Frame::Grant { seq: 12, at: 13 },
            Frame::Piece { seq: 14, offset: 15, bytes },
            Frame::Finish { seq: 16, status: 17, value: 18 },
            Frame::Request { part, floor: 19, kind: 20, body: bytes },
            Frame::Reply { part, status: 21, value: 22, bytes },
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut packet = vec![0; 9000];
            let mut writer = Writer::new(&mut packet);
            let ends = Ends { to: 1, from: u32::MAX, stream: 77, cookie: 78 };
            let frames = all(&bytes);
            for frame in &frames {
                let before = writer.len();
                writer.frame(ends, frame);
                let len = writer.len() - before;
                let most = match frame {
                    Frame::Open { .. } => OPEN + bytes.len(),
                    Frame::Message { .. } => MESSAGE + bytes.len(),
                    Frame::Datagram { .. } => DATAGRAM + bytes.len(),
                    Frame::Piece { .. } => PIECE + bytes.len(),
                    Frame::Request { .. } => REQUEST + bytes.len(),
                    Frame::Reply { .. } => REPLY + bytes.len(),
                    _ => SHORT,
                };
                prop_assert!(len <= most);
            }
            let len = writer.len();
            let mut reader = Reader::new(&packet[..len]);
            for frame in &frames {
                prop_assert_eq!(parse(&mut reader), Ok((ends, *frame)));
            }
            prop_assert!(reader.rest().is_empty());
            for cut in 0..len.min(64) {
                let mut reader = Reader::new(&packet[..cut]);
                while parse(&mut reader).is_ok() {}
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = Reader::new(&bytes);
            while parse(&mut reader).is_ok() {}
        }
    }
}
