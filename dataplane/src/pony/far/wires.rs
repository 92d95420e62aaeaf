//! Wires of shared memory to engines of this host: each takes the network's place for one link, for as long as it holds.
//!
//! A wire is in no state. Who loses it (the peer broke it, an engine died) goes on by UDP, and so does the peer as soon as
//! something comes to it by UDP: only who has no wire any more sends there. Control code is asked for another one.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use serde::Deserialize;

use super::line::Item;
use super::Far;
use crate::bell::Bell;
use crate::pony::desk::Desk;
use crate::pony::flow::{Nanos, MILLISECOND};
use crate::pony::port::wire::{self, Shape, Side, Wire};
use crate::pony::port::{Address, Burst, Port};
use crate::state::{Result, StateError};

/// How long nothing was heard by a wire, though something is under way: its other end may be dead, and UDP may find another.
const SILENT: Nanos = 1_000 * MILLISECOND;

/// Polls of an engine whose links have wires, of which one looks at the network.
const SELDOM: u32 = 16;

/// One end of a wire, as control code has it. The descriptors stay its own: segment, the bell to listen to, the one to ring.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    side: u8,
    frames: u32,
    mtu: u32,
    fds: [i32; 3],
}

/// What rings when there is something to do on any of the wires: one descriptor, as what a worker sleeps on never changes.
#[derive(Clone)]
pub struct Bells(Arc<OwnedFd>);

impl Bells {
    pub fn new() -> Result<Bells> {
        let made = epoll::create(epoll::CreateFlags::CLOEXEC);
        made.map(|fd| Bells(Arc::new(fd))).map_err(|errno| os("bells of wires", errno))
    }
}

impl AsFd for Bells {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A wire that serves a link.
pub struct Plug {
    pub wire: Wire,
    pub burst: Burst,
    bells: Bells,
}

impl Drop for Plug {
    fn drop(&mut self) {
        // The peer may have the bell as well: to close it here is not enough.
        let _ = epoll::delete(&self.bells, self.wire.fd());
    }
}

#[derive(Default)]
pub struct Wires {
    bells: Option<Bells>,
    plugs: HashMap<u32, Plug>,
    /// Polls since the network was looked at.
    polls: u32,
}

impl Wires {
    pub fn with(bells: Bells) -> Wires {
        Wires { bells: Some(bells), ..Wires::default() }
    }

    /// For an engine that begins anew.
    pub fn without_any(&self) -> Wires {
        Wires { bells: self.bells.clone(), ..Wires::default() }
    }

    pub fn bells(&self) -> Option<&Bells> {
        self.bells.as_ref()
    }

    pub fn has(&self, link: u32) -> bool {
        self.plugs.contains_key(&link)
    }

    pub fn links(&self) -> Vec<u32> {
        self.plugs.keys().copied().collect()
    }

    pub fn take(&mut self, link: u32) -> Option<Plug> {
        self.plugs.remove(&link)
    }

    pub fn put(&mut self, link: u32, plug: Plug) {
        self.plugs.insert(link, plug);
    }

    /// An end for packets of up to `mtu` bytes. Raises `Usage` for one that cannot be, `Os`.
    pub fn open(&self, given: &Given, mtu: u16, peer: Address) -> Result<Plug> {
        let refuse = |why: String| StateError::Usage(format!("a wire: {why}"));
        let bells = self.bells.clone().ok_or_else(|| refuse("there are no other hosts here".into()))?;
        let side = match given.side {
            0 => Side::A,
            1 => Side::B,
            other => return Err(refuse(format!("there is no side {other}"))),
        };
        let shape = Shape::new(given.frames, given.mtu).filter(|_| given.mtu >= mtu.into());
        let shape = shape.ok_or_else(|| refuse(format!("{} frames of {} bytes", given.frames, given.mtu)))?;
        let [segment, mine, theirs] = given.fds.map(wire::duplicate);
        let bell = |fd: rustix::io::Result<OwnedFd>| fd.map(Bell::from).map_err(|errno| os("a bell", errno));
        let segment = segment.map_err(|errno| os("a segment", errno))?;
        let wire = Wire::open(segment.as_fd(), shape, side, (bell(mine)?, bell(theirs)?), peer)
            .map_err(|error| refuse(error.to_string()))?;
        epoll::add(&bells, wire.fd(), epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(|errno| os("listening to a bell", errno))?;
        Ok(Plug { wire, burst: Burst::default(), bells })
    }

    /// Before sleeping: false when there is something to do.
    pub fn arm(&mut self) -> bool {
        self.plugs.values_mut().all(|plug| !plug.burst.left() && plug.wire.arm())
    }

    /// After sleeping.
    pub fn disarm(&mut self) {
        self.plugs.values_mut().for_each(|plug| plug.wire.disarm());
        // It may be what rang.
        self.polls = SELDOM;
    }

    /// Whether to look for packets that come by UDP. Where each of the `lines` has a wire, only who has lost it sends there,
    /// and a system call in each poll would cost more than all else.
    pub fn network_is_due(&mut self, lines: usize) -> bool {
        self.polls += 1;
        self.plugs.is_empty() || self.plugs.len() < lines || self.polls > SELDOM
    }

    /// It was, and brought `done` packets: where there were some, there may be more.
    pub fn looked_at_network(&mut self, done: usize) {
        self.polls = if done > 0 { SELDOM } else { 0 };
    }
}

impl Desk {
    /// A link's wire does not hold: it goes on by UDP, and the peer hears of it there.
    pub(super) fn lose_wire(&mut self, link: u32) {
        self.far.wires.take(link);
        if let Some((number, _)) = self.connections.iter().find(|(_, own)| own.link == link && !own.opening) {
            self.far.queue(link, Item::Alive(number));
        }
        self.far.rouse(link);
    }

    pub(super) fn lose_silent_wires(&mut self, now: Nanos) {
        for link in self.far.wires.links() {
            if self.far.lines.get(&link).is_none_or(|line| line.flow.silence(now) > SILENT) {
                self.lose_wire(link);
            }
        }
    }
}

impl Far {
    /// Whether a link had a wire, and another one may be had.
    pub(super) fn misses_wire(&self, link: u32) -> bool {
        let agreed = self.lines.get(&link).is_some_and(|line| line.attached.wired);
        agreed && !self.wires.has(link) && !self.refusals.contains_key(&link)
    }
}

fn os(what: &'static str, errno: rustix::io::Errno) -> StateError {
    StateError::Os { what, source: errno.into() }
}
