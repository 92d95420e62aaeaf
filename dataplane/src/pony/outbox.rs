//! Messages to applications other than the one whose command is being served. Those that find no room wait in the state,
//! in order; nobody else waits for them.

use std::collections::{HashSet, VecDeque};

use rustc_hash::FxHashMap;

use super::command::Kind;
use super::numbered::Numbered;
use super::rows::{Waiting, NOBODY};
use crate::channel::Tx;
use crate::engine::Channels;
use crate::error::Error;
use crate::state::{Frame, Result, Segment};

/// Messages of one connection that may wait.
pub const CREDITS: u32 = 64;
/// Bytes of messages in one poll.
const BYTES: usize = 128 * 1024;
/// Messages of one application that may wait, and whatever else it is told besides: whoever leaves more unread than that
/// loses its channel, and nobody else anything.
const QUEUE: usize = 1024;
const MOST: usize = 8 * QUEUE;
/// Rows for what is said besides.
const MARGIN: usize = 512;

#[derive(Default)]
pub struct Outbox {
    waiting: Numbered<Waiting>,
    /// Of each channel, the numbers of what waits for it.
    queues: FxHashMap<u64, VecDeque<u32>>,
    /// Of each connection, how many wait, or are about to be delivered.
    held: FxHashMap<u32, u32>,
    order: u64,
    parcels: Vec<Parcel>,
    bytes: Vec<u8>,
    settled: Vec<u32>,
    overrun: HashSet<u64>,
}

struct Parcel {
    channel: u64,
    connection: u32,
    tag: u64,
    start: usize,
    len: usize,
}

impl Outbox {
    /// Raises `Schema`, `Damaged`.
    pub fn adopt(frame: &Frame) -> Result<Outbox> {
        let waiting = Numbered::<Waiting>::adopt(frame)?;
        let mut found: Vec<_> =
            waiting.iter().map(|(number, item)| (item.order, item.channel, item.connection, number)).collect();
        found.sort_unstable();
        let mut outbox = Outbox { waiting, ..Outbox::default() };
        for (order, channel, connection, number) in found {
            outbox.order = order;
            outbox.queues.entry(channel).or_default().push_back(number);
            *outbox.held.entry(connection).or_default() += 1;
        }
        Ok(outbox)
    }

    /// Whether another message may be put: each poll fits the undo log, and what finds no room finds a row.
    pub fn has_room(&self) -> bool {
        self.bytes.len() < BYTES && self.waiting.left() > self.parcels.len() + MARGIN
    }

    /// Whether a connection may have another message on its way to that channel, which leaves half of what it may have to
    /// whatever else it is told.
    pub fn may_hold(&self, channel: u64, connection: u32) -> bool {
        self.held.get(&connection).is_none_or(|held| *held < CREDITS)
            && self.queues.get(&channel).is_none_or(|queue| queue.len() < QUEUE.min(self.waiting.left() / 2))
    }

    /// Whether the application of a channel has left too much unread.
    pub fn overran(&mut self, channel: u64) -> bool {
        self.overrun.remove(&channel)
    }

    /// How many messages of a connection wait, or are about to be delivered.
    pub fn held(&self, connection: u32) -> u32 {
        self.held.get(&connection).copied().unwrap_or(0)
    }

    /// Connections of which messages were delivered since the last call; 0 may be among them.
    pub fn settled(&mut self) -> std::vec::Drain<'_, u32> {
        self.settled.drain(..)
    }

    /// Have `head` and `body` delivered as one message, over `connection` (the receiver's end).
    pub fn put(&mut self, channel: u64, connection: u32, tag: u64, head: &[u8], body: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(body);
        *self.held.entry(connection).or_default() += 1;
        self.parcels.push(Parcel { channel, connection, tag, start, len: head.len() + body.len() });
    }

    /// Deliver what finds room, first what has waited; how much was. Raises `Full`.
    pub fn deliver(&mut self, channels: &mut Channels, segment: &mut Segment) -> Result<usize> {
        let mut done = 0;
        if !self.queues.is_empty() {
            for channel in channels.iter_mut() {
                done += self.retry(channel.id, &mut channel.tx, segment)?;
            }
        }
        let parcels = std::mem::take(&mut self.parcels);
        for parcel in &parcels {
            let bytes = &self.bytes[parcel.start..parcel.start + parcel.len];
            // Nobody overtakes.
            let free = !self.queues.contains_key(&parcel.channel);
            let target = channels.iter_mut().find(|channel| channel.id == parcel.channel);
            match target.map(|channel| if free { put(&mut channel.tx, parcel.tag, bytes) } else { Ok(false) }) {
                Some(Ok(true)) => {
                    done += 1;
                    self.settle(parcel.connection);
                }
                Some(Ok(false)) => self.keep(segment, parcel)?,
                // Its next turn says what is wrong with it.
                Some(Err(_)) | None => self.settle(parcel.connection),
            }
        }
        self.parcels = parcels;
        self.parcels.clear();
        self.bytes.clear();
        Ok(done)
    }

    fn retry(&mut self, channel: u64, tx: &mut Tx, segment: &mut Segment) -> Result<usize> {
        let Some(queue) = self.queues.get_mut(&channel) else { return Ok(0) };
        let mut done = 0;
        while let Some(number) = queue.front().copied() {
            let Some(item) = self.waiting.get(number) else { break };
            if !matches!(put(tx, item.tag, &item.bytes), Ok(true)) {
                return Ok(done);
            }
            queue.pop_front();
            let connection = item.connection;
            self.waiting.remove(segment, number)?;
            release(&mut self.held, connection);
            self.settled.push(connection);
            done += 1;
        }
        self.queues.remove(&channel);
        Ok(done)
    }

    fn keep(&mut self, segment: &mut Segment, parcel: &Parcel) -> Result<()> {
        let waiting = self.queues.get(&parcel.channel).map_or(0, VecDeque::len);
        if waiting >= MOST || !self.waiting.may_have(parcel.channel, 1) {
            self.overrun.insert(parcel.channel);
            self.settle(parcel.connection);
            return Ok(());
        }
        self.order += 1;
        let bytes = self.bytes[parcel.start..parcel.start + parcel.len].to_vec();
        let (channel, connection, tag) = (parcel.channel, parcel.connection, parcel.tag);
        let number = self.waiting.insert(segment, Waiting { channel, order: self.order, connection, tag, bytes })?;
        self.queues.entry(channel).or_default().push_back(number);
        Ok(())
    }

    fn settle(&mut self, connection: u32) {
        self.settled.push(connection);
        release(&mut self.held, connection);
    }

    /// What waits for channels that are no more, all but `present`, is forgotten.
    pub fn retain(&mut self, segment: &mut Segment, present: impl Fn(u64) -> bool) -> Result<()> {
        let gone: Vec<u64> = self.queues.keys().copied().filter(|channel| !present(*channel)).collect();
        for channel in gone {
            for number in self.queues.remove(&channel).unwrap_or_default() {
                self.drop(segment, number)?;
            }
        }
        Ok(())
    }

    /// The application has closed its end of a connection, whose number somebody else may have next: what that one would
    /// take for its own is forgotten. Completions stay.
    pub fn forget(&mut self, segment: &mut Segment, channel: u64, connection: u32) -> Result<()> {
        for parcel in self.parcels.iter_mut().filter(|parcel| parcel.channel == channel) {
            if is_event(&self.bytes[parcel.start..parcel.start + parcel.len], connection) {
                parcel.channel = NOBODY;
            }
        }
        let Some(queue) = self.queues.get_mut(&channel) else { return Ok(()) };
        let mut gone = Vec::new();
        queue.retain(|number| {
            let event = self.waiting.get(*number).is_some_and(|item| is_event(&item.bytes, connection));
            if event {
                gone.push(*number);
            }
            !event
        });
        if queue.is_empty() {
            self.queues.remove(&channel);
        }
        gone.into_iter().try_for_each(|number| self.drop(segment, number))
    }

    fn drop(&mut self, segment: &mut Segment, number: u32) -> Result<()> {
        if let Some(item) = self.waiting.remove(segment, number)? {
            release(&mut self.held, item.connection);
        }
        Ok(())
    }
}

/// Whether a message tells of something that happened to a connection without having been asked.
fn is_event(bytes: &[u8], connection: u32) -> bool {
    let kind = bytes.first().copied().and_then(Kind::of);
    let told = bytes.get(4..).and_then(|rest| rest.first_chunk()).map(|number| u32::from_le_bytes(*number));
    told == Some(connection) && matches!(kind, Some(Kind::Connected | Kind::Message | Kind::Datagram | Kind::Closed))
}

fn release(held: &mut FxHashMap<u32, u32>, connection: u32) {
    if let Some(count) = held.get_mut(&connection) {
        *count -= 1;
        if *count == 0 {
            held.remove(&connection);
        }
    }
}

/// False when there is no room. A channel that is at its end raises why.
fn put(tx: &mut Tx, tag: u64, bytes: &[u8]) -> std::result::Result<bool, Error> {
    tx.check()?;
    match tx.put(tag, bytes) {
        Ok(()) => Ok(true),
        Err(Error::Full) => Ok(false),
        Err(error) => Err(error),
    }
}
