//! Gate page: the kernel's word, per channel, on whether a module may still serve it.
//!
//! The kernel writes it, the module maps it read-only, clients never see it: a client that owns its ring segment
//! can forge the state word in there, but not this one. A line holds `generation << 8 | OPEN`; anything else is shut.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::error::{Error, Fault, Result};
use crate::segment::Mapping;

pub const LINES: usize = 1024;
pub const LINE: usize = 64;
pub const BYTES: usize = LINES * LINE;
const OPEN: u64 = 1;

fn open_word(generation: u32) -> u64 {
    u64::from(generation) << 8 | OPEN
}

/// The kernel's writable page.
pub struct Gate(Mapping);

impl Gate {
    pub fn new(fd: BorrowedFd<'_>) -> Result<Gate> {
        Mapping::new(fd, BYTES, true).map(Gate)
    }

    pub fn open(&self, line: usize, generation: u32) {
        self.0.u64_at(line * LINE).store(open_word(generation), Ordering::Release);
    }

    pub fn shut(&self, line: usize) {
        self.0.u64_at(line * LINE).store(0, Ordering::Release);
    }
}

/// A module's view of one line.
pub struct Line {
    page: Arc<Mapping>,
    offset: usize,
    expected: u64,
}

impl Line {
    pub fn new(fd: BorrowedFd<'_>, index: usize, generation: u32) -> Result<Line> {
        if index >= LINES {
            return Err(Error::Faulted(Fault::Geometry));
        }
        let page = Arc::new(Mapping::new(fd, BYTES, false)?);
        Ok(Line { page, offset: index * LINE, expected: open_word(generation) })
    }

    #[inline]
    pub fn is_open(&self) -> bool {
        self.page.u64_at(self.offset).load(Ordering::Acquire) == self.expected
    }
}
