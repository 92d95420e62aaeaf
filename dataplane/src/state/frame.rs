//! The mapped segment: geometry in private memory, header words as atomics. Any thread may look.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{compiler_fence, AtomicU64, Ordering};
use std::sync::Arc;

use super::layout::{self, Constant, Kind, Object, Parsed, Schema};
use super::{damaged, usage, Result, StateError};
use crate::error::Error;
use crate::segment::Mapping;

/// The words of the header that change while the state is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The last committed poll.
    Epoch = 512,
    /// The poll that the undo log belongs to, and its length in bytes: it counts while that poll is not committed.
    LogStamp = 520,
    LogLen = 528,
    Phase = 576,
    Generation = 584,
    /// Process that adopted the state last.
    Owner = 592,
    /// Adoptions since the last whole poll.
    Adoptions = 600,
    LastPollNs = 608,
    FirstPollNs = 616,
    /// Odd: changes are to be marked. Written by whoever migrates; the engine copies it to `TrackingAck`.
    Tracking = 640,
    TrackingAck = 704,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Phase {
    Blank = 0,
    /// A migration fills it.
    Building = 1,
    Serving = 2,
    /// Its successor is another segment.
    Retired = 3,
    Poisoned = 4,
}

impl Phase {
    pub const NAMES: [(&'static str, Phase); 5] = [
        ("blank", Phase::Blank),
        ("building", Phase::Building),
        ("serving", Phase::Serving),
        ("retired", Phase::Retired),
        ("poisoned", Phase::Poisoned),
    ];

    pub fn name(self) -> &'static str {
        Phase::NAMES[self as usize].0
    }

    pub fn named(name: &str) -> Option<Phase> {
        Phase::NAMES.iter().find(|(known, _)| *known == name).map(|(_, phase)| *phase)
    }
}

/// The constant part of a header, checked.
pub struct Header {
    pub schema: Schema,
    pub size: usize,
    pub log_bytes: usize,
    pub seed: [u64; 2],
}

pub struct Frame {
    mapping: Mapping,
    fd: OwnedFd,
    writable: bool,
    header: Header,
    objects: Vec<Arc<Object>>,
}

impl Frame {
    /// Whether `fd` was never formatted (a format that was cut short counts as none).
    pub fn blank(fd: BorrowedFd<'_>) -> Result<bool> {
        let mut magic = [0; 8];
        let got = rustix::io::pread(fd, &mut magic, 0).map_err(|errno| StateError::os("reading a state", errno))?;
        Ok(got < 8 || u64::from_le_bytes(magic) == 0)
    }

    /// How long an undo log to lay out in a blank segment: who has a large state may overwrite much of it in one poll. Raises
    /// `Usage`, `Os`.
    pub fn log_for(fd: BorrowedFd<'_>, schema: &Schema) -> Result<usize> {
        let size = size_of(fd)?;
        let wished = (size / 8).next_multiple_of(layout::PAGE).max(layout::LOG_BYTES);
        let (_, needed) = layout::place(schema, wished)?;
        Ok(if needed <= size { wished } else { layout::LOG_BYTES })
    }

    /// Lay a blank segment out; the magic is written last. Raises `Usage`, `Full`, `Os`.
    pub fn format(fd: BorrowedFd<'_>, schema: &Schema, log_bytes: usize) -> Result<()> {
        let (_, needed) = layout::place(schema, log_bytes)?;
        let size = size_of(fd)?;
        layout::check_fits(needed, size)?;
        if !Frame::blank(fd)? {
            return usage("the segment has a state already");
        }
        let mapping = map(fd, layout::OFF_LOG, true)?;
        let seed = [RandomState::new().build_hasher().finish(), RandomState::new().build_hasher().finish()];
        let constant = layout::emit(&Parsed { schema: schema.clone(), size, log_bytes, seed });
        mapping.write(layout::OFF_DIRECTORY, &constant.directory);
        mapping.write(8, &constant.head[8..]);
        mapping.write(layout::OFF_CRC, &constant.crc().to_le_bytes());
        compiler_fence(Ordering::SeqCst);
        mapping.u64_at(layout::OFF_MAGIC).store(layout::MAGIC, Ordering::Release);
        Ok(())
    }

    /// Map a formatted segment, after its header and directory passed their checks. Touches no other page.
    pub fn open(fd: BorrowedFd<'_>, writable: bool) -> Result<Frame> {
        let real_size = size_of(fd)?;
        if real_size < layout::OFF_LOG {
            return damaged(format!("a segment of {real_size} bytes is too small for a state"));
        }
        let mapping = map(fd, real_size, writable)?;
        let (header, objects) = read_constant(&mapping, real_size)?;
        let fd = fd.try_clone_to_owned().map_err(|source| StateError::Os { what: "duplicating a state", source })?;
        Ok(Frame { mapping, fd, writable, header, objects })
    }

    /// Read header and directory again: `Damaged` when they changed since `open`.
    pub fn recheck(&self) -> Result<()> {
        let (header, _) = read_constant(&self.mapping, self.mapping.len())?;
        if header.schema != self.header.schema || header.size != self.header.size || header.seed != self.header.seed {
            return damaged("the state's header changed while it was mapped");
        }
        Ok(())
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    pub fn objects(&self) -> &[Arc<Object>] {
        &self.objects
    }

    pub fn writable(&self) -> bool {
        self.writable
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// `Usage` on a state that was opened to be read.
    pub fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return usage("the state was opened read-only");
        }
        Ok(())
    }

    /// The object `name` of kind `kind`. Raises `Schema`.
    pub fn object(&self, kind: Kind, name: &str) -> Result<&Arc<Object>> {
        let found = self.objects.iter().find(|object| object.spec.name == name);
        match found {
            Some(object) if object.spec.kind == kind => Ok(object),
            Some(object) => {
                Err(StateError::Schema(format!("{name:?} is a {}, not a {}", object.spec.kind.name(), kind.name())))
            }
            None => Err(StateError::Schema(format!("the state has no {} called {name:?}", kind.name()))),
        }
    }

    /// High-water mark of an object: slots, items; never more than it has.
    pub fn used(&self, object: &Object) -> usize {
        (self.load(object.meta + layout::META_USED) as usize).min(object.spec.count)
    }

    /// Bytes that are in use, of header, log and objects.
    pub fn used_bytes(&self) -> usize {
        let unit = |object: &Object| if object.spec.kind == Kind::Table { object.stride } else { object.spec.item };
        let objects = self.objects.iter().map(|object| object.data - object.meta + self.used(object) * unit(object));
        layout::OFF_LOG + self.header.log_bytes + objects.sum::<usize>()
    }

    pub fn get(&self, word: Word) -> u64 {
        self.load(word as usize)
    }

    /// Panics when the state was opened read-only (`check_writable` asks first).
    pub fn set(&self, word: Word, value: u64) {
        assert!(self.writable);
        self.store(word as usize, value);
    }

    /// The last committed poll.
    pub fn epoch(&self) -> u64 {
        self.get(Word::Epoch)
    }

    /// The poll under way.
    pub fn stamp(&self) -> u64 {
        self.epoch().wrapping_add(1)
    }

    /// Raises `Damaged` on an unknown word.
    pub fn phase(&self) -> Result<Phase> {
        let word = self.get(Word::Phase);
        match Phase::NAMES.get(usize::try_from(word).unwrap_or(usize::MAX)) {
            Some((_, phase)) => Ok(*phase),
            None => damaged(format!("unknown phase {word} in the state's header")),
        }
    }

    pub fn set_phase(&self, phase: Phase) {
        self.set(Word::Phase, phase as u64);
    }

    /// Word `word` (below `CURSOR_WORDS`) of the cursors of gate line `line` (below `CURSOR_LINES`); else a panic.
    /// Only a writable state's words may be written.
    #[inline]
    pub fn cursor(&self, line: usize, word: usize) -> &AtomicU64 {
        assert!(line < layout::CURSOR_LINES && word < layout::CURSOR_WORDS);
        self.mapping.u64_at(layout::OFF_CURSORS + line * layout::CURSOR + word * 8)
    }

    /// Ask the engine to mark what it changes (or not to any more); old marks are dropped.
    pub fn track(&self, on: bool) -> Result<()> {
        self.check_writable()?;
        for object in &self.objects {
            self.take_dirty(object);
        }
        let next = (self.get(Word::Tracking) | 1).wrapping_add(1);
        self.set(Word::Tracking, next | u64::from(on));
        Ok(())
    }

    /// Whether the engine has seen the last `track`.
    pub fn tracked(&self) -> bool {
        self.get(Word::Tracking) == self.get(Word::TrackingAck)
    }

    /// Numbers of the marked units; their marks are taken away.
    pub fn take_dirty(&self, object: &Object) -> Vec<u64> {
        let mut numbers = Vec::new();
        for word in 0..object.units.div_ceil(64) {
            let place = self.mapping.u64_at(object.dirty + word * 8);
            if place.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = place.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let unit = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if unit < object.units {
                    numbers.push(unit as u64);
                }
            }
        }
        numbers
    }

    /// Mark unit `unit` of `object`, after its change.
    #[inline]
    pub(super) fn mark(&self, object: &Object, unit: usize) {
        self.mapping.u64_at(object.dirty + unit / 64 * 8).fetch_or(1 << (unit % 64), Ordering::AcqRel);
    }

    #[inline]
    pub(super) fn load(&self, offset: usize) -> u64 {
        self.mapping.u64_at(offset).load(Ordering::Acquire)
    }

    /// One word, in program order: nothing before it is delayed past it, nothing after it hastened.
    #[inline]
    pub(super) fn store(&self, offset: usize, value: u64) {
        #[cfg(test)]
        super::fuse::burn(0);
        self.mapping.u64_at(offset).store(value, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
    }

    /// Bytes, in program order as `store`.
    #[inline]
    pub(super) fn put(&self, offset: usize, bytes: &[u8]) {
        #[cfg(test)]
        if let Some(part) = super::fuse::burn(bytes.len()) {
            self.mapping.write(offset, &bytes[..part]);
            super::fuse::die();
        }
        self.mapping.write(offset, bytes);
        compiler_fence(Ordering::SeqCst);
    }
}

fn size_of(fd: BorrowedFd<'_>) -> Result<usize> {
    let stat = rustix::fs::fstat(fd).map_err(|errno| StateError::os("fstat of a state", errno))?;
    Ok(usize::try_from(stat.st_size).unwrap_or(0))
}

fn map(fd: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Mapping> {
    Mapping::new(fd, len, writable).map_err(|error| match error {
        Error::Os { what, source } => StateError::Os { what, source },
        other => StateError::Damaged(format!("mapping a state: {other}")),
    })
}

fn read_constant(mapping: &Mapping, real_size: usize) -> Result<(Header, Vec<Arc<Object>>)> {
    let mut head = [0; layout::CONSTANT];
    mapping.read(0, &mut head);
    let objects = layout::claimed_objects(&head)?;
    let mut directory = vec![0; objects * layout::ENTRY];
    mapping.read(layout::OFF_DIRECTORY, &mut directory);
    let mut crc = [0; 4];
    mapping.read(layout::OFF_CRC, &mut crc);
    let (parsed, objects) = layout::parse(&Constant { head, directory }, u32::from_le_bytes(crc), real_size)?;
    let Parsed { schema, size, log_bytes, seed } = parsed;
    Ok((Header { schema, size, log_bytes, seed }, objects))
}
