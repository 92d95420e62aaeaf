//! The payload pool of one direction: the producer allocates, the consumer gives back over a ring of tokens.
//!
//! All bookkeeping is the producer's own and private; shared are only the payload bytes (which the consumer maps
//! read-only) and the ring of tokens coming back. A token names an entry of the producer's table and its turn, so
//! that a token given back twice, or invented, is noticed. `offset-allocator` (Sebastian Aaltonen's two-level bins)
//! does the allocation in constant time.

use std::sync::atomic::Ordering;

use offset_allocator::{Allocation, Allocator};

use crate::error::Fault;
use crate::layout::{self, PoolRef, RETURN_ENTRY};
use crate::ring::{take_down, Wake};
use crate::segment::Mapping;

/// Allocation unit: a cache line, so that two payloads never share one.
const UNIT: usize = 64;

struct Entry {
    turn: u32,
    live: Option<Allocation>,
}

pub struct Allocations {
    allocator: Allocator,
    entries: Vec<Entry>,
    free: Vec<u32>,
    returned: u64,
    freed: u64,
    largest: usize,
}

impl Allocations {
    /// At most `slots` payloads can be out at once: the ring of tokens then never overflows.
    pub fn new(pool_bytes: usize, slots: u32) -> Allocations {
        let units = (pool_bytes / UNIT) as u32;
        Allocations {
            allocator: Allocator::with_max_allocs(units, slots + 2),
            entries: (0..slots).map(|_| Entry { turn: 0, live: None }).collect(),
            free: (0..slots).rev().collect(),
            returned: 0,
            freed: 0,
            largest: bin(units) as usize * UNIT,
        }
    }

    /// Bytes of the largest payload that the empty pool can hold.
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// Whether no amount of waiting makes room for `len` bytes.
    pub fn never(&self, len: usize) -> bool {
        len > self.largest || self.largest == 0
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
        let allocation = self.allocator.allocate(len.div_ceil(UNIT).max(1) as u32)?;
        let offset = allocation.offset as usize * UNIT;
        self.free.pop();
        let entry = &mut self.entries[index as usize];
        entry.turn = entry.turn.wrapping_add(1);
        entry.live = Some(allocation);
        Some(PoolRef { offset: offset as u64, token: u64::from(index) | u64::from(entry.turn) << 32 })
    }

    /// Free what a token names. A token that is not out is a fault of whoever gave it back.
    pub fn free(&mut self, token: u64) -> Result<(), Fault> {
        let (index, turn) = (token as u32, (token >> 32) as u32);
        let entry = self.entries.get_mut(index as usize).ok_or(Fault::Return)?;
        if entry.turn != turn {
            return Err(Fault::Return);
        }
        let allocation = entry.live.take().ok_or(Fault::Return)?;
        self.allocator.free(allocation);
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
        let area = layout::returns_offset(slots, direction);
        for index in self.returned..tail {
            let place = area + (index & u64::from(slots - 1)) as usize * RETURN_ENTRY;
            self.free(ring.u64_at(place).load(Ordering::Relaxed))?;
        }
        self.returned = tail;
        ring.u64_at(control + layout::DIR_RETURN_HEAD).store(tail, Ordering::Release);
        Ok(())
    }
}

/// The allocator's size class at or below `units`: free space is filed by its class (four significant bits), so this much
/// of an empty pool is sure to be found, and more of it is not.
fn bin(units: u32) -> u32 {
    let dropped = (u32::BITS - units.leading_zeros()).saturating_sub(4);
    units >> dropped << dropped
}

/// The consumer's side of the token ring.
pub struct Returns {
    tail: u64,
}

impl Returns {
    pub fn new() -> Returns {
        Returns { tail: 0 }
    }

    /// Give a payload back. The ring cannot overflow with a sound producer, and with an unsound one only its own
    /// tokens are overwritten. Returns the producer's armed word if it waits for room.
    pub fn push(&mut self, ring: &Mapping, slots: u32, direction: usize, token: u64) -> Wake {
        let control = layout::OFF_DIRECTION[direction];
        let area = layout::returns_offset(slots, direction);
        let place = area + (self.tail & u64::from(slots - 1)) as usize * RETURN_ENTRY;
        ring.u64_at(place).store(token, Ordering::Relaxed);
        self.tail += 1;
        ring.u64_at(control + layout::DIR_RETURN_TAIL).store(self.tail, Ordering::Release);
        let armed = control + layout::DIR_ROOM_ARMED;
        let sleepy = ring.u32_at(armed + layout::ARMED_SLEEPY).load(Ordering::Relaxed) != 0;
        take_down(ring.u32_at(armed), sleepy)
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
