//! Is this state what its engine wrote? Every checksum and link, without trusting any of them.
//!
//! The state may be in use by another process: what does not match is looked at again, and links and counts are only
//! judged when nothing was written while they were read. Reads go through the descriptor, which leaves holes holes.

use std::collections::HashSet;
use std::time::Duration;

use super::copy::data_after;
use super::frame::{Frame, Word};
use super::layout::{Kind, Object, META_FREE, META_LIVE, META_USED};
use super::segment::{unfinished, unit_crc, units_in};
use super::slab::Slab;
use super::snapshot;
use super::table::{Table, FREED, LIVE};
use super::{Result, StateError};

/// Enough to know that a state is damaged, and where.
const MOST: usize = 16;
const CHUNK: usize = 256 * 1024;
/// Something that another process is writing settles within a poll.
const LOOKS: u32 = 40;
const BETWEEN: Duration = Duration::from_micros(50);
const TRIES: usize = 3;

/// What is wrong, in words, at most 16 of them. Raises `Os`.
pub fn verify(frame: &Frame) -> Result<Vec<String>> {
    let mut check = Check { frame, pending: HashSet::new(), unfinished: false, wrong: Vec::new() };
    match check.all() {
        Err(StateError::Damaged(what) | StateError::Schema(what)) => check.complain(what),
        other => other?,
    }
    check.wrong.truncate(MOST);
    Ok(check.wrong)
}

struct Check<'a> {
    frame: &'a Frame,
    /// Units that an unfinished poll may have changed half: rolling it back restores them.
    pending: HashSet<(usize, usize)>,
    unfinished: bool,
    wrong: Vec<String>,
}

/// What one pass over a table saw of its slots.
struct Slots {
    states: Vec<u32>,
    /// The key's tag of a live slot, the link of a freed one.
    words: Vec<u32>,
}

impl Check<'_> {
    fn all(&mut self) -> Result<()> {
        self.frame.recheck()?;
        self.frame.phase()?;
        self.log()?;
        self.settled(|frame| snapshot::saved(frame).map(drop))?;
        for object in self.frame.objects() {
            if self.enough() {
                break;
            }
            match object.spec.kind {
                Kind::Table => self.table(object)?,
                Kind::Slab => self.slab(object)?,
                Kind::Array => self.array(object)?,
            }
        }
        Ok(())
    }

    fn complain(&mut self, what: String) {
        self.wrong.push(what);
    }

    fn enough(&self) -> bool {
        self.wrong.len() >= MOST
    }

    /// What tells whether somebody is writing.
    fn pulse(&self) -> [u64; 3] {
        [Word::Epoch, Word::LogStamp, Word::LogLen].map(|word| self.frame.get(word))
    }

    /// Repeat a check that fails while somebody is writing.
    fn settled<T>(&self, look: impl Fn(&Frame) -> Result<T>) -> Result<T> {
        for _ in 0..LOOKS {
            let before = self.pulse();
            match look(self.frame) {
                Err(StateError::Damaged(_)) if self.pulse() != before => std::thread::sleep(BETWEEN),
                other => return other,
            }
        }
        look(self.frame)
    }

    fn log(&mut self) -> Result<()> {
        let records = self.settled(unfinished)?;
        self.unfinished = !records.is_empty();
        for record in &records {
            if let Some((object, units)) = units_in(self.frame, record.offset, record.len) {
                self.pending.extend(units.map(|unit| (object.id, unit)));
            }
        }
        Ok(())
    }

    /// Look at one thing until it is right, a few times.
    fn lasting(&self, object: &Object, unit: usize, right: impl Fn() -> bool) -> bool {
        if self.pending.contains(&(object.id, unit)) {
            return true;
        }
        (0..LOOKS).any(|look| {
            if look > 0 {
                std::thread::sleep(BETWEEN);
            }
            right()
        })
    }

    /// Run a pass that returns what is wrong with links and counts; believed only when nobody wrote meanwhile.
    fn structure(&mut self, mut pass: impl FnMut(&mut Self) -> Result<Vec<String>>) -> Result<()> {
        for _ in 0..TRIES {
            let (before, known) = (self.pulse(), self.wrong.len());
            let wrong = pass(self)?;
            if wrong.is_empty() || self.unfinished || self.enough() {
                return Ok(());
            }
            if self.pulse() == before {
                self.wrong.extend(wrong);
                return Ok(());
            }
            self.wrong.truncate(known);
        }
        Ok(())
    }

    fn table(&mut self, object: &Object) -> Result<()> {
        let table = Table::of(self.frame, &object.spec.name)?;
        self.structure(|check| {
            let slots = check.slots(object, &table)?;
            let mut wrong = check.chain(object, &slots);
            wrong.extend(check.index(object, &table, &slots)?);
            Ok(wrong)
        })
    }

    /// Every slot's checksum.
    fn slots(&mut self, object: &Object, table: &Table) -> Result<Slots> {
        let used = table.used(self.frame);
        let stride = object.stride;
        let mut slots = Slots { states: Vec::with_capacity(used), words: Vec::with_capacity(used) };
        let per_read = (CHUNK / stride).max(1);
        let mut buffer = vec![0; per_read * stride];
        for first in (0..used).step_by(per_read) {
            let count = per_read.min(used - first);
            let bytes = &mut buffer[..count * stride];
            self.read(object.data + first * stride, bytes)?;
            for (number, slot) in bytes.chunks_exact(stride).enumerate() {
                let (crc, state) = (word32(slot, 0), word32(slot, 4));
                if state == LIVE && crc != crc32c::crc32c(&slot[4..]) {
                    self.reread_slot(object, first + number);
                    if self.enough() {
                        return Ok(slots);
                    }
                }
                slots.states.push(state);
                slots.words.push(if state == LIVE { table.tag(&slot[8..8 + object.spec.key]) } else { crc });
            }
        }
        Ok(slots)
    }

    fn reread_slot(&mut self, object: &Object, number: usize) {
        let mut slot = vec![0; object.stride];
        let place = object.data + number * object.stride;
        let frame = self.frame;
        let mut bad = move || {
            frame.mapping().read(place, &mut slot);
            word32(&slot, 4) == LIVE && word32(&slot, 0) != crc32c::crc32c(&slot[4..])
        };
        let bad = std::cell::RefCell::new(&mut bad);
        if !self.lasting(object, number, || !(bad.borrow_mut())()) {
            self.complain(format!("table {:?}: the checksum of slot {number} does not match", object.spec.name));
        }
    }

    /// Counts, and the list of freed slots.
    fn chain(&self, object: &Object, slots: &Slots) -> Vec<String> {
        let name = &object.spec.name;
        let counter = |offset: usize| self.frame.load(object.meta + offset);
        let mut wrong = Vec::new();
        if counter(META_USED) > object.units as u64 {
            wrong.push(format!("table {name:?} claims {} slots of {}", counter(META_USED), object.units));
        }
        let live = slots.states.iter().filter(|state| **state == LIVE).count();
        let freed = slots.states.iter().filter(|state| **state == FREED).count();
        if live + freed != slots.states.len() {
            wrong.push(format!("table {name:?}: a slot is neither in use nor free"));
        }
        if counter(META_LIVE) != live as u64 {
            wrong.push(format!("table {name:?} claims {} rows and has {live}", counter(META_LIVE)));
        }
        let mut next = counter(META_FREE);
        let mut met = 0;
        while next != 0 && met <= freed {
            let slot = next as usize - 1;
            if slots.states.get(slot) != Some(&FREED) {
                break;
            }
            next = u64::from(slots.words[slot]);
            met += 1;
        }
        if next != 0 || met != freed {
            wrong.push(format!("table {name:?}: the list of freed slots is broken"));
        }
        wrong
    }

    /// Every live slot is in the index once, where a lookup finds it.
    fn index(&self, object: &Object, table: &Table, slots: &Slots) -> Result<Vec<String>> {
        let name = &object.spec.name;
        let entries = self.words(object.index, object.index_len)?;
        let Some(start) = entries.iter().position(|entry| *entry == 0) else {
            return Ok(vec![format!("table {name:?}: the index has no end")]);
        };
        let mut met = vec![false; slots.states.len()];
        let mut run = 0;
        for step in 1..=entries.len() {
            let position = (start + step) % entries.len();
            let entry = entries[position];
            if entry == 0 {
                run = 0;
                continue;
            }
            let slot = (entry as u32).wrapping_sub(1) as usize;
            let tag = (entry >> 32) as u32;
            let home = table.home(u64::from(tag));
            let distance = (position + entries.len() - home) % entries.len();
            if slots.states.get(slot) != Some(&LIVE) || slots.words[slot] != tag || met[slot] || distance > run {
                return Ok(vec![format!("table {name:?}: word {position} of the index is wrong")]);
            }
            met[slot] = true;
            run += 1;
        }
        let lost = slots.states.iter().zip(&met).filter(|(state, met)| **state == LIVE && !**met).count();
        Ok(if lost > 0 { vec![format!("table {name:?}: {lost} rows are not in the index")] } else { Vec::new() })
    }

    fn slab(&mut self, object: &Object) -> Result<()> {
        let slab = Slab::of(self.frame, &object.spec.name)?;
        let mut scratch = vec![0; CHUNK.min(object.stride)];
        for index in slab.live(self.frame) {
            let index = index as usize;
            let crc = unit_crc(self.frame, object, index, &mut scratch);
            let matches = crc == self.crc_word(object, index);
            if !matches && !self.recheck_unit(object, index, || !slab.live_bit(self.frame, index)) {
                self.complain(format!("slab {:?}: the checksum of item {index} does not match", object.spec.name));
            }
            if self.enough() {
                return Ok(());
            }
        }
        self.structure(|check| {
            let words = check.words(object.index, object.index_len)?;
            let set = words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            let claimed = check.frame.load(object.meta + META_LIVE);
            let beyond = slab.live(check.frame).len() as u64 != set;
            let wrong = set != claimed || beyond;
            let text = || format!("slab {:?} claims {claimed} items and has {set}", object.spec.name);
            Ok(if wrong { vec![text()] } else { Vec::new() })
        })
    }

    fn array(&mut self, object: &Object) -> Result<()> {
        let end = (object.data + object.data_len) as u64;
        let mut stretch = data_after(self.frame.fd(), object.data as u64, end)?;
        let mut bytes = vec![0; CHUNK.min(object.stride)];
        for block in 0..object.units {
            let from = (object.data + block * object.stride) as u64;
            let to = from + object.unit_len(block) as u64;
            while stretch.is_some_and(|(_, stop)| stop <= from) {
                let (_, stop) = stretch.unwrap_or_default();
                stretch = data_after(self.frame.fd(), stop, end)?;
            }
            let crc =
                if stretch.is_some_and(|(start, _)| start < to) { self.block_crc(from, to, &mut bytes)? } else { 0 };
            if crc != self.crc_word(object, block) && !self.recheck_unit(object, block, || false) {
                self.complain(format!("array {:?}: the checksum of block {block} does not match", object.spec.name));
                if self.enough() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn block_crc(&self, from: u64, to: u64, bytes: &mut [u8]) -> Result<u32> {
        let mut crc = !0;
        let mut at = from;
        while at < to {
            let take = bytes.len().min((to - at) as usize);
            self.read(at as usize, &mut bytes[..take])?;
            crc = crc32c::crc32c_append(crc, &bytes[..take]);
            at += take as u64;
        }
        Ok(!crc)
    }

    /// Whether the checksum of a unit comes right, or `excused` does.
    fn recheck_unit(&self, object: &Object, unit: usize, excused: impl Fn() -> bool) -> bool {
        self.lasting(object, unit, || {
            let mut scratch = vec![0; CHUNK.min(object.stride)];
            excused() || unit_crc(self.frame, object, unit, &mut scratch) == self.crc_word(object, unit)
        })
    }

    fn crc_word(&self, object: &Object, unit: usize) -> u32 {
        let word = self.frame.load((object.crc + unit * 4) & !7);
        if (object.crc + unit * 4) % 8 == 0 {
            word as u32
        } else {
            (word >> 32) as u32
        }
    }

    fn words(&self, offset: usize, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        self.read(offset, &mut bytes)?;
        let word = |chunk: &[u8]| u64::from(word32(chunk, 0)) | u64::from(word32(chunk, 4)) << 32;
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Raises `Damaged` when the segment ends before.
    fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            match rustix::io::pread(self.frame.fd(), &mut out[done..], (offset + done) as u64) {
                Ok(0) => return Err(StateError::Damaged("the segment was shrunk under its user".into())),
                Ok(got) => done += got,
                Err(errno) => return Err(StateError::os("reading a state", errno)),
            }
        }
        Ok(())
    }
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}
