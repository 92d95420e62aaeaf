//! A hash table whose rows keep their slot: an index of (hash, slot) words with linear probing over dense slots.
//!
//! Only index words move (deleting shifts the following ones back, so there are no tombstones and lookups never get
//! slower with age); slots are given out in order and then from a list of freed ones. A slot is `crc u32 | state u32 |
//! key | row`, rounded up to 8; its checksum covers everything after itself. A freed slot holds the number + 1 of the
//! next freed one where its checksum was.

use std::hint::black_box;
use std::sync::Arc;

use super::frame::Frame;
use super::layout::{Kind, Object, META_FREE, META_LIVE, META_USED, META_WORDS};
use super::segment::Segment;
use super::{damaged, full, usage, Result};

pub const LIVE: u32 = 1;
pub const FREED: u32 = 2;
const HEAD: usize = 8;
/// Keys whose memory is fetched together by the packed operations.
const BATCH: usize = 16;

#[derive(Clone)]
pub struct Table {
    object: Arc<Object>,
    seed: [u64; 2],
}

enum Probe {
    Found { position: usize, slot: usize },
    Vacant { position: usize },
}

impl Table {
    /// Raises `Schema`.
    pub fn of(frame: &Frame, name: &str) -> Result<Table> {
        let object = frame.object(Kind::Table, name)?.clone();
        Ok(Table { object, seed: frame.header().seed })
    }

    pub fn object(&self) -> &Object {
        &self.object
    }

    pub fn key(&self) -> usize {
        self.object.spec.key
    }

    pub fn item(&self) -> usize {
        self.object.spec.item
    }

    /// Bytes of a slot.
    pub fn slot(&self) -> usize {
        self.object.stride
    }

    pub fn len(&self, frame: &Frame) -> usize {
        (frame.load(self.object.meta + META_LIVE) as usize).min(self.object.units)
    }

    pub fn is_empty(&self, frame: &Frame) -> bool {
        self.len(frame) == 0
    }

    /// Slots that were ever used.
    pub fn used(&self, frame: &Frame) -> usize {
        (frame.load(self.object.meta + META_USED) as usize).min(self.object.units)
    }

    /// Copy the row of `key`; false when there is none. Raises `Usage` on wrong sizes, `Damaged` when the index or the
    /// row is not what was written. For whoever runs the engine: another's half-written row looks damaged.
    #[inline]
    pub fn get(&self, frame: &Frame, key: &[u8], row: &mut [u8]) -> Result<bool> {
        self.check_sizes(key.len(), row.len())?;
        match self.find(frame, key, self.tag(key))? {
            Probe::Found { slot, .. } => {
                self.read_row(frame, slot, row);
                Ok(true)
            }
            Probe::Vacant { .. } => Ok(false),
        }
    }

    /// The slot of `key`, for `read_row`.
    pub fn slot_of(&self, frame: &Frame, key: &[u8]) -> Result<Option<usize>> {
        self.check_sizes(key.len(), self.item())?;
        match self.find(frame, key, self.tag(key))? {
            Probe::Found { slot, .. } => Ok(Some(slot)),
            Probe::Vacant { .. } => Ok(None),
        }
    }

    /// The row in `slot`, a number that `slot_of` gave.
    #[inline]
    pub fn read_row(&self, frame: &Frame, slot: usize, row: &mut [u8]) {
        frame.mapping().read(self.place(slot) + HEAD + self.key(), row);
    }

    /// Insert or replace. Raises `Usage`, `Full` (nothing was done then), `Damaged`.
    #[inline]
    pub fn put(&self, segment: &mut Segment, key: &[u8], row: &[u8]) -> Result<()> {
        self.check_sizes(key.len(), row.len())?;
        let stride = self.object.stride;
        let tag = self.tag(key);
        let probe = self.find(segment, key, tag)?;
        let mut bytes = std::mem::take(&mut segment.assembly);
        bytes.clear();
        bytes.extend_from_slice(&[0, 0, 0, 0]);
        bytes.extend_from_slice(&LIVE.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(row);
        bytes.resize(stride, 0);
        let crc = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        let done = match probe {
            Probe::Found { slot, .. } => segment.write(self.place(slot), &bytes).map(|()| slot),
            Probe::Vacant { position } => self.insert(segment, position, tag, &bytes),
        };
        segment.assembly = bytes;
        segment.changed_unit(&self.object, done?);
        Ok(())
    }

    fn insert(&self, segment: &mut Segment, position: usize, tag: u32, bytes: &[u8]) -> Result<usize> {
        let meta = self.object.meta;
        let (used, freed) = (segment.load(meta + META_USED), segment.load(meta + META_FREE));
        let slot = if freed != 0 {
            freed as usize - 1
        } else if used < self.object.units as u64 {
            used as usize
        } else if used == self.object.units as u64 {
            return full(format!("table {:?} has all its {used} rows", self.object.spec.name));
        } else {
            return damaged(format!("table {:?} claims {used} slots", self.object.spec.name));
        };
        let next = if freed != 0 { self.freed_after(segment, slot)? } else { 0 };
        // A row that was deleted in this very poll may have to come back; nothing else in the slot could be lost.
        let lost = if segment.freed.contains(&(self.object.id, slot)) { self.object.stride } else { HEAD };
        segment.reserve(3, META_WORDS * 8 + lost + 8)?;
        segment.log_counters(&self.object)?;
        segment.log(self.place(slot), lost)?;
        segment.put(self.place(slot), bytes);
        segment.write_word(self.index(position), u64::from(tag) << 32 | (slot as u64 + 1))?;
        if freed != 0 {
            segment.store(meta + META_FREE, next);
        } else {
            segment.store(meta + META_USED, used + 1);
        }
        let live = segment.load(meta + META_LIVE);
        segment.store(meta + META_LIVE, live.wrapping_add(1));
        Ok(slot)
    }

    /// What follows `slot` (which may be out of range) in the list of freed ones.
    fn freed_after(&self, frame: &Frame, slot: usize) -> Result<u64> {
        if slot < self.object.units {
            let head = frame.load(self.place(slot));
            if (head >> 32) as u32 == FREED {
                return Ok(u64::from(head as u32));
            }
        }
        damaged(format!("the list of freed slots of table {:?} is broken", self.object.spec.name))
    }

    /// Whether there was such a row. Raises as `put`.
    pub fn delete(&self, segment: &mut Segment, key: &[u8]) -> Result<bool> {
        self.check_sizes(key.len(), self.item())?;
        let Probe::Found { position, slot } = self.find(segment, key, self.tag(key))? else { return Ok(false) };
        let moves = self.shifts(segment, position);
        let meta = self.object.meta;
        segment.reserve(moves.len() + 3, META_WORDS * 8 + HEAD * (moves.len() + 2))?;
        segment.log_counters(&self.object)?;
        let freed = segment.load(meta + META_FREE);
        segment.write_word(self.place(slot), u64::from(FREED) << 32 | (freed & u64::from(u32::MAX)))?;
        segment.store(meta + META_FREE, slot as u64 + 1);
        segment.freed.insert((self.object.id, slot));
        let live = segment.load(meta + META_LIVE);
        segment.store(meta + META_LIVE, live.wrapping_sub(1));
        let mut hole = position;
        for from in moves {
            let entry = segment.load(self.index(from));
            segment.write_word(self.index(hole), entry)?;
            hole = from;
        }
        segment.write_word(self.index(hole), 0)?;
        segment.changed_unit(&self.object, slot);
        Ok(true)
    }

    /// Positions whose words move, each into the hole that the one before left, when `hole` is emptied.
    fn shifts(&self, frame: &Frame, mut hole: usize) -> Vec<usize> {
        let entries = self.object.index_len;
        let distance = |from: usize, to: usize| if to >= from { to - from } else { to + entries - from };
        let mut moves = Vec::new();
        let mut position = hole;
        for _ in 1..entries {
            position = self.after(position);
            let entry = frame.load(self.index(position));
            if entry == 0 {
                break;
            }
            if distance(self.home(entry >> 32), position) >= distance(hole, position) {
                moves.push(position);
                hole = position;
            }
        }
        moves
    }

    /// For each packed key its row into `rows`, 1 or 0 into `found`; how many were found.
    pub fn get_packed(&self, frame: &Frame, keys: &[u8], rows: &mut [u8], found: &mut [u8]) -> Result<usize> {
        let count = self.check_packed(keys.len(), rows.len())?;
        if found.len() < count {
            return usage(format!("{count} keys need as many bytes of `found`"));
        }
        let (key, item) = (self.key(), self.item());
        let mut total = 0;
        for first in (0..count).step_by(BATCH) {
            let last = count.min(first + BATCH);
            let tags = self.fetch(frame, &keys[first * key..last * key]);
            for i in first..last {
                let hit = match self.find(frame, &keys[i * key..(i + 1) * key], tags[i - first])? {
                    Probe::Found { slot, .. } => {
                        self.read_row(frame, slot, &mut rows[i * item..(i + 1) * item]);
                        true
                    }
                    Probe::Vacant { .. } => false,
                };
                found[i] = u8::from(hit);
                total += usize::from(hit);
            }
        }
        Ok(total)
    }

    /// Insert or replace packed rows under packed keys. Raises as `put`: what came before the failing one was done.
    pub fn put_packed(&self, segment: &mut Segment, keys: &[u8], rows: &[u8]) -> Result<()> {
        let count = self.check_packed(keys.len(), rows.len())?;
        let (key, item) = (self.key(), self.item());
        for first in (0..count).step_by(BATCH) {
            let last = count.min(first + BATCH);
            self.fetch(segment, &keys[first * key..last * key]);
            for i in first..last {
                self.put(segment, &keys[i * key..(i + 1) * key], &rows[i * item..(i + 1) * item])?;
            }
        }
        Ok(())
    }

    /// Delete packed keys; how many there were.
    pub fn delete_packed(&self, segment: &mut Segment, keys: &[u8]) -> Result<usize> {
        let key = self.key();
        if keys.len() % key != 0 {
            return usage(format!("{} bytes are no whole number of keys of {key}", keys.len()));
        }
        let mut total = 0;
        for batch in keys.chunks(key * BATCH) {
            self.fetch(segment, batch);
            for one in batch.chunks_exact(key) {
                total += usize::from(self.delete(segment, one)?);
            }
        }
        Ok(total)
    }

    /// Copy slots from `start` on; how many. Whoever runs the engine may be changing them.
    pub fn slots(&self, frame: &Frame, start: usize, out: &mut [u8]) -> usize {
        let stride = self.object.stride;
        let count = self.used(frame).saturating_sub(start).min(out.len() / stride);
        if count > 0 {
            frame.mapping().read(self.place(start), &mut out[..count * stride]);
        }
        count
    }

    /// Every row with its key, for who is about to serve. Raises `Damaged`, and what `look` raises.
    pub fn each(&self, frame: &Frame, mut look: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        let mut slot = vec![0; self.object.stride];
        for number in 0..self.used(frame) {
            self.slots(frame, number, &mut slot);
            let [crc, state] = [0, 4].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| slot[at + byte])));
            if state != LIVE {
                continue;
            }
            if crc32c::crc32c(&slot[4..]) != crc {
                return damaged(format!("a row of table {:?} does not match its checksum", self.object.spec.name));
            }
            let (key, row) = slot[HEAD..].split_at(self.key());
            look(key, &row[..self.item()])?;
        }
        Ok(())
    }

    /// Copy the slots whose numbers are given. Raises `Usage`.
    pub fn gather(&self, frame: &Frame, slots: impl ExactSizeIterator<Item = u64>, out: &mut [u8]) -> Result<()> {
        let stride = self.object.stride;
        if out.len() < slots.len() * stride {
            return usage(format!("{} slots of {stride} bytes do not fit in {}", slots.len(), out.len()));
        }
        for (number, place) in slots.zip(out.chunks_exact_mut(stride)) {
            if number >= self.object.units as u64 {
                return usage(format!("there is no slot {number}"));
            }
            frame.mapping().read(self.place(number as usize), place);
        }
        Ok(())
    }

    /// Where `key` is, or would be inserted. Ends after one round however the index looks.
    #[inline]
    fn find(&self, frame: &Frame, key: &[u8], tag: u32) -> Result<Probe> {
        let mut position = self.home(u64::from(tag));
        for _ in 0..self.object.index_len {
            let entry = frame.load(self.index(position));
            if entry == 0 {
                return Ok(Probe::Vacant { position });
            }
            if (entry >> 32) as u32 == tag {
                let slot = (entry as u32).wrapping_sub(1) as usize;
                if slot >= self.object.units {
                    return damaged(format!("the index of table {:?} points outside of it", self.object.spec.name));
                }
                // Its key may be what was destroyed: then it would not be found, and a new row would take its place.
                self.check_slot(frame, slot)?;
                if self.holds(frame, slot, key) {
                    return Ok(Probe::Found { position, slot });
                }
            }
            position = self.after(position);
        }
        damaged(format!("the index of table {:?} has no end", self.object.spec.name))
    }

    /// Raises `Damaged` unless the slot holds what was written to it.
    #[inline]
    fn check_slot(&self, frame: &Frame, slot: usize) -> Result<()> {
        let (mut place, end) = (self.place(slot), self.place(slot) + self.object.stride);
        let sum = frame.load(place) as u32;
        let mut bytes = [0; 64];
        place += 4;
        let mut crc = 0;
        while place < end {
            let chunk = &mut bytes[..64.min(end - place)];
            frame.mapping().read(place, chunk);
            crc = crc32c::crc32c_append(crc, chunk);
            place += chunk.len();
        }
        if crc != sum {
            return damaged(format!("slot {slot} of table {:?} is not what was written there", self.object.spec.name));
        }
        Ok(())
    }

    #[inline]
    fn holds(&self, frame: &Frame, slot: usize, key: &[u8]) -> bool {
        let mut place = self.place(slot) + HEAD;
        for chunk in key.chunks(8) {
            // A slot is a multiple of 8, so the word of a short chunk is in it, too.
            let word = frame.load(place);
            if (word ^ word_of(chunk)) & (u64::MAX >> (64 - 8 * chunk.len())) != 0 {
                return false;
            }
            place += 8;
        }
        true
    }

    /// Touch what operations on these keys will need, so that their cache misses overlap; the tags of the keys.
    fn fetch(&self, frame: &Frame, keys: &[u8]) -> [u32; BATCH] {
        let mut tags = [0; BATCH];
        let mut entries = [0; BATCH];
        for (i, key) in keys.chunks_exact(self.key()).enumerate() {
            tags[i] = self.tag(key);
            entries[i] = frame.load(self.index(self.home(u64::from(tags[i]))));
        }
        let slots = entries.map(|entry| (entry as u32).wrapping_sub(1) as usize);
        for slot in slots.into_iter().filter(|slot| *slot < self.object.units) {
            black_box(frame.load(self.place(slot)));
        }
        tags
    }

    #[inline]
    pub(super) fn tag(&self, key: &[u8]) -> u32 {
        (hash(self.seed, key) >> 32) as u32
    }

    #[inline]
    pub(super) fn home(&self, tag: u64) -> usize {
        ((tag * self.object.index_len as u64) >> 32) as usize
    }

    #[inline]
    fn after(&self, position: usize) -> usize {
        if position + 1 == self.object.index_len {
            0
        } else {
            position + 1
        }
    }

    #[inline]
    fn index(&self, position: usize) -> usize {
        self.object.index + position * 8
    }

    #[inline]
    fn place(&self, slot: usize) -> usize {
        self.object.data + slot * self.object.stride
    }

    #[inline]
    fn check_sizes(&self, key: usize, row: usize) -> Result<()> {
        if key != self.key() || row != self.item() {
            return usage(format!(
                "table {:?} has keys of {} and rows of {} bytes, not {key} and {row}",
                self.object.spec.name,
                self.key(),
                self.item()
            ));
        }
        Ok(())
    }

    fn check_packed(&self, keys: usize, rows: usize) -> Result<usize> {
        let count = keys / self.key();
        if keys % self.key() != 0 || rows != count * self.item() {
            return usage(format!(
                "{keys} bytes of keys and {rows} of rows are not as many of {} and {}",
                self.key(),
                self.item()
            ));
        }
        Ok(count)
    }
}

/// Seeded by the segment, so that whoever chooses the keys cannot choose collisions.
#[inline]
fn hash(seed: [u64; 2], key: &[u8]) -> u64 {
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    };
    let multiplier = seed[1] | 1;
    let mut hash = seed[0] ^ key.len() as u64;
    for chunk in key.chunks(8) {
        hash = fold(hash ^ word_of(chunk), multiplier).wrapping_add(seed[0]);
    }
    fold(hash, 0x9e37_79b9_7f4a_7c15)
}

#[inline]
fn word_of(chunk: &[u8]) -> u64 {
    match <[u8; 8]>::try_from(chunk) {
        Ok(word) => u64::from_le_bytes(word),
        Err(_) => chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    }
}
