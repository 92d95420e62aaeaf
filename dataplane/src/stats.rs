//! Engine statistics under a seqlock: one writer (the engine's thread), any number of readers that never disturb it.
//!
//! A record is 256 bytes: sequence word, then counters. Every word is an atomic, so a torn read is only an old
//! mixture, never undefined; the sequence word (odd while being written) tells the reader to take it again.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{fence, Ordering};

use rustix::time::{clock_gettime, ClockId};

use crate::error::Result;
use crate::segment::Mapping;

pub const LINES: usize = 16;
pub const RECORD: usize = 256;
pub const BYTES: usize = LINES * RECORD;
pub const FIELDS: [&str; 21] = [
    "polls",
    "work",
    "busy_ns",
    "heartbeat_ns",
    "channels",
    "delay_0",
    "delay_1",
    "delay_2",
    "delay_3",
    "delay_4",
    "delay_5",
    "delay_6",
    "delay_7",
    "delay_8",
    "delay_9",
    "delay_10",
    "delay_11",
    "delay_12",
    "delay_13",
    "delay_14",
    "delay_15",
];

/// `delay_i` counts queueing delays below 2^i microseconds (the last one, all others).
pub const DELAY_FIRST: usize = 5;

pub type Record = [u64; FIELDS.len()];

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

pub struct Page(Mapping);

impl Page {
    pub fn new(fd: BorrowedFd<'_>, writable: bool) -> Result<Page> {
        Mapping::new(fd, BYTES, writable).map(Page)
    }

    /// Publish a record. `index` is below `LINES` (else a panic: our own error).
    pub fn write(&self, index: usize, record: &Record) {
        let base = index * RECORD;
        let sequence = self.0.u64_at(base);
        let odd = sequence.load(Ordering::Relaxed) | 1;
        sequence.store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        for (i, value) in record.iter().enumerate() {
            self.0.u64_at(base + 8 + 8 * i).store(*value, Ordering::Relaxed);
        }
        sequence.store(odd.wrapping_add(1), Ordering::Release);
    }

    /// Read a record; after 1000 torn tries (a writer that died in the middle, or lies) what is there is returned.
    pub fn read(&self, index: usize) -> Record {
        let base = index * RECORD;
        let sequence = self.0.u64_at(base);
        let mut record = [0; FIELDS.len()];
        for _ in 0..1000 {
            let before = sequence.load(Ordering::Acquire);
            for (i, value) in record.iter_mut().enumerate() {
                *value = self.0.u64_at(base + 8 + 8 * i).load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if before & 1 == 0 && sequence.load(Ordering::Relaxed) == before {
                break;
            }
            std::hint::spin_loop();
        }
        record
    }
}
