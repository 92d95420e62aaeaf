//! The receiving side: which packets have come.

use super::wire::{Version, WORDS};

/// Everything below `ack` came or will never come; bit i: packet `ack + i` came. Bit 0 is therefore never set.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    pub ack: u64,
    /// Above everything that came.
    top: u64,
    bits: [u64; WORDS + 1],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    New,
    Old,
    /// Beyond what could be acknowledged.
    Beyond,
}

impl Window {
    fn has(&self, offset: u64) -> bool {
        self.bits[offset as usize / 64] >> (offset % 64) & 1 != 0
    }

    /// The sender sends nothing below `floor` any more.
    pub fn raise(&mut self, floor: u64) {
        let Some(by) = floor.checked_sub(self.ack) else { return };
        self.shift(by);
        self.settle();
    }

    fn shift(&mut self, by: u64) {
        self.ack += by;
        self.top = self.top.max(self.ack);
        let (words, bits) = ((by / 64) as usize, by % 64);
        if by >= 64 * (WORDS as u64 + 1) {
            self.bits = [0; WORDS + 1];
            return;
        }
        for i in 0..=WORDS {
            let low = self.bits.get(i + words).copied().unwrap_or(0);
            let high = self.bits.get(i + words + 1).copied().unwrap_or(0);
            self.bits[i] = if bits == 0 { low } else { low >> bits | high << (64 - bits) };
        }
    }

    fn settle(&mut self) {
        while self.bits[0] & 1 != 0 {
            let ones = u64::from(self.bits[0].trailing_ones());
            self.shift(ones);
        }
    }

    /// Where packet `seq` belongs.
    pub fn place(&self, seq: u64, version: Version) -> Place {
        match seq.checked_sub(self.ack) {
            None => Place::Old,
            Some(offset) if offset > version.window() => Place::Beyond,
            Some(offset) if self.has(offset) => Place::Old,
            Some(_) => Place::New,
        }
    }

    /// Packet `seq` came; it was `New`. Whether it is the one after the highest that had come.
    pub fn take(&mut self, seq: u64) -> bool {
        let offset = seq - self.ack;
        self.bits[offset as usize / 64] |= 1 << (offset % 64);
        let in_order = seq == self.top;
        self.top = self.top.max(seq + 1);
        self.settle();
        in_order
    }

    /// For a header: bit i is packet `ack + 1 + i`.
    pub fn sack(&self) -> [u64; WORDS] {
        std::array::from_fn(|i| self.bits[i] >> 1 | self.bits[i + 1] << 63)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((0u64..700, any::<bool>()), 1..400)) {
            let mut window = Window::default();
            let (mut came, mut floor) = (BTreeSet::new(), 0u64);
            for (seq, raise) in steps {
                if raise && seq % 7 == 0 {
                    floor = floor.max(seq / 2);
                    window.raise(seq / 2);
                } else if window.place(seq, Version::Two) == Place::New {
                    let top = came.last().map_or(0, |last| last + 1).max(floor);
                    prop_assert_eq!(window.take(seq), seq == top);
                    came.insert(seq);
                }
                let first_missing = (floor..).find(|seq| !came.contains(seq)).unwrap_or(u64::MAX);
                prop_assert!(window.ack >= floor);
                prop_assert!((floor.min(window.ack)..window.ack).all(|seq| seq < floor || came.contains(&seq)));
                prop_assert!(window.ack <= first_missing.max(floor));
                let sack = window.sack();
                for bit in 0..256u64 {
                    let marked = sack[bit as usize / 64] >> (bit % 64) & 1 != 0;
                    prop_assert_eq!(marked, came.contains(&(window.ack + 1 + bit)), "bit {}", bit);
                }
            }
        }
    }
}
