//! Items of one size under stable numbers: a bit each for being in use, a checksum each, made at the commit.

use std::sync::Arc;

use super::frame::Frame;
use super::layout::{Kind, Object, META_LIVE, META_USED, META_WORDS};
use super::segment::Segment;
use super::{damaged, full, usage, Result};

#[derive(Clone)]
pub struct Slab {
    object: Arc<Object>,
}

static ZEROES: [u8; 4096] = [0; 4096];

impl Slab {
    /// Raises `Schema`.
    pub fn of(frame: &Frame, name: &str) -> Result<Slab> {
        Ok(Slab { object: frame.object(Kind::Slab, name)?.clone() })
    }

    pub fn object(&self) -> &Object {
        &self.object
    }

    pub fn len(&self, frame: &Frame) -> usize {
        (frame.load(self.object.meta + META_LIVE) as usize).min(self.object.units)
    }

    pub fn is_empty(&self, frame: &Frame) -> bool {
        self.len(frame) == 0
    }

    /// The number of a zeroed item. Raises `Full`, `Damaged`.
    pub fn allocate(&self, segment: &mut Segment) -> Result<usize> {
        if self.len(segment) == self.object.units {
            return full(format!("slab {:?} has all its {} items", self.object.spec.name, self.object.units));
        }
        let Some(index) = self.vacant(segment) else {
            return damaged(format!("slab {:?} has no vacant item and says it had", self.object.spec.name));
        };
        self.occupy(segment, index)?;
        self.zero(segment, index);
        segment.changed_unit(&self.object, index);
        Ok(index)
    }

    /// Give an item back. Raises `Usage` when it is not in use.
    pub fn free(&self, segment: &mut Segment, index: usize) -> Result<()> {
        self.check_live(segment, index)?;
        segment.reserve(2, META_WORDS * 8 + 8)?;
        segment.log_counters(&self.object)?;
        let live = segment.load(self.object.meta + META_LIVE);
        segment.store(self.object.meta + META_LIVE, live.wrapping_sub(1));
        let word = self.word(index);
        let bits = segment.load(word) & !(1 << (index % 64));
        segment.write_word(word, bits)?;
        segment.hints[self.object.id] = index;
        segment.freed.insert((self.object.id, index));
        segment.changed_unit(&self.object, index);
        Ok(())
    }

    /// Copy an item's bytes from `offset` on. Raises `Usage`.
    pub fn read(&self, frame: &Frame, index: usize, offset: usize, out: &mut [u8]) -> Result<()> {
        self.check_live(frame, index)?;
        self.check_range(offset, out.len())?;
        frame.mapping().read(self.place(index) + offset, out);
        Ok(())
    }

    /// Raises `Usage`, `Full`.
    pub fn write(&self, segment: &mut Segment, index: usize, offset: usize, data: &[u8]) -> Result<()> {
        self.check_live(segment, index)?;
        self.check_range(offset, data.len())?;
        segment.reserve(2, data.len().next_multiple_of(8) + 8)?;
        segment.write(self.place(index) + offset, data)?;
        segment.unsum(&self.object, index)
    }

    /// Make item `index` live with these bytes, whatever it was. Raises `Usage`, `Full`.
    pub fn put_at(&self, segment: &mut Segment, index: usize, data: &[u8]) -> Result<()> {
        if index >= self.object.units || data.len() != self.object.stride {
            return usage(format!("slab {:?}: no item {index} of {} bytes", self.object.spec.name, data.len()));
        }
        if self.live_bit(segment, index) {
            return self.write(segment, index, 0, data);
        }
        self.occupy(segment, index)?;
        segment.put(self.place(index), data);
        segment.unsum(&self.object, index)
    }

    /// Numbers of the items in use.
    pub fn live(&self, frame: &Frame) -> Vec<u64> {
        let mut numbers = Vec::with_capacity(self.len(frame));
        for word in 0..self.object.index_len {
            let mut bits = frame.load(self.object.index + word * 8);
            while bits != 0 {
                let index = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if index < self.object.units {
                    numbers.push(index as u64);
                }
            }
        }
        numbers
    }

    /// Set an item's bit and its checksum, that of zeroes; counts it. Its bytes are the caller's to write: they are
    /// logged when they were in use at the last commit.
    fn occupy(&self, segment: &mut Segment, index: usize) -> Result<()> {
        let object = &self.object;
        let lost = if segment.freed.contains(&(object.id, index)) { object.stride } else { 0 };
        // One record and word more, for the checksum that `put_at` has made.
        segment.reserve(5, META_WORDS * 8 + 3 * 8 + lost.next_multiple_of(8))?;
        segment.log_counters(object)?;
        if lost > 0 {
            segment.log(self.place(index), lost)?;
        }
        let (live, used) = (segment.load(object.meta + META_LIVE), segment.load(object.meta + META_USED));
        segment.store(object.meta + META_LIVE, live.wrapping_add(1));
        segment.store(object.meta + META_USED, used.max(index as u64 + 1));
        segment.log((object.crc + index * 4) & !7, 8)?;
        segment.put(object.crc + index * 4, &[0; 4]);
        let bits = segment.load(self.word(index)) | 1 << (index % 64);
        segment.write_word(self.word(index), bits)?;
        segment.hints[object.id] = index + 1;
        Ok(())
    }

    fn zero(&self, segment: &Segment, index: usize) {
        let mut done = 0;
        while done < self.object.stride {
            let take = ZEROES.len().min(self.object.stride - done);
            segment.put(self.place(index) + done, &ZEROES[..take]);
            done += take;
        }
    }

    fn vacant(&self, segment: &Segment) -> Option<usize> {
        let words = self.object.index_len;
        let first = segment.hints[self.object.id] / 64 % words;
        (0..words).map(|step| (first + step) % words).find_map(|word| {
            let free = !segment.load(self.object.index + word * 8);
            let index = word * 64 + free.trailing_zeros() as usize;
            (free != 0 && index < self.object.units).then_some(index)
        })
    }

    pub(super) fn live_bit(&self, frame: &Frame, index: usize) -> bool {
        frame.load(self.word(index)) >> (index % 64) & 1 != 0
    }

    fn word(&self, index: usize) -> usize {
        self.object.index + index / 64 * 8
    }

    fn place(&self, index: usize) -> usize {
        self.object.data + index * self.object.stride
    }

    fn check_live(&self, frame: &Frame, index: usize) -> Result<()> {
        if index >= self.object.units || !self.live_bit(frame, index) {
            return usage(format!("slab {:?}: item {index} is not in use", self.object.spec.name));
        }
        Ok(())
    }

    fn check_range(&self, offset: usize, len: usize) -> Result<()> {
        if offset > self.object.stride || len > self.object.stride - offset {
            return usage(format!("{len} bytes at {offset} exceed an item of {}", self.object.stride));
        }
        Ok(())
    }
}
