//! The engine of Pony Express: serves the commands of its applications.

use super::command::HEAD;
use super::desk::{Desk, Order};
use super::rows::SMALL;
use crate::engine::{Channel, Channels, Engine};
use crate::error::Result;
use crate::state::{self, Schema, Segment, StateError};

/// The longest command that is looked at whole: one more than a small message may have, to see that it is too long.
const LONGEST: usize = HEAD + 64 + SMALL;

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

    fn poll(&mut self, channels: &mut Channels, state: &mut Segment, budget: usize) -> usize {
        if self.known != Some(channels.version()) {
            self.follow(channels, state);
        }
        let done = channels.each(budget, |channel, budget| self.serve(channel, state, budget));
        let Desk { transfers, connections, space, outbox, .. } = &mut self.desk;
        let moved = sure(transfers.work(state, connections, space, outbox));
        done + moved + sure(outbox.deliver(channels, state))
    }
}

/// What cannot be stored must not be done by halves: the poll is given up, and whoever comes next repeats it.
fn sure<T>(outcome: state::Result<T>) -> T {
    outcome.unwrap_or_else(|error| panic!("the state cannot be written: {error}"))
}

impl Pony {
    /// Channels came or went.
    fn follow(&mut self, channels: &mut Channels, state: &mut Segment) {
        self.known = Some(channels.version());
        let present: std::collections::HashSet<u64> = channels.iter_mut().map(|channel| channel.id).collect();
        sure(self.desk.keep(state, |channel| present.contains(&channel)));
        for channel in channels.iter_mut() {
            self.desk.space.arenas.entry(channel.id).or_insert_with(|| channel.rx.core().clone());
        }
    }

    fn serve(&mut self, channel: &mut Channel, state: &mut Segment, budget: usize) -> Result<usize> {
        channel.rx.check()?;
        channel.tx.check()?;
        let core = channel.rx.core().clone();
        let mut done = 0;
        while done < budget && self.desk.outbox.has_room() {
            let Some(header) = channel.rx.peek()? else { break };
            if channel.tx.room()? == 0 {
                break;
            }
            self.command.resize(header.len.min(LONGEST), 0);
            let mut place = None;
            if header.pooled {
                let claimed = channel.rx.take_pooled(header)?;
                if let Some(pool) = core.peer_pool() {
                    pool.read(claimed.offset as usize, &mut self.command);
                    place = Some((pool, claimed.offset as usize, header.len));
                }
                core.give_back(claimed.token);
            } else {
                channel.rx.take_into(header, &mut self.command)?;
            }
            let order = Order { channel: channel.id, tag: header.tag, bytes: &self.command, pooled: place };
            self.reply.clear();
            match self.desk.serve(state, &order, &mut self.reply) {
                Ok(()) => {}
                Err(StateError::Full(_)) => self.desk.full(&order, &mut self.reply),
                Err(error) => return sure(Err(error)),
            }
            if !self.reply.is_empty() {
                channel.tx.put(header.tag, &self.reply)?;
            }
            done += 1;
        }
        Ok(done)
    }
}
