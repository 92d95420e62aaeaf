//! Doorbells: waking whoever armed a word, and sleeping on one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::event::{eventfd, EventfdFlags, Timespec};
use rustix::io::Errno;
use rustix::thread::futex;

use crate::ring::{Wake, ARMED_EVENT, ARMED_FUTEX};

/// The longest single sleep. A peer can take our armed word down without ringing (it owns the line as well as we
/// do); this bounds what that costs us, and an idle waiter wakes twice a second.
pub const SLICE: Duration = Duration::from_millis(500);

/// An eventfd that one end of a channel listens to and the other one writes.
pub struct Bell(OwnedFd);

impl Bell {
    pub fn new() -> rustix::io::Result<Bell> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Bell)
    }

    /// A duplicate of a descriptor that stays the caller's.
    pub fn duplicate(fd: BorrowedFd<'_>) -> rustix::io::Result<Bell> {
        rustix::io::fcntl_dupfd_cloexec(fd, 0).map(Bell)
    }

    /// Never blocks: a full counter (EAGAIN) has rung enough.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub fn drain(&self) {
        // The bell may be a blocking descriptor of somebody else's making: look before reading.
        let mut fds = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        if matches!(rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1)) {
            let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
        }
    }
}

impl From<OwnedFd> for Bell {
    fn from(fd: OwnedFd) -> Bell {
        Bell(fd)
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Do what an armed word asked for.
#[inline]
pub fn wake(word: &AtomicU32, wake: Wake, bell: &Bell) {
    match wake.0 {
        0 => {}
        ARMED_FUTEX => {
            let _ = futex::wake(word, futex::Flags::empty(), u32::MAX >> 1);
        }
        ARMED_EVENT => bell.ring(),
        // Not a value that a sound peer writes; waking both ways hurts nobody.
        _ => {
            let _ = futex::wake(word, futex::Flags::empty(), u32::MAX >> 1);
            bell.ring();
        }
    }
}

/// Sleep while `word` is armed for a futex, at most `limit` and at most a slice. True when a signal interrupted it.
pub fn sleep(word: &AtomicU32, limit: Option<Duration>) -> bool {
    let limit = limit.map_or(SLICE, |limit| limit.min(SLICE));
    let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    matches!(futex::wait(word, futex::Flags::empty(), ARMED_FUTEX, Some(&timeout)), Err(Errno::INTR))
}
