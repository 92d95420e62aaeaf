//! The responder's half of one-sided operations: what a peer asks of a region is done here, to completion, without the
//! application. Nothing that is read from an arena is believed.

use std::sync::atomic::Ordering;

use super::command::{Access, Handle, Piece, Scan, Status, ATOMIC, INDIRECTION, READ, WRITE};
use super::rows::Region;
use crate::segment::Mapping;

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

/// A region as one kind of access sees it: what is the same for all of its bytes was checked.
#[derive(Clone, Copy)]
pub struct Window<'a> {
    pub arena: &'a Mapping,
    start: u64,
    len: u64,
}

impl Window<'_> {
    /// Where in the arena `len` bytes at `offset` of the region are.
    #[inline]
    pub fn at(self, offset: u64, len: u64) -> Result<usize, Status> {
        let end = offset.checked_add(len).ok_or(Status::OutOfRange)?;
        if end > self.len {
            return Err(Status::OutOfRange);
        }
        Ok((self.start + offset) as usize)
    }

    /// The indirection at `offset`: region and piece of it.
    #[inline(always)]
    pub fn indirection(self, offset: u64) -> Result<(Handle, Piece), Status> {
        let mut entry = [0; INDIRECTION];
        self.arena.read(self.at(offset, INDIRECTION as u64)?, &mut entry);
        let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| entry[at + byte]));
        Ok((Handle::of(word(0)), Piece { offset: word(8), len: word(16) }))
    }
}

impl<'a> Place<'a> {
    pub fn window(self, right: u32) -> Result<Window<'a>, Status> {
        if self.region.rights & right == 0 {
            return Err(Status::Denied);
        }
        let range = self.region.piece.within(self.arena.len() as u64).ok_or(Status::OutOfRange)?;
        Ok(Window { arena: self.arena, start: range.start as u64, len: range.len() as u64 })
    }

    /// The bytes of the arena that are `len` bytes at `offset` of the region.
    fn range(self, right: u32, offset: u64, len: u64) -> Result<usize, Status> {
        self.window(right)?.at(offset, len)
    }

    /// Where the aligned word at `offset` of the region is.
    pub fn word(self, right: u32, offset: u64) -> Result<usize, Status> {
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
        let (handle, piece) = self.window(READ)?.indirection(at)?;
        let target = regions.find(handle)?;
        let whole = piece.len.min(u64::from(len));
        sink.take(target.arena, target.range(READ, piece.offset, whole)?, whole as usize);
        Ok(whole)
    }

    /// Read into `out`.
    pub fn read(self, at: u64, out: &mut [u8]) -> Result<(), Status> {
        self.arena.read(self.range(READ, at, out.len() as u64)?, out);
        Ok(())
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
