//! Waiting for any of many channels: epoll over their doorbells, with the armed-flag protocol in front.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{epoll, Timespec};

use crate::bell::{Bell, SLICE};
use crate::channel::{Rx, Tx};
use crate::error::{Error, Result};
use crate::ring::{ARMED_EVENT, DISARMED};

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

/// Arm a channel for its doorbell: for messages or, when its last answer did not fit, for room. False when it need not
/// be waited for, or has changed its state or faults (whoever polls it next will meet that).
pub fn arm(tx: &mut Tx, rx: &mut Rx, room: bool) -> bool {
    let armed = if room { tx.arm_stalled(ARMED_EVENT) } else { rx.arm(ARMED_EVENT) };
    matches!(armed, Ok(true)) && rx.check().is_ok()
}

/// Take the armed word down again, so that the sender does not ring while we poll.
pub fn disarm(rx: &Rx) {
    rx.armed_word().store(DISARMED, Ordering::Relaxed);
}

/// Whether a waiter that began at `since` still spins.
pub fn spins(wait: Wait, since: Instant) -> bool {
    match wait {
        Wait::Spin => true,
        Wait::Adaptive => since.elapsed() < SPIN_LIMIT,
        Wait::Block => false,
    }
}
