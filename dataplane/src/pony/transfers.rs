//! Large messages: they wait in the sender's arena until the receiver has posted a place, and are copied there piece by
//! piece, so that nobody else waits for them.

use std::collections::{BTreeSet, VecDeque};

use rustc_hash::FxHashMap;

use super::command::{answer, Kind, Piece, Status};
use super::memory;
use super::numbered::Numbered;
use super::outbox::Outbox;
use super::rows::{Connection, Transfer};
use super::space::Space;
use crate::state::{Frame, Result, Segment};

/// Bytes that are copied in one poll.
const CHUNK: u64 = 512 * 1024;
/// Messages, or places, of one connection.
const MOST: usize = 64;

#[derive(Default)]
pub struct Transfers {
    items: Numbered<Transfer>,
    /// By the receiver's end of a connection.
    queues: FxHashMap<u32, Queue>,
    /// Those of them that have both a message and a place.
    matched: BTreeSet<u32>,
    /// Whose turn it was last.
    last: u32,
    order: u64,
    /// Of the burst that just failed: how many of its operations were done.
    pub partial: u64,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<u32>,
    places: VecDeque<u32>,
}

impl Queue {
    fn of(&mut self, posted: bool) -> &mut VecDeque<u32> {
        if posted {
            &mut self.places
        } else {
            &mut self.messages
        }
    }
}

/// One end of a connection: its number, and its application's channel.
#[derive(Clone, Copy)]
pub struct End {
    pub number: u32,
    pub channel: u64,
}

impl Transfers {
    /// Raises `Schema`, `Damaged`.
    pub fn adopt(frame: &Frame) -> Result<Transfers> {
        let items = Numbered::<Transfer>::adopt(frame)?;
        let mut found: Vec<_> = items.iter().map(|(number, item)| (item.order, number, *item)).collect();
        found.sort_unstable_by_key(|(order, ..)| *order);
        let mut transfers = Transfers { items, ..Transfers::default() };
        for (order, number, item) in found {
            transfers.order = order;
            transfers.queues.entry(item.connection).or_default().of(item.posted).push_back(number);
            transfers.note(item.connection);
        }
        Ok(transfers)
    }

    /// False when the connection has too many already. Raises `Full`.
    pub fn add(
        &mut self,
        segment: &mut Segment,
        connection: u32,
        stream: u16,
        posted: bool,
        tag: u64,
        piece: Piece,
    ) -> Result<bool> {
        let queue = self.queues.entry(connection).or_default().of(posted);
        if queue.len() >= MOST {
            return Ok(false);
        }
        self.order += 1;
        let order = self.order;
        let item = Transfer { connection, stream, posted, order, tag, piece, done: 0 };
        queue.push_back(self.items.insert(segment, item)?);
        self.note(connection);
        Ok(true)
    }

    /// The queue of a connection has changed.
    fn note(&mut self, connection: u32) {
        let queue = self.queues.get(&connection);
        if queue.is_some_and(|queue| queue.messages.is_empty() && queue.places.is_empty()) {
            self.queues.remove(&connection);
        }
        let queue = self.queues.get(&connection);
        if queue.is_some_and(|queue| !queue.messages.is_empty() && !queue.places.is_empty()) {
            self.matched.insert(connection);
        } else {
            self.matched.remove(&connection);
        }
    }

    /// The place of `connection` that comes after the first `taken` ones, with its row.
    pub fn place(&self, connection: u32, taken: usize) -> Option<(u32, Transfer)> {
        let row = *self.queues.get(&connection)?.places.get(taken)?;
        Some((row, *self.items.get(row)?))
    }

    pub fn posted(&self, row: u32) -> Option<&Transfer> {
        self.items.get(row)
    }

    /// So many bytes of a message from another host are in their place.
    pub fn advance(&mut self, segment: &mut Segment, row: u32, done: u64) -> Result<()> {
        self.items.update(segment, row, |item| item.done = done)
    }

    /// A message of `len` bytes from another host is in its place.
    pub fn fill(
        &mut self,
        segment: &mut Segment,
        to: End,
        row: u32,
        stream: u16,
        len: u64,
        outbox: &mut Outbox,
    ) -> Result<()> {
        let Some(posted) = self.items.remove(segment, row)? else { return Ok(()) };
        if let Some(queue) = self.queues.get_mut(&to.number) {
            queue.places.retain(|other| *other != row);
        }
        self.note(to.number);
        say(outbox, to, &Transfer { stream, ..posted }, Kind::Posted, Status::Ok, len);
        Ok(())
    }

    /// Copy what can be copied; how many bytes and completions that was.
    pub fn work(
        &mut self,
        segment: &mut Segment,
        connections: &Numbered<Connection>,
        space: &Space,
        outbox: &mut Outbox,
    ) -> Result<usize> {
        let mut done = 0;
        let mut left = CHUNK;
        if self.matched.is_empty() {
            return Ok(0);
        }
        let (before, after) = (self.matched.range(..=self.last), self.matched.range(self.last + 1..));
        let turns: Vec<u32> = after.chain(before).copied().collect();
        for number in turns {
            if left == 0 {
                break;
            }
            self.last = number;
            let Some((message, place)) = self.first(number) else { continue };
            let Some(own) = connections.get(number) else { continue };
            let Some(peer) = connections.get(own.peer) else { continue };
            let from = End { number: own.peer, channel: peer.channel };
            let to = End { number, channel: own.channel };
            done += self.step(segment, (from, message), (to, place), space, outbox, &mut left)?;
        }
        Ok(done)
    }

    fn first(&self, connection: u32) -> Option<(u32, u32)> {
        let queue = self.queues.get(&connection)?;
        Some((*queue.messages.front()?, *queue.places.front()?))
    }

    fn step(
        &mut self,
        segment: &mut Segment,
        (from, message): (End, u32),
        (to, place): (End, u32),
        space: &Space,
        outbox: &mut Outbox,
        left: &mut u64,
    ) -> Result<usize> {
        let (Some(sent), Some(posted)) = (self.items.get(message).copied(), self.items.get(place).copied()) else {
            return Ok(0);
        };
        if sent.piece.len > posted.piece.len {
            self.finish(segment, to.number, message, false)?;
            say(outbox, from, &sent, Kind::SendArena, Status::TooLong, posted.piece.len);
            return Ok(1);
        }
        let len = (sent.piece.len - sent.done).min(*left);
        let source = space.range(from.channel, Piece { offset: sent.piece.offset + sent.done, len });
        let target = space.range(to.channel, Piece { offset: posted.piece.offset + sent.done, len });
        let (Ok((source, read)), Ok((target, written))) = (source, target) else { return Ok(0) };
        if let (Some(source), Some(target)) = (source.arena(), target.arena()) {
            memory::copy(target, written.start, source, read.start, len as usize);
        }
        *left -= len;
        if sent.done + len < sent.piece.len {
            self.items.update(segment, message, |item| item.done += len)?;
            return Ok(usize::from(len > 0));
        }
        self.finish(segment, to.number, message, false)?;
        self.finish(segment, to.number, place, true)?;
        say(outbox, from, &sent, Kind::SendArena, Status::Ok, sent.piece.len);
        let arrived = Transfer { stream: sent.stream, ..posted };
        say(outbox, to, &arrived, Kind::Posted, Status::Ok, sent.piece.len);
        Ok(1)
    }

    fn finish(&mut self, segment: &mut Segment, connection: u32, number: u32, posted: bool) -> Result<()> {
        if let Some(queue) = self.queues.get_mut(&connection) {
            queue.of(posted).pop_front();
        }
        self.note(connection);
        self.items.remove(segment, number).map(drop)
    }

    /// The connection is no more: everything that waits at the receiver's end `to` ends.
    pub fn end(&mut self, segment: &mut Segment, to: End, from: Option<End>, outbox: &mut Outbox) -> Result<()> {
        let Some(queue) = self.queues.remove(&to.number) else { return Ok(()) };
        self.matched.remove(&to.number);
        for number in queue.messages.into_iter().chain(queue.places) {
            let Some(item) = self.items.remove(segment, number)? else { continue };
            if item.posted {
                say(outbox, to, &item, Kind::Posted, Status::Closed, 0);
            } else if let Some(from) = from {
                say(outbox, from, &item, Kind::SendArena, Status::Closed, 0);
            }
        }
        Ok(())
    }
}

fn say(outbox: &mut Outbox, end: End, item: &Transfer, kind: Kind, status: Status, value: u64) {
    outbox.put(end.channel, end.number, item.tag, &answer(kind, status, item.stream, end.number, value), &[]);
}
