//! The writer's half of a state: undo log, commit, rollback.
//!
//! The log is an append-only run of records `old bytes, padded to 8 | offset u64 | length u32 | crc u32`, read from its
//! end; records with the offset `NOTE` say what the poll did elsewhere. It counts while its stamp is the committed epoch + 1, so the one store of the epoch empties it.

use std::collections::HashSet;
use std::ops::{Deref, Range};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{compiler_fence, Ordering};
use std::sync::{Arc, Mutex};

use super::frame::{Frame, Word};
use super::layout::{Kind, Object, FOOTER, META_WORDS, OFF_LOG, OFF_SNAPSHOTS, SNAPSHOT};
use super::{damaged, full, Result};

/// A state for one writer at a time, wherever it stands: Python objects, a ledger, a native thread. Whoever waits for
/// the GIL must not hold it.
pub type Shared = Arc<Mutex<Segment>>;

const CHUNK: usize = 4096;
/// Instead of an offset: the record's bytes are the engine's own.
const NOTE: usize = usize::MAX;

pub struct Segment {
    frame: Arc<Frame>,
    /// The log was begun in this poll, and has so many bytes.
    logging: bool,
    log_len: usize,
    /// Polls that this process has begun: tells which objects' counters are in the log already.
    poll: u64,
    counters_logged: Vec<u64>,
    /// Units whose checksums are made at the commit: object, number.
    unsummed: Vec<(u32, u32)>,
    /// Items of slabs, and rows, that were freed in this poll: their bytes are needed if it is taken back.
    pub(super) freed: HashSet<(usize, usize)>,
    /// Where each slab is searched first.
    pub(super) hints: Vec<usize>,
    /// A slot is put together here before it is written.
    pub(super) assembly: Vec<u8>,
    /// What the poll that was rolled back had noted.
    notes: Vec<Vec<u8>>,
    tracking: u64,
    scratch: Box<[u8; CHUNK]>,
}

/// A segment reads like its frame: `segment.epoch()`, `segment.cursor(..)`.
impl Deref for Segment {
    type Target = Frame;

    fn deref(&self) -> &Frame {
        &self.frame
    }
}

impl Segment {
    pub fn open(fd: BorrowedFd<'_>, writable: bool) -> Result<Segment> {
        Ok(Segment::new(Arc::new(Frame::open(fd, writable)?)))
    }

    pub fn new(frame: Arc<Frame>) -> Segment {
        let tracking = frame.get(Word::Tracking);
        let objects = frame.objects().len();
        Segment {
            frame,
            logging: false,
            log_len: 0,
            poll: 1,
            counters_logged: vec![0; objects],
            unsummed: Vec::new(),
            freed: HashSet::new(),
            hints: vec![0; objects],
            assembly: Vec::new(),
            notes: Vec::new(),
            tracking,
            scratch: Box::new([0; CHUNK]),
        }
    }

    pub fn frame(&self) -> &Arc<Frame> {
        &self.frame
    }

    /// Whether anything was written since the last commit.
    #[inline]
    pub fn changed(&self) -> bool {
        self.logging
    }

    /// Save the old bytes of a range (of objects or snapshots) before it is changed. Raises `Full`, `Usage`.
    pub fn log(&mut self, offset: usize, len: usize) -> Result<()> {
        assert!(loggable(&self.frame, offset, len));
        if !self.logging {
            self.begin()?;
        }
        let body = len.next_multiple_of(8);
        self.reserve(1, body)?;
        let start = OFF_LOG + self.log_len;
        let mut crc = record_crc(self.frame.stamp(), offset, len);
        let mut done = 0;
        while done < len {
            let chunk = &mut self.scratch[..CHUNK.min(len - done)];
            self.frame.mapping().read(offset + done, chunk);
            crc = crc32c::crc32c_append(crc, chunk);
            self.frame.put(start + done, chunk);
            done += chunk.len();
        }
        self.end_record(start + body, offset, len, crc);
        Ok(())
    }

    /// Note something that is about to be done outside of the segment: `take_notes` has it when the poll is rolled back.
    /// Raises `Full`, `Usage`.
    pub fn note(&mut self, bytes: &[u8]) -> Result<()> {
        if !self.logging {
            self.begin()?;
        }
        let body = bytes.len().next_multiple_of(8);
        self.reserve(1, body)?;
        let start = OFF_LOG + self.log_len;
        let crc = crc32c::crc32c_append(record_crc(self.frame.stamp(), NOTE, bytes.len()), bytes);
        self.frame.put(start, bytes);
        self.end_record(start + body, NOTE, bytes.len(), crc);
        Ok(())
    }

    /// What the poll that `recover` rolled back had noted, the last first.
    pub fn take_notes(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.notes)
    }

    /// The record's bytes are there, up to `end`.
    fn end_record(&mut self, end: usize, offset: usize, len: usize, crc: u32) {
        self.frame.store(end, offset as u64);
        self.frame.store(end + 8, len as u64 | u64::from(crc) << 32);
        self.log_len = end + FOOTER - OFF_LOG;
        self.frame.store(Word::LogLen as usize, self.log_len as u64);
    }

    /// Whether this poll has filled half of the log, so that whoever can had better leave the rest to the next.
    pub fn half_logged(&self) -> bool {
        self.logging && self.log_len > self.frame.header().log_bytes / 2
    }

    /// Make sure that `records` records of `bytes` bytes (each rounded up to 8) still fit in the log, so that an
    /// operation of several writes is done whole or not at all. Raises `Full`.
    pub(super) fn reserve(&self, records: usize, bytes: usize) -> Result<()> {
        let used = if self.logging { self.log_len } else { 0 };
        let needed = (records * FOOTER).saturating_add(bytes);
        let log_bytes = self.frame.header().log_bytes;
        if needed > log_bytes - used {
            return full(format!("one poll overwrites more than the undo log of {log_bytes} bytes holds"));
        }
        Ok(())
    }

    /// Log, then write.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.log(offset, bytes.len())?;
        self.frame.put(offset, bytes);
        Ok(())
    }

    /// Log, then write one word.
    pub fn write_word(&mut self, offset: usize, value: u64) -> Result<()> {
        self.log(offset, 8)?;
        self.frame.store(offset, value);
        Ok(())
    }

    /// Log the counters of an object, once a poll.
    pub(super) fn log_counters(&mut self, object: &Object) -> Result<()> {
        if self.counters_logged[object.id] != self.poll {
            self.log(object.meta, META_WORDS * 8)?;
            self.counters_logged[object.id] = self.poll;
        }
        Ok(())
    }

    /// Have the checksum of a unit made, and its mark set, at the commit; logs the checksum that it has.
    pub(super) fn unsum(&mut self, object: &Object, unit: usize) -> Result<()> {
        let entry = (object.id as u32, unit as u32);
        if self.unsummed.last() != Some(&entry) {
            self.log((object.crc + unit * 4) & !7, 8)?;
            self.unsummed.push(entry);
        }
        Ok(())
    }

    /// After a change.
    #[inline]
    pub(super) fn changed_unit(&self, object: &Object, unit: usize) {
        if self.tracking & 1 != 0 {
            self.frame.mark(object, unit);
        }
    }

    /// Make everything since the last commit permanent, with one store.
    #[inline]
    pub fn commit(&mut self) {
        if !self.unsummed.is_empty() {
            self.make_checksums();
        }
        compiler_fence(Ordering::SeqCst);
        self.frame.store(Word::Epoch as usize, self.frame.stamp());
        self.forget();
    }

    /// Take back what was written since the last commit; words undone.
    pub fn abort(&mut self) -> Result<u64> {
        if self.logging {
            self.recover()
        } else {
            Ok(0)
        }
    }

    /// Roll back the unfinished poll of whoever wrote last; words undone. The log is checked whole before any of it is
    /// used. Raises `Damaged`, `Usage`.
    pub fn recover(&mut self) -> Result<u64> {
        self.frame.check_writable()?;
        let records = unfinished(&self.frame)?;
        let marking = (self.frame.get(Word::Tracking) | self.tracking) & 1 != 0;
        let mut words = 0;
        for record in &records {
            if record.offset == NOTE {
                let mut note = vec![0; record.len];
                self.frame.mapping().read(record.body, &mut note);
                self.notes.push(note);
                continue;
            }
            let mut done = 0;
            while done < record.len {
                let chunk = &mut self.scratch[..CHUNK.min(record.len - done)];
                self.frame.mapping().read(record.body + done, chunk);
                self.frame.put(record.offset + done, chunk);
                done += chunk.len();
            }
            words += record.len.div_ceil(8) as u64;
            if marking {
                mark_range(&self.frame, record.offset, record.len);
            }
        }
        self.frame.store(Word::LogLen as usize, 0);
        // Whoever follows the changes may have been told by a predecessor that they are marked.
        self.tracking = self.frame.get(Word::Tracking);
        self.forget();
        Ok(words)
    }

    /// At a poll boundary: begin (or end) to mark changes, if somebody asks.
    #[inline]
    pub fn acknowledge(&mut self) {
        let asked = self.frame.get(Word::Tracking);
        if asked != self.tracking || asked != self.frame.get(Word::TrackingAck) {
            self.tracking = asked;
            self.frame.set(Word::TrackingAck, asked);
        }
    }

    fn begin(&mut self) -> Result<()> {
        self.frame.check_writable()?;
        if self.frame.mapping().shrunk() {
            return damaged("the segment was shrunk under its user");
        }
        self.frame.store(Word::LogLen as usize, 0);
        self.frame.store(Word::LogStamp as usize, self.frame.stamp());
        self.log_len = 0;
        self.logging = true;
        Ok(())
    }

    /// A new poll for the private half.
    fn forget(&mut self) {
        self.logging = false;
        self.log_len = 0;
        self.poll += 1;
        self.unsummed.clear();
        if !self.freed.is_empty() {
            self.freed.clear();
        }
    }

    #[cold]
    fn make_checksums(&mut self) {
        self.unsummed.sort_unstable();
        self.unsummed.dedup();
        for &(id, unit) in &self.unsummed {
            let object = &self.frame.objects()[id as usize];
            let crc = unit_crc(&self.frame, object, unit as usize, &mut self.scratch[..]);
            self.frame.put(object.crc + unit as usize * 4, &crc.to_le_bytes());
            self.changed_unit(object, unit as usize);
        }
    }
}

/// The checksum word of a slab's item or an array's block: a CRC-32C that begins with zero instead of ones, so that
/// memory never touched has the checksum zero.
pub(super) fn unit_crc(frame: &Frame, object: &Object, unit: usize, scratch: &mut [u8]) -> u32 {
    let (start, len) = (object.data + unit * object.stride, object.unit_len(unit));
    let mut crc = !0;
    let mut done = 0;
    while done < len {
        let take = scratch.len().min(len - done);
        frame.mapping().read(start + done, &mut scratch[..take]);
        crc = crc32c::crc32c_append(crc, &scratch[..take]);
        done += take;
    }
    !crc
}

/// One checked record of the undo log.
pub(super) struct Record {
    pub offset: usize,
    pub len: usize,
    body: usize,
}

/// The records of a poll that was not committed, newest first, all checked; empty when there is none.
pub(super) fn unfinished(frame: &Frame) -> Result<Vec<Record>> {
    let stamp = frame.stamp();
    let log_stamp = frame.get(Word::LogStamp);
    if log_stamp > stamp {
        return damaged(format!("the undo log belongs to poll {log_stamp}, the last one was {}", frame.epoch()));
    }
    let mut end = frame.get(Word::LogLen) as usize;
    if end > frame.header().log_bytes || end % 8 != 0 {
        return damaged(format!("an undo log of {end} bytes"));
    }
    let mut records = Vec::new();
    if log_stamp != stamp {
        return Ok(records);
    }
    while end > 0 {
        if end < FOOTER {
            return damaged("a record of the undo log is cut off");
        }
        let offset = frame.load(OFF_LOG + end - FOOTER) as usize;
        let word = frame.load(OFF_LOG + end - FOOTER + 8);
        let (len, crc) = (word as u32 as usize, (word >> 32) as u32);
        let body = len.next_multiple_of(8);
        if body > end - FOOTER || !(offset == NOTE || loggable(frame, offset, len)) {
            return damaged("a record of the undo log is out of bounds");
        }
        end -= FOOTER + body;
        let body = OFF_LOG + end;
        if crc != read_crc(frame, body, len, record_crc(stamp, offset, len)) {
            return damaged("the checksum of a record of the undo log does not match");
        }
        records.push(Record { offset, len, body });
    }
    Ok(records)
}

fn read_crc(frame: &Frame, offset: usize, len: usize, mut crc: u32) -> u32 {
    let mut chunk = [0; 512];
    let mut done = 0;
    while done < len {
        let take = chunk.len().min(len - done);
        frame.mapping().read(offset + done, &mut chunk[..take]);
        crc = crc32c::crc32c_append(crc, &chunk[..take]);
        done += take;
    }
    crc
}

#[inline]
fn record_crc(stamp: u64, offset: usize, len: usize) -> u32 {
    let mut head = [0; 24];
    head[..8].copy_from_slice(&stamp.to_le_bytes());
    head[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
    head[16..].copy_from_slice(&(len as u64).to_le_bytes());
    crc32c::crc32c(&head)
}

/// Only snapshots and objects are ever undone.
#[inline]
fn loggable(frame: &Frame, offset: usize, len: usize) -> bool {
    let Some(end) = offset.checked_add(len) else { return false };
    let objects = OFF_LOG + frame.header().log_bytes;
    len <= u32::MAX as usize
        && ((offset >= objects && end <= frame.header().size)
            || (offset >= OFF_SNAPSHOTS && end <= OFF_SNAPSHOTS + 2 * SNAPSHOT))
}

/// Mark every unit that a range which was undone concerns.
fn mark_range(frame: &Frame, offset: usize, len: usize) {
    if let Some((object, units)) = units_in(frame, offset, len) {
        for unit in units {
            frame.mark(object, unit);
        }
    }
}

/// The units whose bytes, liveness or checksum lie in a logged range, which never crosses from one object to another.
pub(super) fn units_in(frame: &Frame, offset: usize, len: usize) -> Option<(&Arc<Object>, Range<usize>)> {
    let object = frame.objects().iter().rev().find(|object| object.meta <= offset)?;
    let (start, unit, scale) = if offset >= object.data {
        (object.data, object.stride, 1)
    } else if offset >= object.crc && object.spec.kind != Kind::Table {
        (object.crc, 4, 1)
    } else if offset >= object.index && object.spec.kind == Kind::Slab {
        (object.index, 1, 8)
    } else {
        return None;
    };
    let first = (offset - start) * scale / unit;
    let last = ((offset - start + len) * scale).div_ceil(unit).min(object.units);
    Some((object, first..last))
}
