//! The responder's half of one-sided operations: what a peer asks of a region is done here, to completion, without the
//! application. Nothing that is read from an arena is believed.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::command::{Access, Handle, Piece, Scan, Status, ATOMIC, INDIRECTION, READ, WRITE};
use super::rows::Region;
use crate::core::Core;
use crate::segment::Mapping;

/// Operations of a burst whose memory is fetched together.
const AHEAD: usize = 32;

/// A region and the memory that it is in.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub region: &'a Region,
    pub arena: &'a Mapping,
}

/// Where the bytes of a read go: appended to a message, or to a place in the initiator's arena.
pub enum Sink<'a> {
    Message(&'a mut Vec<u8>),
    Arena {
        arena: &'a Mapping,
        at: usize,
    },
    /// The bytes from `skip` on, as many as fit; `at` counts them.
    Part {
        bytes: &'a mut [u8],
        skip: usize,
        at: usize,
    },
}

impl Sink<'_> {
    fn take(&mut self, source: &Mapping, from: usize, len: usize) {
        match self {
            Sink::Message(bytes) => {
                let start = bytes.len();
                bytes.resize(start + len, 0);
                source.read(from, &mut bytes[start..]);
            }
            Sink::Arena { arena, at } => copy(arena, *at, source, from, len),
            Sink::Part { bytes, skip, at } => {
                let len = len.saturating_sub(*skip).min(bytes.len() - *at);
                source.read(from + if len > 0 { *skip } else { 0 }, &mut bytes[*at..*at + len]);
                *at += len;
            }
        }
    }
}

/// Between arenas, which may be one and the same.
#[inline]
pub fn copy(to: &Mapping, at: usize, source: &Mapping, from: usize, len: usize) {
    if std::ptr::eq(to, source) {
        to.copy_within(at, from, len);
    } else {
        to.copy_from(at, source, from, len);
    }
}

/// Finds regions for indirections: those that the same peer may use.
pub trait Regions {
    fn find(&self, handle: Handle) -> Result<Place<'_>, Status>;
}

impl Place<'_> {
    /// The bytes of the arena that are `len` bytes at `offset` of the region.
    fn range(self, right: u32, offset: u64, len: u64) -> Result<usize, Status> {
        if self.region.rights & right == 0 {
            return Err(Status::Denied);
        }
        let inside = Piece { offset, len }.within(self.region.piece.len).ok_or(Status::OutOfRange)?;
        let place = Piece { offset: self.region.piece.offset + inside.start as u64, len };
        place.within(self.arena.len() as u64).map(|range| range.start).ok_or(Status::OutOfRange)
    }

    fn word(self, right: u32, offset: u64) -> Result<usize, Status> {
        let at = self.range(right, offset, 8)?;
        if at % 8 != 0 {
            return Err(Status::Misaligned);
        }
        Ok(at)
    }

    /// What is read goes to `sink`; the value of the completion: bytes moved, the old word, or the place of a match.
    pub fn access(self, access: Access<'_>, regions: &impl Regions, sink: &mut Sink<'_>) -> Result<u64, Status> {
        match access {
            Access::Read { at, len } => {
                sink.take(self.arena, self.range(READ, at, u64::from(len))?, len as usize);
                Ok(u64::from(len))
            }
            Access::Write { at, bytes } => {
                self.arena.write(self.range(WRITE, at, bytes.len() as u64)?, bytes);
                Ok(bytes.len() as u64)
            }
            Access::CompareSwap { at, expected, desired } => {
                let word = self.arena.u64_at(self.word(ATOMIC, at)?);
                let old = word.compare_exchange(expected, desired, Ordering::AcqRel, Ordering::Acquire);
                Ok(old.unwrap_or_else(|found| found))
            }
            Access::FetchAdd { at, add } => {
                Ok(self.arena.u64_at(self.word(ATOMIC, at)?).fetch_add(add, Ordering::AcqRel))
            }
            Access::Indirect { index, len } => {
                let at = index.checked_mul(INDIRECTION as u64).ok_or(Status::OutOfRange)?;
                self.follow(at, len, regions, sink)
            }
            Access::Scan(scan) => self.scan(scan, regions, sink),
        }
    }

    /// Write a range of another arena at `at`; how many bytes.
    pub fn write_from(self, at: u64, source: &Mapping, range: std::ops::Range<usize>) -> Result<u64, Status> {
        let to = self.range(WRITE, at, range.len() as u64)?;
        copy(self.arena, to, source, range.start, range.len());
        Ok(range.len() as u64)
    }

    /// Copy what the indirection at `at` points to, as much of it as `len`; how much.
    fn follow(self, at: u64, len: u32, regions: &impl Regions, sink: &mut Sink<'_>) -> Result<u64, Status> {
        let entry = self.indirection(at)?;
        let target = regions.find(entry.0)?;
        let whole = entry.1.len.min(u64::from(len));
        let from = target.range(READ, entry.1.offset, whole)?;
        sink.take(target.arena, from, whole as usize);
        Ok(whole)
    }

    /// Read into `out`.
    pub fn read(self, at: u64, out: &mut [u8]) -> Result<(), Status> {
        self.arena.read(self.range(READ, at, out.len() as u64)?, out);
        Ok(())
    }

    fn indirection(self, at: u64) -> Result<(Handle, Piece), Status> {
        let from = self.range(READ, at, INDIRECTION as u64)?;
        let mut entry = [0; INDIRECTION];
        self.arena.read(from, &mut entry);
        let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| entry[at + byte]));
        Ok((Handle::of(word(0)), Piece { offset: word(8), len: word(16) }))
    }

    /// The index of the entry that matched in the upper half, bytes read in the lower one.
    fn scan(self, scan: Scan, regions: &impl Regions, sink: &mut Sink<'_>) -> Result<u64, Status> {
        let stride = u64::from(scan.stride);
        if stride < 8 || u64::from(scan.pointer) + INDIRECTION as u64 > stride {
            return Err(Status::Bad);
        }
        let start = self.range(READ, scan.at, stride * u64::from(scan.entries))?;
        for entry in 0..u64::from(scan.entries) {
            let mut found = [0; 8];
            self.arena.read(start + (entry * stride) as usize, &mut found);
            if u64::from_le_bytes(found) == scan.needle {
                let pointer = scan.at + entry * stride + u64::from(scan.pointer);
                return Ok(entry << 32 | self.follow(pointer, scan.len, regions, sink)?);
            }
        }
        Err(Status::NoMatch)
    }
}

/// The numbers of a burst, from where the client put them.
pub struct Numbers<'a> {
    pub memory: &'a Mapping,
    pub at: usize,
    /// Bytes of one: 4 or 8.
    pub width: usize,
}

impl Numbers<'_> {
    /// Copies `out.len()` of them from number `first` on.
    fn take(&self, first: usize, out: &mut [u64]) {
        let mut bytes = [0; AHEAD * 8];
        let bytes = &mut bytes[..out.len() * self.width];
        self.memory.read(self.at + first * self.width, bytes);
        for (number, bytes) in out.iter_mut().zip(bytes.chunks_exact(self.width)) {
            let mut word = [0; 8];
            word[..self.width].copy_from_slice(bytes);
            *number = u64::from_le_bytes(word);
        }
    }
}

/// What a burst does with each of its numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Each {
    /// Read at that offset.
    Read,
    /// Write at that offset.
    Write,
    /// Read what the indirection of that index points to.
    Indirect,
}

/// `count` operations of `size` bytes each in order, up to the first that fails: how many were done, and why not more.
/// The initiator's bytes are packed from `at` of its arena on, where `count * size` bytes are.
pub fn burst(
    each: Each,
    place: Place<'_>,
    regions: &impl Regions,
    numbers: &Numbers<'_>,
    own: (&Arc<Core>, usize),
    size: u32,
    count: usize,
) -> (usize, Status) {
    let (core, mut at) = own;
    let Some(own) = core.arena() else { return (0, Status::OutOfRange) };
    let mut words = [0; AHEAD];
    let mut from = [0; AHEAD];
    let mut last = None;
    for first in (0..count).step_by(AHEAD) {
        let words = &mut words[..AHEAD.min(count - first)];
        numbers.take(first, words);
        let mut good = words.len();
        let mut status = Status::Ok;
        let mut targets = [place.arena; AHEAD];
        let mut lengths = [size as usize; AHEAD];
        for (i, number) in words.iter().enumerate() {
            match locate(each, place, regions, *number, size, &mut last) {
                Ok((arena, start, len)) => {
                    arena.prefetch(start);
                    (targets[i], from[i], lengths[i]) = (arena, start, len);
                }
                Err(why) => {
                    (good, status) = (i, why);
                    break;
                }
            }
        }
        for i in 0..good {
            if each == Each::Write {
                copy(targets[i], from[i], own, at, lengths[i]);
            } else {
                copy(own, at, targets[i], from[i], lengths[i]);
            }
            at += size as usize;
        }
        if status != Status::Ok {
            return (first + good, status);
        }
    }
    (count, Status::Ok)
}

/// What a burst reads of each of its numbers when it is read in parts: `want` bytes from `skip` on, of at most `cap`.
#[derive(Clone, Copy)]
pub struct Part {
    pub cap: u32,
    pub skip: u32,
    pub want: u32,
}

/// As `burst`, for somebody whose arena is elsewhere: the bytes are packed into `out`, `part.want` for each number.
pub fn collect(
    each: Each,
    place: Place<'_>,
    regions: &impl Regions,
    numbers: &[u8],
    part: Part,
    out: &mut [u8],
) -> (usize, Status) {
    let width = if each == Each::Indirect { 4 } else { 8 };
    let want = part.want as usize;
    let mut last = None;
    let mut done = 0;
    for ahead in numbers.chunks(AHEAD * width) {
        let mut found = [(place.arena, 0, 0); AHEAD];
        let mut status = Status::Ok;
        let mut good = 0;
        for (number, found) in ahead.chunks_exact(width).zip(&mut found) {
            let mut word = [0; 8];
            word[..width].copy_from_slice(number);
            let number = u64::from_le_bytes(word);
            let located = match each {
                Each::Indirect => locate(each, place, regions, number, part.cap, &mut last),
                _ => locate(each, place, regions, number.saturating_add(u64::from(part.skip)), part.want, &mut last),
            };
            match located {
                Ok((arena, start, len)) => {
                    arena.prefetch(start);
                    *found = (arena, start, len);
                    good += 1;
                }
                Err(why) => {
                    status = why;
                    break;
                }
            }
        }
        for (arena, start, len) in &found[..good] {
            let skip = if each == Each::Indirect { (part.skip as usize).min(*len) } else { 0 };
            let len = (len - skip).min(want);
            let Some(to) = out.get_mut(done * want..done * want + len) else { return (done, Status::Bad) };
            arena.read(start + skip, to);
            done += 1;
        }
        if status != Status::Ok {
            return (done, status);
        }
    }
    (done, Status::Ok)
}

/// The bytes that one operation of a burst is about. `last`: the region that was pointed to before, most likely the same.
#[inline]
fn locate<'a, R: Regions>(
    each: Each,
    place: Place<'a>,
    regions: &'a R,
    number: u64,
    size: u32,
    last: &mut Option<(Handle, Place<'a>)>,
) -> Result<(&'a Mapping, usize, usize), Status> {
    match each {
        Each::Read => Ok((place.arena, place.range(READ, number, u64::from(size))?, size as usize)),
        Each::Write => Ok((place.arena, place.range(WRITE, number, u64::from(size))?, size as usize)),
        Each::Indirect => {
            let at = number.checked_mul(INDIRECTION as u64).ok_or(Status::OutOfRange)?;
            let (handle, piece) = place.indirection(at)?;
            let target = match *last {
                Some((known, target)) if known == handle => target,
                _ => regions.find(handle)?,
            };
            *last = Some((handle, target));
            let len = piece.len.min(u64::from(size));
            Ok((target.arena, target.range(READ, piece.offset, len)?, len as usize))
        }
    }
}
