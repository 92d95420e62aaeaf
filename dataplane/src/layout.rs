//! The bytes of a channel's ring segment (`docs/wire.md` is the same in prose).
//!
//! Geometry never comes from the segment: the kernel tells it with the descriptors. The header repeats it only
//! so that a mismatch is noticed. A `Header` is a descriptor that passed its checks; nothing else is acted on.

use crate::error::Fault;

pub const MAGIC: u64 = u64::from_le_bytes(*b"SNAPCHN1");
pub const LAYOUT_VERSION: u32 = 2;

/// Byte offsets in the header page.
pub const OFF_MAGIC: usize = 0;
pub const OFF_VERSION: usize = 8;
pub const OFF_SLOTS: usize = 12;
pub const OFF_CHANNEL: usize = 16;
pub const OFF_GENERATION: usize = 24;
/// The state word has a cache line of its own: both ends read it with every burst.
pub const OFF_STATE: usize = 64;
/// The client's longest wait for a message in ns, and since when (CLOCK_MONOTONIC, ns): a line that only waits touch.
pub const OFF_LONGEST_WAIT: usize = 128;
pub const OFF_WAITS_SINCE: usize = 136;

/// Control lines of one direction (0: client to server, 1: server to client).
pub const OFF_DIRECTION: [usize; 2] = [4096, 4096 + 512];
pub const DIR_TAIL: usize = 0;
pub const DIR_HEAD: usize = 64;
/// Armed words are on lines that hardly ever change, so that looking at them costs no transfer.
pub const DIR_DATA_ARMED: usize = 128;
pub const DIR_ROOM_ARMED: usize = 192;
/// The announcement stands right after its armed word.
pub const ARMED_SLEEPY: usize = 4;
pub const DIR_RETURN_TAIL: usize = 256;
pub const DIR_RETURN_HEAD: usize = 320;

pub const OFF_SLOTS_AREA: usize = 8192;
pub const SLOT: usize = 64;
pub const PREFIX: usize = 16;
/// Payload bytes in the first slot of an inline message; the others carry `SLOT` each.
pub const INLINE_FIRST: usize = SLOT - PREFIX;
pub const MAX_SLOTS_PER_MESSAGE: u64 = 16;
pub const INLINE_MAX: usize = INLINE_FIRST + (MAX_SLOTS_PER_MESSAGE as usize - 1) * SLOT;
pub const RETURN_ENTRY: usize = 8;
/// What the server has out and holds, written down for whoever serves after it: three words each.
pub const RECORD: usize = 24;

pub const MIN_SLOTS: u32 = 64;
pub const MAX_SLOTS: u32 = 65536;

pub const OP_MESSAGE: u16 = 1;
pub const FLAG_POOL: u16 = 1;

/// Whether `slots` is a geometry that this layout knows.
pub fn slots_valid(slots: u32) -> bool {
    slots.is_power_of_two() && (MIN_SLOTS..=MAX_SLOTS).contains(&slots)
}

pub fn slots_offset(slots: u32, direction: usize) -> usize {
    OFF_SLOTS_AREA + direction * slots as usize * SLOT
}

pub fn returns_offset(slots: u32, direction: usize) -> usize {
    OFF_SLOTS_AREA + slots as usize * (2 * SLOT + direction * RETURN_ENTRY)
}

/// Records of the server's own payloads that are out, by the number of their token: turn and units, offset, position.
pub fn loans_offset(slots: u32) -> usize {
    OFF_SLOTS_AREA + 2 * slots as usize * (SLOT + RETURN_ENTRY)
}

/// Records of the client's payloads that the server holds, by the number of their token: token, positions in the ring and
/// in the ring of returns.
pub fn claims_offset(slots: u32) -> usize {
    loans_offset(slots) + slots as usize * RECORD
}

/// Size of the whole ring segment in bytes, a multiple of the page.
pub fn ring_bytes(slots: u32) -> usize {
    (OFF_SLOTS_AREA + 2 * slots as usize * (SLOT + RETURN_ENTRY + RECORD)).next_multiple_of(4096)
}

/// Slots that an inline message of `len` bytes takes.
pub fn inline_slots(len: usize) -> u64 {
    1 + (len.saturating_sub(INLINE_FIRST)).div_ceil(SLOT) as u64
}

/// A descriptor's first 16 bytes, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub len: usize,
    pub tag: u64,
    pub pooled: bool,
    pub slots: u64,
}

/// Where a pooled payload is: the producer's pool, and the token that gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolRef {
    pub offset: u64,
    pub token: u64,
}

/// The two words of a descriptor's prefix.
pub fn emit(len: usize, tag: u64, pooled: bool) -> [u64; 2] {
    let flags = if pooled { FLAG_POOL } else { 0 };
    [u64::from(OP_MESSAGE) | u64::from(flags) << 16 | (len as u64) << 32, tag]
}

/// Check a prefix that a peer wrote; `available` slots are published from it on.
pub fn parse(words: [u64; 2], available: u64) -> Result<Header, Fault> {
    let opcode = words[0] as u16;
    let flags = (words[0] >> 16) as u16;
    let len = (words[0] >> 32) as usize;
    if opcode != OP_MESSAGE {
        return Err(Fault::Opcode);
    }
    if flags & !FLAG_POOL != 0 {
        return Err(Fault::Flags);
    }
    let pooled = flags & FLAG_POOL != 0;
    if !pooled && len > INLINE_MAX {
        return Err(Fault::Length);
    }
    let slots = if pooled { 1 } else { inline_slots(len) };
    if slots > available {
        return Err(Fault::Length);
    }
    Ok(Header { len, tag: words[1], pooled, slots })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn areas_do_not_overlap() {
        for slots in [MIN_SLOTS, 1024, MAX_SLOTS] {
            let ends = [
                slots_offset(slots, 0) + slots as usize * SLOT,
                slots_offset(slots, 1) + slots as usize * SLOT,
                returns_offset(slots, 0) + slots as usize * RETURN_ENTRY,
                returns_offset(slots, 1) + slots as usize * RETURN_ENTRY,
                loans_offset(slots) + slots as usize * RECORD,
                claims_offset(slots) + slots as usize * RECORD,
            ];
            assert_eq!(ends[0], slots_offset(slots, 1));
            assert_eq!(ends[1], returns_offset(slots, 0));
            assert_eq!(ends[2], returns_offset(slots, 1));
            assert_eq!(ends[3], loans_offset(slots));
            assert_eq!(ends[4], claims_offset(slots));
            assert!(ends[5] <= ring_bytes(slots));
        }
    }

    proptest! {
        #[test]
        fn what_is_emitted_parses_back(len in 0usize..=INLINE_MAX, tag: u64) {
            let header = parse(emit(len, tag, false), 16).expect("valid");
            prop_assert_eq!((header.len, header.tag, header.pooled), (len, tag, false));
            prop_assert_eq!(header.slots, inline_slots(len));
        }

        #[test]
        fn hostile_words_never_claim_more_than_is_published(words: [u64; 2], available in 0u64..20) {
            if let Ok(header) = parse(words, available) {
                prop_assert!(header.slots >= 1 && header.slots <= available);
                prop_assert!(header.pooled || header.len <= INLINE_MAX);
            }
        }
    }
}
