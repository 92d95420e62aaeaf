//! A timing wheel (Varghese and Lauck, SOSP 1987; Carousel, SIGCOMM 2017): who wants to be looked at, and when. Entries are
//! cheap and may be stale; who is looked at too early comes again.

use super::{Nanos, MICROSECOND};

const SLOT: Nanos = MICROSECOND;
const SLOTS: usize = 4096;

pub struct Wheel {
    slots: Vec<Vec<u32>>,
    /// Which slots have something.
    full: [u64; SLOTS / 64],
    /// The slot of the wheel's present, in slots since 0.
    now: u64,
    /// Beyond the horizon: when, who.
    later: Vec<(Nanos, u32)>,
    /// The earliest of them.
    next_later: Nanos,
}

impl Wheel {
    pub fn new(now: Nanos) -> Wheel {
        Wheel {
            slots: vec![Vec::new(); SLOTS],
            full: [0; SLOTS / 64],
            now: now / SLOT,
            later: Vec::new(),
            next_later: Nanos::MAX,
        }
    }

    /// Never due early: at the end of the slot that `at` is in.
    pub fn insert(&mut self, at: Nanos, who: u32) {
        let slot = at.div_ceil(SLOT).max(self.now);
        if slot >= self.now + SLOTS as u64 {
            self.later.push((at, who));
            self.next_later = self.next_later.min(at);
            return;
        }
        let index = slot as usize % SLOTS;
        self.slots[index].push(who);
        self.full[index / 64] |= 1 << (index % 64);
    }

    /// Add whoever is due to `due`.
    pub fn expire(&mut self, now: Nanos, due: &mut Vec<u32>) {
        let to = now / SLOT;
        while let Some(slot) = self.next_slot().filter(|slot| *slot <= to) {
            let index = slot as usize % SLOTS;
            due.append(&mut self.slots[index]);
            self.full[index / 64] &= !(1 << (index % 64));
        }
        self.now = self.now.max(to);
        if self.next_later <= now + SLOTS as u64 / 2 * SLOT {
            self.next_later = Nanos::MAX;
            for (at, who) in std::mem::take(&mut self.later) {
                self.insert(at, who);
            }
            // What is due by now was put into the present slot.
            if self.next_slot().is_some_and(|slot| slot <= to) {
                self.expire(now, due);
            }
        }
    }

    /// When the next entry is due.
    pub fn next(&self) -> Option<Nanos> {
        let near = self.next_slot().map_or(Nanos::MAX, |slot| slot * SLOT);
        Some(near.min(self.next_later)).filter(|at| *at != Nanos::MAX)
    }

    fn next_slot(&self) -> Option<u64> {
        let start = self.now as usize % SLOTS;
        for step in 0..=SLOTS / 64 {
            let word = (start / 64 + step) % (SLOTS / 64);
            let mut bits = self.full[word];
            if step == 0 {
                bits &= u64::MAX << (start % 64);
            } else if step == SLOTS / 64 {
                bits &= !(u64::MAX << (start % 64));
            }
            if bits != 0 {
                let index = word * 64 + bits.trailing_zeros() as usize;
                return Some(self.now + ((index + SLOTS - start) % SLOTS) as u64);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everybody_comes_once_and_never_early(
            entries in proptest::collection::vec((0u64..20_000_000, 0u64..3_000_000), 1..100),
        ) {
            let mut wheel = Wheel::new(0);
            let mut now = 0;
            let mut wanted = Vec::new();
            let mut due = Vec::new();
            let mut seen = vec![false; entries.len()];
            for (who, (delay, step)) in entries.iter().enumerate() {
                wheel.insert(now + delay, who as u32);
                wanted.push(now + delay);
                now += step;
                wheel.expire(now, &mut due);
                for who in due.drain(..) {
                    prop_assert!(wanted[who as usize] <= now && !seen[who as usize]);
                    seen[who as usize] = true;
                }
            }
            while let Some(next) = wheel.next() {
                now = now.max(next);
                wheel.expire(now, &mut due);
                for who in due.drain(..) {
                    prop_assert!(wanted[who as usize] <= now && !seen[who as usize]);
                    // Nor late by more than a slot.
                    seen[who as usize] = true;
                }
            }
            prop_assert!(seen.iter().all(|seen| *seen));
        }
    }
}
