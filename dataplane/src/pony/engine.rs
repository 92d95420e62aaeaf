//! The engine of Pony Express: serves the commands of its applications.

use super::command::HEAD;
use super::desk::{Desk, Order};
use super::rows::SMALL;
use crate::engine::{Channel, Channels, Engine};
use crate::error::Result;
use crate::state::{self, Schema, Segment, StateError};

/// The longest command that is looked at whole: one more than a small message may have, to see that it is too long.
const LONGEST: usize = HEAD + 64 + SMALL;

/// The tag of a command and, of a long one, offset and length in the client's pool.
type Next = (u64, Option<(usize, usize)>);

#[derive(Default)]
pub struct Pony {
    desk: Desk,
    command: Vec<u8>,
    reply: Vec<u8>,
    /// The version of the channels that the desk knows.
    known: Option<u64>,
}

impl Engine for Pony {
    fn schema(&self) -> Schema {
        Schema { engine: String::new(), name: "pony".into(), version: 1, oldest: 1, objects: Desk::objects() }
    }

    fn adopt(&mut self, state: &mut Segment) -> state::Result<()> {
        self.desk = Desk::adopt(state)?;
        self.known = None;
        Ok(())
    }

    fn poll(&mut self, channels: &mut Channels, state: &mut Segment, budget: usize) -> state::Result<usize> {
        if self.known != Some(channels.version()) {
            self.follow(channels, state)?;
        }
        let mut failed = None;
        let done = channels.each(budget, |channel, budget| match self.serve(channel, state, budget) {
            Ok(done) => done,
            Err(error) => {
                failed = Some(error);
                Ok(0)
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let Desk { transfers, connections, space, outbox, .. } = &mut self.desk;
        let moved = transfers.work(state, connections, space, outbox)?;
        Ok(done + moved + outbox.deliver(channels, state)?)
    }
}

impl Pony {
    /// Channels came or went.
    fn follow(&mut self, channels: &mut Channels, state: &mut Segment) -> state::Result<()> {
        self.known = Some(channels.version());
        let present: std::collections::HashSet<u64> = channels.iter_mut().map(|channel| channel.id).collect();
        self.desk.keep(state, |channel| present.contains(&channel))?;
        for channel in channels.iter_mut() {
            self.desk.space.arenas.entry(channel.id).or_insert_with(|| channel.rx.core().clone());
        }
        Ok(())
    }

    /// What the application did wrong ends its channel; what is wrong with the state ends the poll.
    fn serve(&mut self, channel: &mut Channel, state: &mut Segment, budget: usize) -> state::Result<Result<usize>> {
        let mut done = 0;
        while done < budget && self.desk.outbox.has_room() {
            let (tag, place) = match self.next(channel) {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(error) => return Ok(Err(error)),
            };
            let core = channel.rx.core();
            let pooled = place.and_then(|(offset, len)| Some((core.peer_pool()?, offset, len)));
            let order = Order { channel: channel.id, tag, bytes: &self.command, pooled };
            self.reply.clear();
            match self.desk.serve(state, &order, &mut self.reply) {
                Ok(()) => {}
                Err(StateError::Full(_)) => self.desk.full(&order, &mut self.reply),
                Err(error) => return Err(error),
            }
            if !self.reply.is_empty() {
                if let Err(error) = channel.tx.put(tag, &self.reply) {
                    return Ok(Err(error));
                }
            }
            done += 1;
        }
        Ok(Ok(done))
    }

    /// Take the next command, if there is one and room for its completion: its tag, and where in the client's pool it is if
    /// it is a long one. That memory is the client's again, who may change it while it is read.
    fn next(&mut self, channel: &mut Channel) -> Result<Option<Next>> {
        channel.rx.check()?;
        channel.tx.check()?;
        let Some(header) = channel.rx.peek()? else { return Ok(None) };
        if channel.tx.room()? == 0 {
            return Ok(None);
        }
        self.command.resize(header.len.min(LONGEST), 0);
        if !header.pooled {
            channel.rx.take_into(header, &mut self.command)?;
            return Ok(Some((header.tag, None)));
        }
        let claimed = channel.rx.take_pooled(header)?;
        let core = channel.rx.core();
        if let Some(pool) = core.peer_pool() {
            pool.read(claimed.offset as usize, &mut self.command);
        }
        core.give_back(claimed.token);
        Ok(Some((header.tag, Some((claimed.offset as usize, header.len)))))
    }
}
