//! Which bytes of something have come, in whatever order.

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Everything below is there.
    floor: u64,
    /// Beyond it, apart from each other and sorted.
    beyond: Vec<(u64, u64)>,
}

impl Ranges {
    /// Everything below `floor` is there.
    pub fn from(floor: u64) -> Ranges {
        Ranges { floor, beyond: Vec::new() }
    }

    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// How many bytes are there.
    pub fn count(&self) -> u64 {
        self.floor + self.beyond.iter().map(|range| range.1 - range.0).sum::<u64>()
    }

    /// How many pieces are apart from the rest.
    pub fn holes(&self) -> usize {
        self.beyond.len()
    }

    /// Bytes `start` to before `end` came. Whether any of them were not there.
    pub fn add(&mut self, start: u64, end: u64) -> bool {
        let (mut start, mut end) = (start.max(self.floor), end);
        if start >= end {
            return false;
        }
        if start == self.floor && self.beyond.is_empty() {
            self.floor = end;
            return true;
        }
        let first = self.beyond.partition_point(|range| range.1 < start);
        let last = self.beyond.partition_point(|range| range.0 <= end);
        if first < last {
            if self.beyond[first].0 <= start && end <= self.beyond[first].1 {
                return false;
            }
            start = start.min(self.beyond[first].0);
            end = end.max(self.beyond[last - 1].1);
        }
        self.beyond.splice(first..last, [(start, end)]);
        if self.beyond[0].0 <= self.floor {
            self.floor = self.beyond.remove(0).1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((0u64..120, 0u64..20), 1..80)) {
            let mut ranges = Ranges::default();
            let mut there = [false; 200];
            for (start, len) in steps {
                let new = there[start as usize..(start + len) as usize].iter().any(|there| !there);
                prop_assert_eq!(ranges.add(start, start + len), new);
                there[start as usize..(start + len) as usize].fill(true);
                let floor = there.iter().position(|there| !there).unwrap_or(200);
                prop_assert_eq!(ranges.floor(), floor as u64);
                prop_assert_eq!(ranges.count(), there.iter().filter(|there| **there).count() as u64);
                for range in &ranges.beyond {
                    prop_assert!(there[range.0 as usize..range.1 as usize].iter().all(|there| *there));
                    prop_assert!(range.0 > ranges.floor && !there[range.1 as usize]);
                }
            }
        }
    }
}
