//! What a packet looks like. Little endian; the checksum covers header and payload from end to end.
//!
//! | at | bytes | |
//! |---|---|---|
//! | 0 | 1 | version: 1 or 2 |
//! | 1 | 1 | flags |
//! | 2 | 2 | bytes of payload |
//! | 4 | 4 | flow, by its receiver's number |
//! | 8 | 8 | number: of this transmission, never used twice with one key |
//! | 16 | 4 | CRC32C, computed with 0 here; 0 in a sealed packet, whose tag does its work |
//! | 20 | 4 | epoch of the sender: how often it has lost what it knew |
//! | 24 | 8 | sequence number: of the packet, however often it is transmitted |
//! | 32 | 8 | floor: nothing below will be sent (again) |
//! | 40 | 8 | ack: everything below was received |
//! | 48 | 4 | time of sending, ns modulo 2^32 |
//! | 52 | 4 | time of sending of the newest packet that was received; 0: none |
//! | 56 | 4 | ns between its reception and this packet |
//! | 60 | 4 | ns that it waited at the receiver before it was looked at |
//! | 64 | 16 or 32 | bit i: packet ack + 1 + i was received |

/// Versions differ in how far a receiver tells what it has: 128 packets, or 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Version {
    One = 1,
    Two = 2,
}

pub const NEWEST: Version = Version::Two;
const FIXED: usize = 64;
const CRC: std::ops::Range<usize> = 16..20;
/// Words of the widest bitmap.
pub const WORDS: usize = 4;
/// The bytes that stay readable in a sealed packet: what its receiver needs to open it.
pub const CLEAR: usize = 20;

pub const PAYLOAD: u8 = 1;
/// Its sender waits for the acknowledgement.
pub const ACK_NOW: u8 = 2;
pub const SEALED: u8 = 4;
const FLAGS: u8 = PAYLOAD | ACK_NOW | SEALED;

impl Version {
    pub fn of(byte: u8) -> Option<Version> {
        match byte {
            1 => Some(Version::One),
            2 => Some(Version::Two),
            _ => None,
        }
    }

    /// Packets that may be under way at once: the width of the bitmap.
    pub const fn window(self) -> u64 {
        self.words() as u64 * 64
    }

    pub const fn words(self) -> usize {
        match self {
            Version::One => 2,
            Version::Two => 4,
        }
    }

    pub const fn header(self) -> usize {
        FIXED + self.words() * 8
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: Version,
    pub flags: u8,
    pub len: u16,
    pub flow: u32,
    pub number: u64,
    pub epoch: u32,
    pub seq: u64,
    pub floor: u64,
    pub ack: u64,
    pub sent_at: u32,
    pub echo: u32,
    pub hold: u32,
    pub queued: u32,
    pub sack: [u64; WORDS],
}

/// Why bytes are no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    Short,
    /// A version that is not known here.
    Version(u8),
    Flags(u8),
    /// Longer or shorter than it says.
    Length,
    Checksum,
}

impl Header {
    pub fn carries(&self) -> bool {
        self.flags & PAYLOAD != 0
    }

    /// Whether packet `seq` is marked in the bitmap.
    pub fn sacks(&self, seq: u64) -> bool {
        let Some(bit) = seq.checked_sub(self.ack).and_then(|above| above.checked_sub(1)) else { return false };
        bit < self.version.window() && self.sack[bit as usize / 64] >> (bit % 64) & 1 != 0
    }

    /// Fill in the first `version.header()` bytes of `packet`, whose payload is there already, and the checksum unless it is
    /// going to be sealed. Panics when the packet is not that long.
    pub fn write(&self, packet: &mut [u8]) {
        packet[0] = self.version as u8;
        packet[1] = self.flags;
        packet[2..4].copy_from_slice(&self.len.to_le_bytes());
        packet[4..8].copy_from_slice(&self.flow.to_le_bytes());
        packet[8..16].copy_from_slice(&self.number.to_le_bytes());
        packet[CRC].copy_from_slice(&[0; 4]);
        packet[20..24].copy_from_slice(&self.epoch.to_le_bytes());
        packet[24..32].copy_from_slice(&self.seq.to_le_bytes());
        packet[32..40].copy_from_slice(&self.floor.to_le_bytes());
        packet[40..48].copy_from_slice(&self.ack.to_le_bytes());
        packet[48..52].copy_from_slice(&self.sent_at.to_le_bytes());
        packet[52..56].copy_from_slice(&self.echo.to_le_bytes());
        packet[56..60].copy_from_slice(&self.hold.to_le_bytes());
        packet[60..64].copy_from_slice(&self.queued.to_le_bytes());
        for (word, place) in self.sack.iter().zip(packet[FIXED..self.version.header()].chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        if self.flags & SEALED == 0 {
            let sum = crc32c::crc32c(&packet[..self.version.header() + usize::from(self.len)]);
            packet[CRC].copy_from_slice(&sum.to_le_bytes());
        }
    }

    /// The header and the payload of a packet, which was opened if it had been sealed.
    pub fn parse(packet: &[u8]) -> Result<(Header, &[u8]), Malformed> {
        let header = Header::parse_fields(packet)?;
        let (head, payload) = packet.split_at_checked(header.version.header()).ok_or(Malformed::Short)?;
        if payload.len() != usize::from(header.len) {
            return Err(Malformed::Length);
        }
        if header.flags & SEALED == 0 {
            let sum = crc32c::crc32c(&head[..CRC.start]);
            let sum = crc32c::crc32c_append(sum, &[0; 4]);
            let sum = crc32c::crc32c_append(sum, &packet[CRC.end..]);
            if sum.to_le_bytes() != packet[CRC] {
                return Err(Malformed::Checksum);
            }
        }
        Ok((header, payload))
    }

    fn parse_fields(packet: &[u8]) -> Result<Header, Malformed> {
        let first = *packet.first().ok_or(Malformed::Short)?;
        let version = Version::of(first).ok_or(Malformed::Version(first))?;
        let head = packet.get(..version.header()).ok_or(Malformed::Short)?;
        if head[1] & !FLAGS != 0 {
            return Err(Malformed::Flags(head[1]));
        }
        let half = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        let mut sack = [0; WORDS];
        for (i, place) in sack.iter_mut().take(version.words()).enumerate() {
            *place = word(FIXED + i * 8);
        }
        Ok(Header {
            version,
            flags: head[1],
            len: u16::from_le_bytes([head[2], head[3]]),
            flow: half(4),
            number: word(8),
            epoch: half(20),
            seq: word(24),
            floor: word(32),
            ack: word(40),
            sent_at: half(48),
            echo: half(52),
            hold: half(56),
            queued: half(60),
            sack,
        })
    }
}

/// Of a packet that may be sealed: the version, flags, flow and number, which are readable in any case.
pub fn clear(packet: &[u8]) -> Result<(Version, u8, u32, u64), Malformed> {
    let head = packet.get(..CLEAR).ok_or(Malformed::Short)?;
    let version = Version::of(head[0]).ok_or(Malformed::Version(head[0]))?;
    let flow = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    let number = u64::from_le_bytes([head[8], head[9], head[10], head[11], head[12], head[13], head[14], head[15]]);
    Ok((version, head[1], flow, number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(version: Version) -> Header {
        Header {
            version,
            flags: PAYLOAD,
            len: 5,
            flow: 7,
            number: 8,
            epoch: 9,
            seq: 10,
            floor: 11,
            ack: 12,
            sent_at: 13,
            echo: 14,
            hold: 15,
            queued: 16,
            sack: if version == Version::One { [17, 18, 0, 0] } else { [17, 18, 19, 20] },
        }
    }

    fn packet(header: &Header) -> Vec<u8> {
        let mut packet = vec![0; header.version.header()];
        packet.extend_from_slice(b"hello");
        header.write(&mut packet);
        packet
    }

    #[test]
    fn what_is_written_is_read() {
        for version in [Version::One, Version::Two] {
            let wanted = header(version);
            assert_eq!(Header::parse(&packet(&wanted)), Ok((wanted, &b"hello"[..])));
            assert_eq!(clear(&packet(&wanted)), Ok((version, PAYLOAD, 7, 8)));
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let good = packet(&header(Version::Two));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match Header::parse(&bad) {
                Err(_) => {}
                // Sealed packets have another protection, and are not taken by a flow without a key.
                Ok((read, _)) => assert_eq!(read.flags & SEALED, SEALED, "bit {bit}"),
            }
        }
    }

    #[test]
    fn the_bitmap_is_as_wide_as_it_says() {
        for version in [Version::One, Version::Two] {
            let mut header = header(version);
            for bit in 0..version.window() {
                header.sack = [0; WORDS];
                header.sack[bit as usize / 64] = 1 << (bit % 64);
                let (read, _) = Header::parse(&packet(&header)).map(|(read, _)| (read, ())).expect("is whole");
                let marked: Vec<u64> = (0..600).filter(|seq| read.sacks(*seq)).collect();
                assert_eq!(marked, [header.ack + 1 + bit]);
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Header::parse(&bytes);
            let _ = clear(&bytes);
        }
    }
}
