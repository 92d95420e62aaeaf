//! The engine runtime: a worker thread that polls one engine over its channels, and the mailbox through which control
//! code runs short pieces of work on that thread.

pub mod echo;
pub mod mailbox;
pub mod worker;

use crate::channel::{Rx, Tx};
use crate::error::{Error, Result};

/// A channel as an engine holds it.
pub struct Channel {
    pub id: u64,
    pub tx: Tx,
    pub rx: Rx,
}

/// The channels of one engine, in the order in which they were attached.
#[derive(Default)]
pub struct Channels {
    list: Vec<Channel>,
    dropped: Vec<(Channel, Error)>,
    first: usize,
}

impl Channels {
    pub fn attach(&mut self, channel: Channel) {
        self.list.push(channel);
    }

    pub fn detach(&mut self, id: u64) -> Option<Channel> {
        let index = self.list.iter().position(|channel| channel.id == id)?;
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
            self.dropped.push((channel, error));
        }
        used
    }

    /// Channels dropped since the last call.
    pub fn take_dropped(&mut self) -> Vec<(Channel, Error)> {
        std::mem::take(&mut self.dropped)
    }
}

/// A stateful single-threaded task that never blocks and, on the steady path, never allocates.
pub trait Engine: Send {
    /// Do at most about `budget` messages of work; how much was done. 0 lets the worker wait.
    fn poll(&mut self, channels: &mut Channels, budget: usize) -> usize;
}

/// The engines that this crate ships, by the name that a manifest gives as `native:NAME`.
pub const NAMES: [&str; 1] = ["echo"];

pub fn make(name: &str) -> Option<Box<dyn Engine>> {
    match name {
        "echo" => Some(Box::new(echo::Echo::default())),
        _ => None,
    }
}
