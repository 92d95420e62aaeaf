//! Who runs an engine: a SysV semaphore taken with SEM_UNDO, which the operating system gives back however its holder ends,
//! to whoever waits for it.
//!
//! One of the few files with `unsafe`: nothing safe wraps `semtimedop(2)`.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

extern "C" {
    /// Of the C library; the crate `libc` does not declare it.
    fn semtimedop(
        semaphore: libc::c_int,
        operations: *mut libc::sembuf,
        count: libc::size_t,
        limit: *const libc::timespec,
    ) -> libc::c_int;
}

/// The longest single sleep: how soon `cancel` is seen.
const SLICE: Duration = Duration::from_millis(20);
/// Slices for which who released leaves the semaphore to others: a waiter may be between two of its own.
const COURTESY: usize = 5;

pub struct Ownership {
    semaphore: libc::c_int,
    held: AtomicBool,
    cancelled: AtomicBool,
    /// Slices left in which others come first.
    courtesy: AtomicUsize,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    Owned,
    Timeout,
    Cancelled,
    /// By a signal, which may have a handler that wants to run.
    Signal,
}

impl Ownership {
    /// `semaphore`: the id of a set of one, whose value is 1 while nobody owns the engine.
    pub fn new(semaphore: i32) -> Ownership {
        Ownership {
            semaphore,
            held: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            courtesy: AtomicUsize::new(0),
        }
    }

    /// Wait for it, at most `timeout`. At once when it is held already; after a `release`, others come first (unless the
    /// timeout is zero). Raises `Os` when the semaphore is not there (any more): whoever made it has no use for this
    /// engine.
    pub fn acquire(&self, timeout: Option<Duration>) -> Result<Waited> {
        if self.held() {
            return Ok(Waited::Owned);
        }
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let patient = timeout.is_none_or(|timeout| !timeout.is_zero());
        loop {
            if self.cancelled.swap(false, Ordering::AcqRel) {
                return Ok(Waited::Cancelled);
            }
            let left = end.map_or(SLICE, |end| end.saturating_duration_since(Instant::now()).min(SLICE));
            let courtesy = self.courtesy.load(Ordering::Acquire);
            if courtesy > 0 && patient && self.was_last() {
                // Waits for zero: until somebody has it.
                match self.operate(0, Some(left)) {
                    Ok(()) => self.courtesy.store(0, Ordering::Release),
                    Err(libc::EAGAIN) => self.courtesy.store(courtesy - 1, Ordering::Release),
                    Err(libc::EINTR) => return Ok(Waited::Signal),
                    Err(errno) => return Err(failed(errno)),
                }
                if end.is_some_and(|end| Instant::now() >= end) {
                    return Ok(Waited::Timeout);
                }
                continue;
            }
            match self.operate(-1, Some(left)) {
                Ok(()) => {
                    self.held.store(true, Ordering::Release);
                    return Ok(Waited::Owned);
                }
                Err(libc::EAGAIN) if end.is_some_and(|end| Instant::now() >= end) => return Ok(Waited::Timeout),
                Err(libc::EAGAIN) => {}
                Err(libc::EINTR) => return Ok(Waited::Signal),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// Give it to whoever waits. Raises `Os` when the semaphore is gone; it is not held then either.
    pub fn release(&self) -> Result<()> {
        if !self.held.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.courtesy.store(COURTESY, Ordering::Release);
        self.operate(1, None).map_err(failed)
    }

    /// End the wait of another thread, or the next one, within some milliseconds.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    pub fn held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Whether nobody else has taken or released it since this process did.
    fn was_last(&self) -> bool {
        // SAFETY: asks for a number; there is no fourth argument to this command.
        let last = unsafe { libc::semctl(self.semaphore, 0, libc::GETPID) };
        u32::try_from(last).is_ok_and(|last| last == std::process::id())
    }

    fn operate(&self, change: i16, limit: Option<Duration>) -> std::result::Result<(), i32> {
        let mut operation = libc::sembuf { sem_num: 0, sem_op: change, sem_flg: libc::SEM_UNDO as libc::c_short };
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: limit.as_secs() as libc::time_t,
            tv_nsec: limit.subsec_nanos() as libc::c_long,
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: one operation and one optional time, both alive for the duration of the call, which writes neither.
        if unsafe { semtimedop(self.semaphore, &mut operation, 1, limit) } == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    }
}

fn failed(errno: i32) -> Error {
    let what = match errno {
        libc::EIDRM | libc::EINVAL => "the semaphore of an engine was removed",
        _ => "waiting for the ownership of an engine",
    };
    Error::Os { what, source: std::io::Error::from_raw_os_error(errno) }
}
