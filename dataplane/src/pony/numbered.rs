//! Things with numbers: in memory for speed, and in a table of the state, where they are found again after an upgrade
//! or a crash.

use rustc_hash::FxHashMap;

use crate::state::{Frame, Kind, ObjectSpec, Result, Segment, StateError, Table};

/// Another host as the owner of what it has here: no channel has such a number.
pub fn of_link(link: u32) -> u64 {
    1 << 63 | u64::from(link)
}

/// What `Numbered` holds, and how a row of its table looks.
pub trait Row: Sized {
    const TABLE: &'static str;
    /// Bytes of a row.
    const BYTES: usize;
    /// The most that there can be.
    const COUNT: usize;
    /// For inspection: names and types of the fields, as JSON.
    const FIELDS: &'static str;

    fn write(&self, row: &mut [u8]);
    /// None when the bytes can be no row.
    fn read(row: &[u8]) -> Option<Self>;

    /// Who it is for, where that has to be counted: an application's channel, or a `Link` (`of_link`).
    fn owner(&self) -> Option<u64> {
        None
    }
}

pub struct Numbered<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
    /// How many each owner has.
    shares: FxHashMap<u64, usize>,
    table: Option<Table>,
}

/// The smallest number that is given: 0 means none.
const FIRST: u32 = 1;

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Numbered {
            items: (0..FIRST).map(|_| None).collect(),
            free: Vec::new(),
            shares: FxHashMap::default(),
            table: None,
        }
    }
}

impl<T: Row> Numbered<T> {
    pub fn object() -> ObjectSpec {
        ObjectSpec {
            kind: Kind::Table,
            name: T::TABLE.into(),
            key: 8,
            item: T::BYTES,
            count: T::COUNT,
            fields: T::FIELDS.into(),
        }
    }

    /// Everything that the state has. Raises `Schema`, `Damaged`.
    pub fn adopt(frame: &Frame) -> Result<Numbered<T>> {
        let table = Table::of(frame, T::TABLE)?;
        let mut found = Numbered::default();
        table.each(frame, |key, row| {
            let number = <[u8; 8]>::try_from(key).map(u64::from_le_bytes).unwrap_or(u64::MAX);
            let item = T::read(row).filter(|_| number < T::COUNT as u64 && number >= u64::from(FIRST));
            let item =
                item.ok_or_else(|| StateError::Damaged(format!("a row of table {:?} makes no sense", T::TABLE)))?;
            let number = number as usize;
            found.count(&item);
            if found.items.len() <= number {
                found.items.resize_with(number + 1, || None);
            }
            found.items[number] = Some(item);
            Ok(())
        })?;
        found.free =
            (FIRST..found.items.len() as u32).rev().filter(|number| found.items[*number as usize].is_none()).collect();
        found.table = Some(table);
        Ok(found)
    }

    #[inline]
    pub fn get(&self, number: u32) -> Option<&T> {
        self.items.get(number as usize)?.as_ref()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(number, item)| Some((number as u32, item.as_ref()?)))
    }

    /// How many more there can be.
    pub fn left(&self) -> usize {
        T::COUNT - self.items.len().max(FIRST as usize) + self.free.len()
    }

    /// Whether an owner may have so many more: nobody has more than is left for others, so that there is always
    /// something left for those who have little. (Choudhury and Hahne, "Dynamic queue length thresholds for
    /// shared-memory packet switches", 1998, with a factor of 1.)
    pub fn may_have(&self, owner: u64, more: usize) -> bool {
        self.shares.get(&owner).copied().unwrap_or(0) + more <= self.left()
    }

    fn count(&mut self, item: &T) {
        if let Some(owner) = item.owner() {
            *self.shares.entry(owner).or_default() += 1;
        }
    }

    fn uncount(&mut self, owner: Option<u64>) {
        let Some(owner) = owner else { return };
        if let Some(share) = self.shares.get_mut(&owner) {
            *share -= 1;
            if *share == 0 {
                self.shares.remove(&owner);
            }
        }
    }

    /// The number of a new item. Raises `Full`.
    pub fn insert(&mut self, segment: &mut Segment, item: T) -> Result<u32> {
        let number = self.free.last().copied().unwrap_or(self.items.len() as u32);
        if number as usize >= T::COUNT {
            return Err(StateError::Full(format!("there are {} {} already", T::COUNT, T::TABLE)));
        }
        self.store(segment, number, &item)?;
        self.count(&item);
        self.free.pop();
        if number as usize == self.items.len() {
            self.items.push(None);
        }
        self.items[number as usize] = Some(item);
        Ok(number)
    }

    /// Change an item that is there. Raises `Full`.
    pub fn update(&mut self, segment: &mut Segment, number: u32, change: impl FnOnce(&mut T)) -> Result<()> {
        let Some(mut item) = self.items.get_mut(number as usize).and_then(Option::take) else { return Ok(()) };
        let owner = item.owner();
        change(&mut item);
        if item.owner() != owner {
            self.uncount(owner);
            self.count(&item);
        }
        let stored = self.store(segment, number, &item);
        self.items[number as usize] = Some(item);
        stored
    }

    pub fn remove(&mut self, segment: &mut Segment, number: u32) -> Result<Option<T>> {
        let Some(item) = self.items.get_mut(number as usize).and_then(Option::take) else { return Ok(None) };
        self.free.push(number);
        self.uncount(item.owner());
        if let Some(table) = &self.table {
            table.delete(segment, &u64::from(number).to_le_bytes())?;
        }
        Ok(Some(item))
    }

    fn store(&self, segment: &mut Segment, number: u32, item: &T) -> Result<()> {
        let mut row = vec![0; T::BYTES];
        item.write(&mut row);
        match &self.table {
            Some(table) => table.put(segment, &u64::from(number).to_le_bytes(), &row),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    struct Thing(u64);

    impl Row for Thing {
        const TABLE: &'static str = "things";
        const BYTES: usize = 8;
        const COUNT: usize = 40;
        const FIELDS: &'static str = "{}";

        fn write(&self, row: &mut [u8]) {
            row.copy_from_slice(&self.0.to_le_bytes());
        }

        fn read(row: &[u8]) -> Option<Self> {
            Some(Thing(u64::from_le_bytes(*row.first_chunk()?)))
        }

        fn owner(&self) -> Option<u64> {
            Some(self.0)
        }
    }

    fn segment() -> Segment {
        use crate::state::{Schema, MIN_BYTES};
        use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
        let objects = vec![Numbered::<Thing>::object()];
        let schema = Schema { engine: "t".into(), name: "t".into(), version: 1, oldest: 1, objects };
        let fd = memfd_create("things", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, MIN_BYTES as u64 + (64 << 10)).expect("ftruncate");
        Frame::format(fd.as_fd(), &schema, 4096).expect("format");
        Segment::open(fd.as_fd(), true).expect("open")
    }

    proptest! {
        /// Whatever comes and goes, and whoever takes all that they may: shares are right, also for who adopts the state,
        /// and somebody without any finds room.
        #[test]
        fn whoever_has_nothing_may_have_something(steps in proptest::collection::vec((0u64..4, any::<bool>()), 1..200)) {
            let mut segment = segment();
            let mut things = Numbered::<Thing>::adopt(&segment).expect("adopt");
            for (owner, more) in steps {
                let mine = things.iter().find(|(_, thing)| thing.0 == owner).map(|(number, _)| number);
                if more && things.may_have(owner, 1) {
                    things.insert(&mut segment, Thing(owner)).expect("insert");
                } else if let (false, Some(number)) = (more, mine) {
                    things.update(&mut segment, number, |thing| thing.0 = (owner + 1) % 4).expect("update");
                    things.remove(&mut segment, number).expect("remove");
                }
                segment.commit();
                let again = Numbered::<Thing>::adopt(&segment).expect("adopt");
                for owner in 0..4 {
                    let count = things.iter().filter(|(_, thing)| thing.0 == owner).count();
                    prop_assert_eq!(things.shares.get(&owner).copied().unwrap_or(0), count);
                    prop_assert_eq!(again.shares.get(&owner).copied().unwrap_or(0), count);
                    prop_assert_eq!(things.may_have(owner, 1), count < things.left());
                }
                prop_assert!(things.may_have(9, 1));
            }
        }
    }
}
