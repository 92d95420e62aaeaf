//! The engine runtime: a worker thread that polls one engine over its channels, and the mailbox through which control
//! code runs short pieces of work on that thread.

pub mod echo;
pub mod mailbox;
mod meter;
pub mod worker;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::channel::{Rx, Tx};
use crate::error::{Error, Result};
use crate::ledger::{Line, Served};
use crate::state::{self, Schema, Segment, StateError};

/// A channel as an engine holds it.
pub struct Channel {
    pub id: u64,
    pub tx: Tx,
    pub rx: Rx,
    line: Line,
}

impl Channel {
    /// `line`: the channel's gate line, where the state keeps its positions. Raises `Usage`.
    pub fn new(id: u64, mut tx: Tx, mut rx: Rx, line: usize) -> state::Result<Channel> {
        let line = Line::join(line, id, &mut tx, &mut rx)?;
        Ok(Channel { id, tx, rx, line })
    }
}

impl Served for Channel {
    fn parts(&mut self) -> (&mut Line, &mut Tx, &mut Rx) {
        (&mut self.line, &mut self.tx, &mut self.rx)
    }
}

/// The channels of one engine, in the order in which they were attached.
#[derive(Default)]
pub struct Channels {
    list: Vec<Channel>,
    dropped: Vec<(Channel, Error)>,
    first: usize,
    version: u64,
}

impl Channels {
    /// Changes whenever a channel comes or goes.
    #[inline]
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn attach(&mut self, channel: Channel) {
        self.version += 1;
        self.list.push(channel);
    }

    pub fn detach(&mut self, id: u64) -> Option<Channel> {
        let index = self.list.iter().position(|channel| channel.id == id)?;
        self.version += 1;
        Some(self.list.remove(index))
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Channel> {
        self.list.iter_mut()
    }

    /// For the ledger.
    pub fn served(&mut self) -> &mut [Channel] {
        &mut self.list
    }

    /// Serve every channel, beginning with another one each time so that a budget is shared fairly. `serve` says how much
    /// of the budget it used; a channel whose service fails is dropped with the reason, and the others are served on.
    pub fn each(&mut self, budget: usize, mut serve: impl FnMut(&mut Channel, usize) -> Result<usize>) -> usize {
        let count = self.list.len();
        let mut used = 0;
        let mut failed = Vec::new();
        for turn in 0..count {
            if used >= budget {
                break;
            }
            let index = (self.first + turn) % count;
            match serve(&mut self.list[index], budget - used) {
                Ok(done) => used += done,
                Err(error) => failed.push((index, error)),
            }
        }
        self.first = if count == 0 { 0 } else { (self.first + 1) % count };
        failed.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
        for (index, error) in failed {
            let channel = self.list.remove(index);
            self.version += 1;
            self.dropped.push((channel, error));
        }
        used
    }

    #[inline]
    pub fn any_dropped(&self) -> bool {
        !self.dropped.is_empty()
    }

    /// Channels dropped since the last call.
    pub fn take_dropped(&mut self) -> Vec<(Channel, Error)> {
        std::mem::take(&mut self.dropped)
    }
}

/// A stateful single-threaded task that never blocks and, on the steady path, never allocates.
///
/// What it writes to its state, receives and sends in one poll becomes permanent together, after the poll; what it keeps
/// in itself must follow from the state (`adopt` builds it again) or be in the snapshot.
pub trait Engine: Send {
    /// Do at most about `budget` messages of work; how much was done. 0 lets the worker wait. An error ends the engine,
    /// and what this poll did is never committed; `Damaged` condemns the state with it.
    fn poll(&mut self, channels: &mut Channels, state: &mut Segment, budget: usize) -> state::Result<usize>;

    /// What the engine keeps in its state; the default is nothing.
    fn schema(&self) -> Schema {
        Schema { engine: String::new(), name: "none".into(), version: 1, oldest: 1, objects: Vec::new() }
    }

    /// The engine is going to run on `state`, which was rolled back to its last commit: look up objects, build caches.
    /// An error refuses the state.
    fn adopt(&mut self, _state: &mut Segment) -> state::Result<()> {
        Ok(())
    }

    /// Convert packed rows of the object `object` from one schema version to another: `old` into `new`, which has as many.
    fn convert(&self, object: &str, from: u32, to: u32, _old: &[u8], _new: &mut [u8]) -> state::Result<()> {
        Err(StateError::Schema(format!("no conversion of {object:?} from version {from} to {to}")))
    }

    /// Small values to keep beside the objects, stored at a planned hand-over; none by default.
    fn snapshot(&self) -> Option<Vec<u8>> {
        None
    }

    /// Take over what `snapshot` of this or an older version gave. Called after `adopt`, when there is one.
    fn restore(&mut self, _version: u32, _snapshot: &[u8]) -> state::Result<()> {
        Ok(())
    }

    /// How long the oldest message has waited, in ns, as far as the engine knows.
    fn queueing_delay(&self) -> u64 {
        0
    }

    /// Sockets and the like that control code has for this engine; given once, before anything else is called.
    fn equip(&mut self, fds: Vec<OwnedFd>) -> state::Result<()> {
        if fds.is_empty() {
            return Ok(());
        }
        Err(StateError::Usage("this engine wants no descriptors".into()))
    }

    /// Descriptors of its own that, when they become readable or writable, end the worker's sleep.
    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// The worker wants to sleep: for how long it may at the most. Zero: there is something to do.
    fn rest(&mut self) -> Duration {
        Duration::MAX
    }

    /// The sleep that `rest` allowed is over.
    fn wake(&mut self) {}

    /// A request of control code, between two polls. An error goes to who asked, and is nothing else to the engine.
    fn control(&mut self, _state: &mut Segment, _request: &[u8]) -> state::Result<Vec<u8>> {
        Err(StateError::Usage("this engine takes no requests".into()))
    }

    /// Something to say to control code, if there is; asked after every poll.
    fn say(&mut self) -> Option<Vec<u8>> {
        None
    }
}

/// The engines that this crate ships, by the name that a manifest gives as `native:NAME`.
pub const NAMES: [&str; 2] = ["echo", "pony"];

pub fn make(name: &str) -> Option<Box<dyn Engine>> {
    match name {
        "echo" => Some(Box::new(echo::Echo::default())),
        "pony" => Some(Box::new(crate::pony::Pony::default())),
        _ => None,
    }
}
