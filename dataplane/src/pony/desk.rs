//! What each command of an application does.

use std::collections::HashMap;

use super::bursts::{self, Each, Numbers};
use super::command::{answer, Access, Burst, Head, Kind, Piece, Reader, Short, Single, Status, ANSWER, INLINE, NAME};
use super::far::{Far, Way};
use super::memory::{Place, Regions, Sink};
use super::numbered::Numbered;
use super::outbox::Outbox;
use super::rows::{Connection, Name, ECHO, NOBODY, SMALL};
use super::space::{Seen, Space};
use super::transfers::{End, Transfers};
use super::words;
use crate::layout::INLINE_MAX;
use crate::state::{Frame, ObjectSpec, Result, Segment};

/// Operations of one burst.
pub const BURST: usize = 1 << 16;

/// What a command came to: the value of its completion. `None`: that comes later.
pub type Outcome = std::result::Result<Option<u64>, Status>;

/// A command as it came.
pub struct Order<'a> {
    pub channel: u64,
    pub tag: u64,
    pub bytes: &'a [u8],
}

#[derive(Default)]
pub struct Desk {
    names: Numbered<Name>,
    by_name: HashMap<Vec<u8>, u32>,
    pub connections: Numbered<Connection>,
    pub space: Space,
    pub outbox: Outbox,
    pub transfers: Transfers,
    pub far: Far,
}

impl Desk {
    pub fn objects() -> Vec<ObjectSpec> {
        use super::rows::{Region, Transfer, Waiting};
        let mut objects = vec![
            Numbered::<Name>::object(),
            Numbered::<Connection>::object(),
            Numbered::<Region>::object(),
            Numbered::<Waiting>::object(),
            Numbered::<Transfer>::object(),
        ];
        objects.extend(Far::objects());
        objects
    }

    /// What the state has; `port` is the way to other hosts. Raises `Schema`, `Damaged`, `Full`.
    pub fn adopt(segment: &mut Segment, port: Option<Way>) -> Result<Desk> {
        let far = Far::adopt(segment, port)?;
        let frame: &Frame = segment;
        let names = Numbered::<Name>::adopt(frame)?;
        let by_name = names.iter().map(|(number, name)| (name.text.clone(), number)).collect();
        let mut desk = Desk {
            names,
            by_name,
            connections: Numbered::adopt(frame)?,
            space: Space { regions: Numbered::adopt(frame)?, ..Space::default() },
            outbox: Outbox::adopt(frame)?,
            transfers: Transfers::adopt(frame)?,
            far,
        };
        desk.reconnect();
        Ok(desk)
    }

    /// Carry a command out; what is to be said to its sender is appended to `reply`, nothing when that comes later. Raises
    /// `Full` when the state has no room.
    pub fn serve(&mut self, segment: &mut Segment, order: &Order<'_>, reply: &mut Vec<u8>) -> Result<()> {
        let mut reader = Reader::new(order.bytes);
        let Ok(Some(head)) = reader.head() else {
            reply.extend_from_slice(&answer(Kind::Close, Status::Bad, 0, 0, 0));
            return Ok(());
        };
        reply.resize(ANSWER, 0);
        let outcome = match self.obey(segment, order, head, reader, reply) {
            Ok(outcome) => outcome?,
            Err(Short) => Err(Status::Bad),
        };
        let (status, value) = match outcome {
            Ok(Some(value)) => (Status::Ok, value),
            Ok(None) => {
                reply.clear();
                return Ok(());
            }
            Err(status) => {
                // For a burst: how many were done before.
                let done = std::mem::take(&mut self.transfers.partial);
                reply.truncate(ANSWER);
                (status, done)
            }
        };
        let connection = if head.kind == Kind::Connect { value as u32 } else { head.connection };
        reply[..ANSWER].copy_from_slice(&answer(head.kind, status, head.stream, connection, value));
        Ok(())
    }

    /// The completion of a command that found no room in the state.
    pub fn full(&mut self, order: &Order<'_>, reply: &mut Vec<u8>) {
        reply.clear();
        if let Ok(Some(head)) = Reader::new(order.bytes).head() {
            reply.extend_from_slice(&answer(head.kind, Status::Full, head.stream, head.connection, 0));
        }
    }

    fn obey(
        &mut self,
        segment: &mut Segment,
        order: &Order<'_>,
        head: Head,
        reader: Reader<'_>,
        reply: &mut Vec<u8>,
    ) -> std::result::Result<Result<Outcome>, Short> {
        let mut reader = reader;
        Ok(match head.kind {
            Kind::Bind => self.bind(segment, order.channel, reader.rest()),
            Kind::Connect => self.connect(segment, order, reader.rest()),
            Kind::Close => self.close(segment, order.channel, head.connection),
            Kind::Send => self.send(segment, order.channel, head, reader.rest()),
            Kind::SendDatagram => Ok(self.send_datagram(order.channel, head, reader.rest())),
            Kind::SendArena => self.offer(segment, order, head, reader.piece()?, false),
            Kind::Post => self.offer(segment, order, head, reader.piece()?, true),
            Kind::Register => {
                let (piece, rights) = (reader.piece()?, reader.u32()?);
                match self.own(order.channel, head.connection) {
                    Err(status) if head.connection != 0 => Ok(Err(status)),
                    _ => some(self.space.register(segment, order.channel, head.connection, piece, rights)),
                }
            }
            Kind::Release => some(self.space.release(segment, order.channel, reader.handle()?)),
            Kind::Read
            | Kind::Write
            | Kind::CompareSwap
            | Kind::FetchAdd
            | Kind::Indirect
            | Kind::Scan
            | Kind::Reads
            | Kind::Writes
            | Kind::Indirects
                if self.far_end(order.channel, head.connection).is_some() =>
            {
                match self.far_end(order.channel, head.connection) {
                    Some(own) => self.ask(segment, order, head, own, reader.rest())?,
                    None => Ok(Err(Status::NoConnection)),
                }
            }
            Kind::Reads => Ok(self.burst(order, head, &mut reader, Each::Read, 8)?),
            Kind::Writes => Ok(self.burst(order, head, &mut reader, Each::Write, 8)?),
            Kind::Indirects => Ok(self.burst(order, head, &mut reader, Each::Indirect, 4)?),
            kind => {
                let (single, from) = Single::parse(kind, reader)?;
                self.access(segment, order.channel, head, &single, from, reply)
            }
        })
    }

    /// The caller's end of a connection.
    fn own(&self, channel: u64, connection: u32) -> std::result::Result<Connection, Status> {
        let found = self.connections.get(connection).filter(|found| found.channel == channel);
        found.copied().ok_or(Status::NoConnection)
    }

    /// The caller's end of a connection to another host.
    fn far_end(&self, channel: u64, connection: u32) -> Option<Connection> {
        self.own(channel, connection).ok().filter(|own| own.link != 0 && !own.opening)
    }

    /// The peer's end, with its number.
    fn peer(&self, channel: u64, connection: u32) -> std::result::Result<(u32, Connection), Status> {
        let own = self.own(channel, connection)?;
        let peer = self.connections.get(own.peer).copied().ok_or(Status::Closed)?;
        Ok((own.peer, peer))
    }

    // -- names and connections ------------------------------------------------------------------------------

    fn bind(&mut self, segment: &mut Segment, channel: u64, name: &[u8]) -> Result<Outcome> {
        if name.is_empty() || name.len() > NAME || name.contains(&b'/') {
            return Ok(Err(Status::Bad));
        }
        // Names with a dot in front are the engine's own.
        if name.starts_with(b".") || self.by_name.contains_key(name) {
            return Ok(Err(Status::Taken));
        }
        if !self.names.may_have(channel, 1) {
            return Ok(Err(Status::Full));
        }
        let number = self.names.insert(segment, Name { channel, text: name.to_vec() })?;
        self.by_name.insert(name.to_vec(), number);
        Ok(Ok(Some(0)))
    }

    /// Whose name it is.
    pub(super) fn bound(&self, name: &[u8]) -> Option<u64> {
        Some(self.names.get(*self.by_name.get(name)?)?.channel)
    }

    fn connect(&mut self, segment: &mut Segment, order: &Order<'_>, name: &[u8]) -> Result<Outcome> {
        if let Some(slash) = name.iter().position(|byte| *byte == b'/') {
            return self.connect_far(segment, order.channel, order.tag, &name[..slash], &name[slash + 1..]);
        }
        let owner = if name == b".echo" { Some(ECHO) } else { self.bound(name) };
        let Some(owner) = owner else { return Ok(Err(Status::NoPeer)) };
        if !self.connections.may_have(order.channel, 2) {
            return Ok(Err(Status::Full));
        }
        let made = Connection { channel: order.channel, asked: true, ..Connection::default() };
        let own = self.connections.insert(segment, made)?;
        let made = Connection { channel: owner, peer: own, ..Connection::default() };
        let peer = self.connections.insert(segment, made)?;
        self.connections.update(segment, own, |connection| connection.peer = peer)?;
        if owner != ECHO {
            self.outbox.put(owner, peer, 0, &answer(Kind::Connected, Status::Ok, 0, peer, 0), name);
        }
        Ok(Ok(Some(u64::from(own))))
    }

    fn close(&mut self, segment: &mut Segment, channel: u64, connection: u32) -> Result<Outcome> {
        match self.own(channel, connection) {
            Ok(_) => self.part(segment, connection).map(|()| Ok(Some(0))),
            Err(status) => Ok(Err(status)),
        }
    }

    /// End a connection, and tell the other end.
    fn part(&mut self, segment: &mut Segment, connection: u32) -> Result<()> {
        let Some(own) = self.connections.get(connection).copied() else { return Ok(()) };
        self.outbox.forget(segment, own.channel, connection)?;
        if own.link != 0 {
            return self.leave(segment, connection);
        }
        self.connections.remove(segment, connection)?;
        let own_end = End { number: connection, channel: own.channel };
        let peer = self.connections.get(own.peer).copied();
        let peer_end = peer.map(|peer| End { number: own.peer, channel: peer.channel });
        self.transfers.end(segment, own_end, peer_end, &mut self.outbox)?;
        if let (Some(peer), Some(peer_end)) = (peer, peer_end) {
            self.transfers.end(segment, peer_end, Some(own_end), &mut self.outbox)?;
            self.connections.update(segment, own.peer, |peer| peer.peer = 0)?;
            if peer.channel == ECHO {
                self.connections.remove(segment, own.peer)?;
                return Ok(());
            }
            let gone = answer(Kind::Closed, Status::Closed, 0, own.peer, 0);
            self.outbox.put(peer.channel, own.peer, 0, &gone, &[]);
        }
        Ok(())
    }

    /// Channels that are no more: all but `present`.
    pub fn keep(&mut self, segment: &mut Segment, present: impl Fn(u64) -> bool) -> Result<()> {
        let names: Vec<u32> = self.names.iter().filter(|(_, name)| !present(name.channel)).map(|(n, _)| n).collect();
        for number in names {
            if let Some(name) = self.names.remove(segment, number)? {
                self.by_name.remove(&name.text);
            }
        }
        self.outbox.retain(segment, &present)?;
        let gone = |end: &Connection| end.channel < NOBODY && !present(end.channel);
        let ends: Vec<u32> = self.connections.iter().filter(|(_, end)| gone(end)).map(|(number, _)| number).collect();
        for number in ends {
            self.part(segment, number)?;
        }
        let regions: Vec<u32> =
            self.space.regions.iter().filter(|(_, region)| !present(region.channel)).map(|(n, _)| n).collect();
        for number in regions {
            self.space.regions.remove(segment, number)?;
        }
        self.space.arenas.retain(|channel, _| present(*channel));
        Ok(())
    }

    /// Peers on other hosts learn what was taken.
    pub fn settle_all(&mut self) {
        let mut settled: Vec<u32> = self.outbox.settled().collect();
        settled.dedup();
        for connection in settled {
            self.settled(connection);
        }
    }

    // -- messages -------------------------------------------------------------------------------------------

    fn send(&mut self, segment: &mut Segment, channel: u64, head: Head, bytes: &[u8]) -> Result<Outcome> {
        if bytes.len() > SMALL {
            return Ok(Err(Status::TooLong));
        }
        if let Some(own) = self.far_end(channel, head.connection) {
            return some(self.far_send(segment, head.connection, &own, head.stream, bytes));
        }
        let (number, peer) = match self.peer(channel, head.connection) {
            Ok(peer) => peer,
            Err(status) => return Ok(Err(status)),
        };
        let (to, number) = if peer.channel == ECHO { (channel, head.connection) } else { (peer.channel, number) };
        if !self.outbox.may_hold(to, number) {
            return Ok(Err(Status::Full));
        }
        let first = answer(Kind::Message, Status::Ok, head.stream, number, bytes.len() as u64);
        self.outbox.put(to, number, 0, &first, bytes);
        Ok(Ok(Some(bytes.len() as u64)))
    }

    /// A message without order, that is lost when its receiver has no room.
    fn send_datagram(&mut self, channel: u64, head: Head, bytes: &[u8]) -> Outcome {
        let len = bytes.len() as u64;
        if let Some(own) = self.far_end(channel, head.connection) {
            return self.far.send_datagram(head, &own, bytes).map(|()| Some(len));
        }
        let (number, peer) = self.peer(channel, head.connection)?;
        if bytes.len() > SMALL {
            return Err(Status::TooLong);
        }
        if peer.channel != ECHO && self.outbox.may_hold(peer.channel, number) {
            let first = answer(Kind::Datagram, Status::Ok, head.stream, number, len);
            self.outbox.put(peer.channel, number, 0, &first, bytes);
        }
        Ok(Some(len))
    }

    /// A large message in the sender's arena, or a place for one in the receiver's.
    fn offer(
        &mut self,
        segment: &mut Segment,
        order: &Order<'_>,
        head: Head,
        piece: Piece,
        posted: bool,
    ) -> Result<Outcome> {
        if let Err(status) = self.space.range(order.channel, piece) {
            return Ok(Err(status));
        }
        if let Some(own) = self.far_end(order.channel, head.connection) {
            return self.offer_far(segment, order, head, &own, piece, posted);
        }
        let receiver = match (posted, self.peer(order.channel, head.connection)) {
            (true, Ok(_)) => head.connection,
            // It has the bytes as soon as they are sent.
            (false, Ok((_, peer))) if peer.channel == ECHO => return Ok(Ok(Some(piece.len))),
            (false, Ok((number, _))) => number,
            (_, Err(status)) => return Ok(Err(status)),
        };
        let taken = self.transfers.add(segment, receiver, head.stream, posted, order.tag, piece)?;
        Ok(if taken { Ok(None) } else { Err(Status::Full) })
    }

    // -- one-sided operations -------------------------------------------------------------------------------

    /// An operation on the memory of the engine's own echo, which is all zeros: how many bytes it brings.
    fn access_echo(&self, channel: u64, single: &Single<'_>, reply: &mut Vec<u8>) -> Outcome {
        let len = single.access.brings();
        if single.into != INLINE {
            let (own, range) = self.space.range(channel, Piece { offset: single.into, len })?;
            own.arena().ok_or(Status::OutOfRange)?.fill_zero(range.start, range.len());
        } else if len > (INLINE_MAX - ANSWER) as u64 {
            return Err(Status::TooLong);
        } else {
            reply.resize(ANSWER + len as usize, 0);
        }
        Ok(Some(len))
    }

    /// Raises `Full`.
    fn access(
        &self,
        segment: &mut Segment,
        channel: u64,
        head: Head,
        single: &Single<'_>,
        from: Option<Piece>,
        reply: &mut Vec<u8>,
    ) -> Result<Outcome> {
        let seen = match self.seen(channel, head.connection) {
            Ok(Some(seen)) => seen,
            Ok(None) => return Ok(self.access_echo(channel, single, reply)),
            Err(status) => return Ok(Err(status)),
        };
        let place = match seen.find(single.region) {
            Ok(place) => place,
            Err(status) => return Ok(Err(status)),
        };
        words::note(segment, place, &single.access)?;
        Ok(self.access_place(channel, single, from, (seen, place), reply))
    }

    /// What a peer lets be seen over a connection; None: it is the engine's own echo.
    fn seen(&self, channel: u64, connection: u32) -> std::result::Result<Option<Seen<'_>>, Status> {
        let (number, peer) = self.peer(channel, connection)?;
        Ok((peer.channel != ECHO).then(|| self.space.seen(peer.channel, number)))
    }

    fn access_place(
        &self,
        channel: u64,
        single: &Single<'_>,
        from: Option<Piece>,
        (seen, place): (Seen<'_>, Place<'_>),
        reply: &mut Vec<u8>,
    ) -> Outcome {
        if let Some(from) = from {
            let Access::Write { at, .. } = single.access else { return Err(Status::Bad) };
            let (own, range) = self.space.range(channel, from)?;
            let own = own.arena().ok_or(Status::OutOfRange)?;
            return place.write_from(at, own, range).map(Some);
        }
        let mut sink = if single.into == INLINE {
            // A completion always fits the ring, for there is no going back once the operation is done.
            if single.access.brings() > (INLINE_MAX - ANSWER) as u64 {
                return Err(Status::TooLong);
            }
            Sink::Message(reply)
        } else {
            let piece = Piece { offset: single.into, len: single.access.brings() };
            let (own, range) = self.space.range(channel, piece)?;
            Sink::Arena { arena: own.arena().ok_or(Status::OutOfRange)?, at: range.start }
        };
        place.access(single.access, &seen, &mut sink).map(Some)
    }

    fn burst(
        &mut self,
        order: &Order<'_>,
        head: Head,
        reader: &mut Reader<'_>,
        each: Each,
        width: usize,
    ) -> std::result::Result<Outcome, Short> {
        let burst = Burst::parse(reader)?;
        let count = burst.count as usize;
        if count > BURST {
            return Ok(Err(Status::TooLong));
        }
        let outcome = self.burst_of(order.channel, head, &burst, each, width);
        Ok(outcome.and_then(|(done, status)| {
            if status == Status::Ok {
                return Ok(Some(done as u64));
            }
            self.transfers.partial = done as u64;
            Err(status)
        }))
    }

    fn burst_of(
        &self,
        channel: u64,
        head: Head,
        burst: &Burst,
        each: Each,
        width: usize,
    ) -> std::result::Result<(usize, Status), Status> {
        let seen = self.seen(channel, head.connection)?;
        let piece = Piece { offset: burst.into, len: u64::from(burst.size) * u64::from(burst.count) };
        let numbers = Piece { offset: burst.numbers, len: u64::from(burst.count) * width as u64 };
        let (own, numbers) = self.space.range(channel, numbers)?;
        let numbers = Numbers { memory: own.arena().ok_or(Status::OutOfRange)?, at: numbers.start, width };
        let (own, range) = self.space.range(channel, piece)?;
        let Some(seen) = seen else {
            if each != Each::Write {
                own.arena().ok_or(Status::OutOfRange)?.fill_zero(range.start, range.len());
            }
            return Ok((burst.count as usize, Status::Ok));
        };
        let place = seen.find(burst.region)?;
        bursts::burst(each, place, &seen, &numbers, (own, range.start), burst.size, burst.count as usize)
    }
}

fn some(outcome: Result<std::result::Result<u64, Status>>) -> Result<Outcome> {
    outcome.map(|outcome| outcome.map(Some))
}
