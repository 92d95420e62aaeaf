//! Waiting for any of many channels: epoll over their doorbells, with the armed-flag protocol in front.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{epoll, Timespec};

use crate::bell::{Bell, SLICE};
use crate::channel::{Rx, Tx};
use crate::error::{Error, Result};
use crate::ring::ARMED_EVENT;

/// How long an adaptive waiter spins before it sleeps: about what a wake-up across cores costs (ski rental).
pub const SPIN_LIMIT: Duration = Duration::from_micros(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Spin,
    Adaptive,
    Block,
}

pub struct Poller {
    epoll: rustix::fd::OwnedFd,
    waker: Bell,
}

impl Poller {
    pub fn new() -> Result<Poller> {
        let os = |errno| Error::os("setting up a poller", errno);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os)?;
        let waker = Bell::new().map_err(os)?;
        // Edge-triggered throughout: a bell is never read, each ring is a new edge.
        epoll::add(&epoll, waker.as_fd(), epoll::EventData::new_u64(0), epoll::EventFlags::IN | epoll::EventFlags::ET)
            .map_err(os)?;
        Ok(Poller { epoll, waker })
    }

    pub fn add(&self, bell: &Bell) -> Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, bell.as_fd(), epoll::EventData::new_u64(1), flags)
            .map_err(|errno| Error::os("adding a channel to a poller", errno))
    }

    /// A descriptor of whatever kind: a sleep ends when it becomes readable or writable.
    pub fn watch(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(2), flags)
            .map_err(|errno| Error::os("adding a descriptor to a poller", errno))
    }

    pub fn remove(&self, bell: &Bell) {
        // Not there any more is as good.
        let _ = epoll::delete(&self.epoll, bell.as_fd());
    }

    /// End the current or the next sleep, from any thread.
    pub fn wake(&self) {
        self.waker.ring();
    }

    /// Sleep until a doorbell or `wake`, at most `limit` and at most a slice. True when something rang.
    pub fn sleep(&self, limit: Option<Duration>) -> bool {
        let limit = limit.map_or(SLICE, |limit| limit.min(SLICE));
        let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        let mut events = Vec::with_capacity(16);
        matches!(epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)), Ok(n) if n > 0)
    }
}

/// Announce sleep on a channel: for messages or, with `room`, for room to send. Returns what `sync::settle` has to know.
pub fn raise(tx: &mut Tx, rx: &mut Rx, room: bool) -> bool {
    if room {
        tx.raise(ARMED_EVENT)
    } else {
        rx.raise(ARMED_EVENT)
    }
}

/// The last look, after all channels were raised and `sync::settle`: whether this one need not be polled now. One
/// that changed its state or faults is not idle: whoever polls it next will meet that.
pub fn idle(tx: &mut Tx, rx: &mut Rx, room: bool) -> bool {
    if room {
        matches!(tx.still_stalled(), Ok(true)) && rx.check().is_ok()
    } else {
        rx.idle()
    }
}

/// Awake again: senders need not ring while we poll.
pub fn lower(tx: &Tx, rx: &Rx) {
    tx.lower();
    rx.lower();
}

/// Whether a waiter that began at `since` still spins.
pub fn spins(wait: Wait, since: Instant) -> bool {
    match wait {
        Wait::Spin => true,
        Wait::Adaptive => since.elapsed() < SPIN_LIMIT,
        Wait::Block => false,
    }
}
