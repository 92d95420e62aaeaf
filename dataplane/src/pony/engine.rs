//! The engine of Pony Express: serves the commands of its applications.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::command::HEAD;
use super::desk::{Desk, Order};
use super::far::wires::{Bells, Wires};
use super::far::Far;
use super::port::udp::Udp;
use super::port::Port;
use super::rows::SMALL;
use super::words;
use crate::engine::{Channel, Channels, Engine};
use crate::error::{Error, Result};
use crate::state::{self, Schema, Segment, StateError};
use crate::stats::monotonic_ns;

/// The longest packet that is ever sent, in bytes; each path has its own.
const MTU: usize = 9000 - 28;
/// The longest command that is looked at whole: one more than a small message may have, to see that it is too long.
const LONGEST: usize = HEAD + 64 + SMALL;

#[derive(Default)]
pub struct Pony {
    desk: Desk,
    command: Vec<u8>,
    reply: Vec<u8>,
    /// What the poll that was under way when the engine before this one died had done to arenas.
    unfinished: Vec<Vec<u8>>,
    /// The version of the channels that the desk knows.
    known: Option<u64>,
}

impl Engine for Pony {
    fn schema(&self) -> Schema {
        Schema { engine: String::new(), name: "pony".into(), version: 1, oldest: 1, objects: Desk::objects() }
    }

    fn adopt(&mut self, state: &mut Segment) -> state::Result<()> {
        let port = self.desk.far.take_port();
        let wires = self.desk.far.wires.without_any();
        self.unfinished = state.take_notes();
        self.desk = Desk::adopt(state, port)?;
        self.desk.far.wires = wires;
        self.known = None;
        Ok(())
    }

    /// UDP sockets, the first of which receives: without any, there are no other hosts.
    fn equip(&mut self, fds: Vec<OwnedFd>) -> state::Result<()> {
        if !fds.is_empty() {
            let port = Udp::from_fds(fds, MTU).map_err(|error| StateError::Usage(error.to_string()))?;
            self.desk.far = Far::with(Box::new(port));
            self.desk.far.wires = Wires::with(Bells::new()?);
        }
        Ok(())
    }

    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        let far = &self.desk.far;
        far.port().map(|port| port.fd()).into_iter().chain(far.wires.bells().map(|bells| bells.as_fd())).collect()
    }

    fn rest(&mut self) -> Duration {
        let now = monotonic_ns();
        self.desk.far.rest(now).map_or(Duration::ZERO, |until| Duration::from_nanos(until.saturating_sub(now)))
    }

    fn wake(&mut self) {
        self.desk.far.wake();
    }

    fn control(&mut self, state: &mut Segment, request: &[u8]) -> state::Result<Vec<u8>> {
        self.desk.control(state, request)
    }

    fn say(&mut self) -> Option<Vec<u8>> {
        self.desk.far.say()
    }

    fn poll(&mut self, channels: &mut Channels, state: &mut Segment, budget: usize) -> state::Result<usize> {
        if self.known != Some(channels.version()) {
            self.follow(channels, state)?;
        }
        // Before anything changes: what goes out now is permanent.
        let mut moved = self.desk.transmit(monotonic_ns());
        moved += self.desk.receive(state)?;
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
        moved += transfers.work(state, connections, space, outbox)?;
        moved += outbox.deliver(channels, state)?;
        self.desk.settle_all();
        Ok(done + moved + usize::from(self.desk.far.eager()))
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
        words::take_back(&self.desk.space, &std::mem::take(&mut self.unfinished));
        Ok(())
    }

    /// What the application did wrong ends its channel; what is wrong with the state ends the poll.
    fn serve(&mut self, channel: &mut Channel, state: &mut Segment, budget: usize) -> state::Result<Result<usize>> {
        let mut done = 0;
        if self.desk.outbox.overran(channel.id) {
            return Ok(Err(Error::Full));
        }
        while done < budget && self.desk.outbox.has_room() {
            let tag = match self.next(channel) {
                Ok(Some(tag)) => tag,
                Ok(None) => break,
                Err(error) => return Ok(Err(error)),
            };
            let order = Order { channel: channel.id, tag, bytes: &self.command };
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

    /// Take the next command, if there is one and room for its completion: its tag.
    fn next(&mut self, channel: &mut Channel) -> Result<Option<u64>> {
        channel.rx.check()?;
        channel.tx.check()?;
        let Some(header) = channel.rx.peek()? else { return Ok(None) };
        if channel.tx.room()? == 0 {
            return Ok(None);
        }
        self.command.resize(header.len.min(LONGEST), 0);
        if !header.pooled {
            channel.rx.take_into(header, &mut self.command)?;
            return Ok(Some(header.tag));
        }
        let claimed = channel.rx.take_pooled(header)?;
        let core = channel.rx.core();
        if let Some(pool) = core.peer_pool() {
            pool.read(claimed.offset as usize, &mut self.command);
        }
        core.give_back(claimed.token);
        Ok(Some(header.tag))
    }
}
