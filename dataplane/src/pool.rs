//! The payload pool of one direction: the producer allocates, the consumer gives back over a ring of tokens.
//!
//! All bookkeeping is the producer's own and private; shared are only the payload bytes (which the consumer maps
//! read-only) and the ring of tokens coming back. A token names an entry of the producer's table and its turn, so
//! that a token given back twice, or invented, is noticed.
//!
//! A server's end whose process may die (see `ledger`) writes down besides, in the ring segment, which payloads of its own
//! are out and which of the client's it holds. Its client can write there as well: what a successor finds is checked, and
//! can harm nobody else.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use range_alloc::RangeAllocator;

use crate::error::Fault;
use crate::layout::{self, PoolRef, RECORD, RETURN_ENTRY};
use crate::ring::{take_down, Wake};
use crate::segment::Mapping;

/// Allocation unit: a cache line, so that two payloads never share one.
const UNIT: usize = 64;

/// Records of three words each in a ring segment.
struct Records {
    ring: Arc<Mapping>,
    offset: usize,
}

impl Records {
    /// Word `word` of record `index`, which is below the number of slots.
    fn word(&self, index: u32, word: usize) -> &AtomicU64 {
        self.ring.u64_at(self.offset + index as usize * RECORD + word * 8)
    }

    fn load(&self, index: u32) -> [u64; 3] {
        [0, 1, 2].map(|word| self.word(index, word).load(Ordering::Relaxed))
    }

    /// In program order, which is all that a successor needs.
    fn store(&self, index: u32, word: usize, value: u64) {
        self.word(index, word).store(value, Ordering::Release);
    }
}

/// Words of a record of an own payload: turn and units, offset, and the position + 1 of the slot that carries it (0: none).
const LOAN_SIZE: usize = 0;
const LOAN_OFFSET: usize = 1;
const LOAN_SENT: usize = 2;

/// Words of a record of a payload that is held: its token, and positions + 1 of where it came and of where it went back.
const CLAIM_TOKEN: usize = 0;
const CLAIM_CAME: usize = 1;
const CLAIM_WENT: usize = 2;
/// Given back in a poll that is not committed yet.
const GOING: u64 = u64::MAX;

struct Entry {
    turn: u32,
    live: Option<Range<u64>>,
}

pub struct Allocations {
    allocator: RangeAllocator<u64>,
    units: u64,
    entries: Vec<Entry>,
    free: Vec<u32>,
    returned: u64,
    /// Tokens before this place in the ring may be some that `resume` took in.
    tolerated: u64,
    freed: u64,
    records: Option<Records>,
    /// Entries that were sent since the last commit.
    sent: Vec<u32>,
}

impl Allocations {
    /// At most `slots` payloads can be out at once: the ring of tokens then never overflows.
    pub fn new(pool_bytes: usize, slots: u32) -> Allocations {
        let units = (pool_bytes / UNIT) as u64;
        Allocations {
            allocator: RangeAllocator::new(0..units),
            units,
            entries: (0..slots).map(|_| Entry { turn: 0, live: None }).collect(),
            free: (0..slots).rev().collect(),
            returned: 0,
            tolerated: 0,
            freed: 0,
            records: None,
            sent: Vec::new(),
        }
    }

    /// Write down from now on what is out, in `ring`.
    pub fn record(&mut self, ring: &Arc<Mapping>, slots: u32) {
        self.records = Some(Records { ring: ring.clone(), offset: layout::loans_offset(slots) });
    }

    /// Bytes of the largest payload that the empty pool can hold.
    pub fn largest(&self) -> usize {
        self.units as usize * UNIT
    }

    /// Whether no amount of waiting makes room for `len` bytes.
    pub fn never(&self, len: usize) -> bool {
        len > self.largest() || self.units == 0
    }

    /// Payloads freed so far.
    pub fn freed(&self) -> u64 {
        self.freed
    }

    pub fn out(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Room for `len` bytes, or None when the pool is exhausted for now.
    pub fn allocate(&mut self, len: usize) -> Option<PoolRef> {
        let index = *self.free.last()?;
        let range = self.allocator.allocate_range(len.div_ceil(UNIT).max(1) as u64).ok()?;
        let offset = range.start * UNIT as u64;
        self.free.pop();
        let entry = &mut self.entries[index as usize];
        entry.turn = entry.turn.wrapping_add(1);
        if let Some(records) = &self.records {
            records.store(index, LOAN_SENT, 0);
            records.store(index, LOAN_SIZE, u64::from(entry.turn) << 32 | (range.end - range.start));
            records.store(index, LOAN_OFFSET, offset);
        }
        entry.live = Some(range);
        Some(PoolRef { offset, token: u64::from(index) | u64::from(entry.turn) << 32 })
    }

    /// The payload was put at `position` of the ring.
    pub fn sent(&mut self, token: u64, position: u64) {
        if let Some(records) = &self.records {
            records.store(token as u32, LOAN_SENT, position + 1);
            self.sent.push(token as u32);
        }
    }

    /// Whether `token` is out.
    pub fn is_out(&self, token: u64) -> bool {
        let entry = self.entries.get(token as u32 as usize);
        entry.is_some_and(|entry| entry.live.is_some() && entry.turn == (token >> 32) as u32)
    }

    /// Free what a token names. A token that is not out is a fault of whoever gave it back.
    pub fn free(&mut self, token: u64) -> Result<(), Fault> {
        let (index, turn) = (token as u32, (token >> 32) as u32);
        let entry = self.entries.get_mut(index as usize).ok_or(Fault::Return)?;
        if entry.turn != turn {
            return Err(Fault::Return);
        }
        let range = entry.live.take().ok_or(Fault::Return)?;
        if let Some(records) = &self.records {
            records.store(index, LOAN_SENT, 0);
        }
        self.allocator.free_range(range);
        self.free.push(index);
        self.freed += 1;
        Ok(())
    }

    /// Take in all tokens that came back. `direction` is the one we produce in.
    pub fn collect(&mut self, ring: &Mapping, slots: u32, direction: usize) -> Result<(), Fault> {
        let control = layout::OFF_DIRECTION[direction];
        let tail = ring.u64_at(control + layout::DIR_RETURN_TAIL).load(Ordering::Acquire);
        let count = tail.wrapping_sub(self.returned);
        if count > u64::from(slots) {
            return Err(Fault::Index);
        }
        for index in self.returned..tail {
            match self.free(returned_token(ring, slots, direction, index)) {
                Err(fault) if index >= self.tolerated => return Err(fault),
                _ => {}
            }
        }
        self.returned = tail;
        ring.u64_at(control + layout::DIR_RETURN_HEAD).store(tail, Ordering::Release);
        Ok(())
    }

    /// What was sent is sent for good.
    pub fn keep(&mut self) {
        self.sent.clear();
    }

    /// What was sent since the last commit never was.
    pub fn take_back(&mut self) {
        for index in std::mem::take(&mut self.sent) {
            let token = u64::from(index) | u64::from(self.entries[index as usize].turn) << 32;
            // One that a hostile peer gave back before it could know of it is gone already.
            let _ = self.free(token);
        }
    }

    /// Go on where the process before stopped, all of whose messages before `tail` count: what they carried is out, unless
    /// it came back meanwhile, and nothing else is.
    pub fn resume(&mut self, ring: &Mapping, slots: u32, direction: usize, tail: u64) -> Result<(), Fault> {
        let Some(records) = &self.records else { return Ok(()) };
        let mut out = Vec::new();
        self.free.clear();
        for (index, entry) in (0..slots).zip(&mut self.entries).rev() {
            let [size, offset, sent] = records.load(index);
            *entry = Entry { turn: (size >> 32) as u32, live: None };
            if sent == 0 || sent > tail {
                records.store(index, LOAN_SENT, 0);
                self.free.push(index);
                continue;
            }
            let (start, count) = (offset / UNIT as u64, size & u64::from(u32::MAX));
            if offset % UNIT as u64 != 0 || count == 0 || start >= self.units || count > self.units - start {
                return Err(Fault::Record);
            }
            entry.live = Some(start..start + count);
            out.push(start..start + count);
        }
        self.allocator = without(self.units, out)?;
        self.sent.clear();
        let end = ring.u64_at(layout::OFF_DIRECTION[direction] + layout::DIR_RETURN_TAIL).load(Ordering::Acquire);
        for index in end.saturating_sub(u64::from(slots))..end {
            // Most of them were taken in by the process before.
            let _ = self.free(returned_token(ring, slots, direction, index));
        }
        self.returned = end;
        // The client goes on: what it wrote meanwhile, over the oldest of these, comes again in its turn.
        self.tolerated = end.saturating_add(u64::from(slots));
        Ok(())
    }
}

/// An allocator of `units` in which these ranges, all inside, are taken.
fn without(units: u64, mut taken: Vec<Range<u64>>) -> Result<RangeAllocator<u64>, Fault> {
    let mut allocator = RangeAllocator::new(0..units);
    if taken.is_empty() {
        return Ok(allocator);
    }
    taken.sort_unstable_by_key(|range| range.start);
    let all = allocator.allocate_range(units).map_err(|_| Fault::Record)?;
    let mut from = all.start;
    for range in taken.into_iter().chain(std::iter::once(units..units)) {
        if range.start < from {
            return Err(Fault::Record);
        }
        if range.start > from {
            allocator.free_range(from..range.start);
        }
        from = range.end;
    }
    Ok(allocator)
}

fn returned_token(ring: &Mapping, slots: u32, direction: usize, index: u64) -> u64 {
    ring.u64_at(return_place(slots, direction, index)).load(Ordering::Relaxed)
}

fn return_place(slots: u32, direction: usize, index: u64) -> usize {
    layout::returns_offset(slots, direction) + (index & u64::from(slots - 1)) as usize * RETURN_ENTRY
}

/// The consumer's side of the token ring.
pub struct Returns {
    tail: u64,
    records: Option<Records>,
    /// Payloads that came (position, token) and tokens that are to go back, since the last commit.
    came: Vec<(u64, u64)>,
    going: Vec<u64>,
    /// What the last commit put into the ring of returns is not published yet.
    written: bool,
}

impl Returns {
    pub fn new() -> Returns {
        Returns { tail: 0, records: None, came: Vec::new(), going: Vec::new(), written: false }
    }

    /// From now on tokens go back with a commit only, and what is held is written down in `ring`.
    pub fn record(&mut self, ring: &Arc<Mapping>, slots: u32) {
        self.records = Some(Records { ring: ring.clone(), offset: layout::claims_offset(slots) });
    }

    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Whether a commit has something to do here.
    pub fn touched(&self) -> bool {
        !self.came.is_empty() || !self.going.is_empty()
    }

    /// A payload came at `position` of the ring. A token that no sound producer makes is a fault.
    pub fn claim(&mut self, slots: u32, token: u64, position: u64) -> Result<(), Fault> {
        let Some(records) = &self.records else { return Ok(()) };
        let index = token as u32;
        if index >= slots {
            return Err(Fault::Record);
        }
        records.store(index, CLAIM_CAME, 0);
        records.store(index, CLAIM_TOKEN, token);
        records.store(index, CLAIM_WENT, 0);
        records.store(index, CLAIM_CAME, position + 1);
        self.came.push((position, token));
        Ok(())
    }

    /// Give a payload back. The ring cannot overflow with a sound producer, and with an unsound one only its own
    /// tokens are overwritten. Returns the producer's armed word if it waits for room.
    pub fn push(&mut self, ring: &Mapping, slots: u32, direction: usize, token: u64) -> Wake {
        if let Some(records) = &self.records {
            // Not one that is held: of a poll that was taken back, or from before another process served.
            let held = |[named, came, went]: [u64; 3]| named == token && came != 0 && went == 0;
            if (token as u32) < slots && held(records.load(token as u32)) {
                records.store(token as u32, CLAIM_WENT, GOING);
                self.going.push(token);
            }
            return Wake(0);
        }
        ring.u64_at(return_place(slots, direction, self.tail)).store(token, Ordering::Relaxed);
        self.tail += 1;
        self.publish(ring, direction)
    }

    /// Put what is to go back into the ring of returns, for the commit to make it count.
    pub fn write(&mut self, ring: &Mapping, slots: u32, direction: usize) {
        let Some(records) = &self.records else { return };
        for token in self.going.drain(..) {
            ring.u64_at(return_place(slots, direction, self.tail)).store(token, Ordering::Release);
            self.tail += 1;
            records.store(token as u32, CLAIM_WENT, self.tail);
            self.written = true;
        }
        self.came.clear();
    }

    /// After the commit: let the producer see what went back.
    pub fn publish_written(&mut self, ring: &Mapping, direction: usize) -> Wake {
        if !std::mem::take(&mut self.written) {
            return Wake(0);
        }
        self.publish(ring, direction)
    }

    fn publish(&self, ring: &Mapping, direction: usize) -> Wake {
        let control = layout::OFF_DIRECTION[direction];
        ring.u64_at(control + layout::DIR_RETURN_TAIL).store(self.tail, Ordering::Release);
        let armed = control + layout::DIR_ROOM_ARMED;
        let sleepy = ring.u32_at(armed + layout::ARMED_SLEEPY).load(Ordering::Relaxed) != 0;
        take_down(ring.u32_at(armed), sleepy)
    }

    /// What came at `head` or after it comes again: it is not held, and does not go back.
    pub fn rewind(&mut self, head: u64) {
        let Some(records) = &self.records else { return };
        while let Some((position, token)) = self.came.pop() {
            if position < head {
                self.came.push((position, token));
                break;
            }
            records.store(token as u32, CLAIM_CAME, 0);
            self.going.retain(|going| *going != token);
        }
    }

    /// Go on where the process before stopped, which had for good received what came before `head` and given back `tail`
    /// tokens. What it still held goes back with the next commit: whoever read it is gone.
    pub fn resume(
        &mut self,
        ring: &Mapping,
        slots: u32,
        direction: usize,
        head: u64,
        tail: u64,
    ) -> Result<Wake, Fault> {
        let Some(records) = &self.records else { return Ok(Wake(0)) };
        (self.tail, self.written) = (tail, false);
        self.came.clear();
        self.going.clear();
        for index in 0..slots {
            let [token, came, went] = records.load(index);
            if came == 0 {
                continue;
            }
            if came > head {
                records.store(index, CLAIM_CAME, 0);
            } else if went == 0 || went > tail {
                if token as u32 != index {
                    return Err(Fault::Record);
                }
                records.store(index, CLAIM_WENT, GOING);
                self.going.push(token);
            }
        }
        Ok(self.publish(ring, direction))
    }
}

impl Default for Returns {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn payloads_out_never_overlap_and_stay_inside(sizes in prop::collection::vec((1usize..5000, any::<bool>()), 1..200)) {
            let pool = 64 * 1024;
            let mut allocations = Allocations::new(pool, 64);
            let mut out: Vec<(PoolRef, usize)> = Vec::new();
            for (len, give_back) in sizes {
                if give_back && !out.is_empty() {
                    let (place, _) = out.swap_remove(len % out.len());
                    prop_assert_eq!(allocations.free(place.token), Ok(()));
                    prop_assert_eq!(allocations.free(place.token), Err(Fault::Return));
                } else if let Some(place) = allocations.allocate(len) {
                    prop_assert!(place.offset as usize + len <= pool);
                    for (other, other_len) in &out {
                        let (a, b) = (place.offset as usize, other.offset as usize);
                        prop_assert!(a + len <= b || b + other_len <= a);
                    }
                    out.push((place, len));
                }
            }
            prop_assert_eq!(allocations.out(), out.len());
        }

        #[test]
        fn invented_tokens_are_refused(token: u64) {
            let mut allocations = Allocations::new(4096, 64);
            prop_assert_eq!(allocations.free(token), Err(Fault::Return));
        }
    }
}
