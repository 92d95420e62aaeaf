//! What comes in.

use std::collections::HashMap;
use std::net::IpAddr;

use super::frame::{self, Ends, Frame};
use super::line::Item;
use super::ranges::Ranges;
use super::resync::pieces;
use super::rows::{Held, Sending, Stream};
use super::{Far, PARTIAL, STREAMS};
use crate::pony::command::{answer, Kind, Reader, Status};
use crate::pony::desk::Desk;
use crate::pony::flow::wire::{self, Header, PAYLOAD, SEALED};
use crate::pony::flow::{Nanos, Receipt, MILLISECOND};
use crate::pony::numbered::of_link;
use crate::pony::outbox::CREDITS;
use crate::pony::port::{self, Burst, Port};
use crate::pony::rows::{Connection, ECHO, NOBODY, SMALL};
use crate::state::{Result, Segment, StateError};
use crate::stats::monotonic_ns;

/// Packets, and bytes of them, that are looked at in one poll.
const PACKETS: usize = 128;
const BYTES: usize = 256 * 1024;
/// Messages of a packet, and more than it can have: only with fewer rows left for those that come too early is it looked
/// at how many there are, and when they are too many the packet has to come again.
const MARGIN: usize = 512;
/// An engine begins anew no more often, and a peer that says so costs no more.
const RESTARTS_APART: Nanos = 10 * MILLISECOND;

/// When a packet was taken in, and how long it had waited for that. What the engine slept meanwhile counts for neither: a
/// wake-up is no queue, and slower senders would not make it faster.
#[derive(Clone, Copy)]
struct Came {
    taken: Nanos,
    queued: Nanos,
}

impl Far {
    /// Of a packet that is looked at now.
    fn came(&self, now: Nanos, arrived: Nanos) -> Came {
        let asleep = self.woke_at.saturating_sub(arrived.max(self.slept_at));
        Came { taken: now - asleep, queued: (now - arrived).saturating_sub(asleep) }
    }
}

/// How a packet came: from an address, or by the wire of a link.
#[derive(Clone, Copy)]
enum Via {
    Network(IpAddr),
    Wire(u32),
}

impl Desk {
    /// Take in packets, as many as leave half of the undo log to the rest of the poll; how many. Raises `Full`, `Os`.
    pub fn receive(&mut self, segment: &mut Segment) -> Result<usize> {
        if self.far.port.is_none() {
            return Ok(0);
        }
        let links = self.far.wires.links();
        let share = 1 + links.len();
        let mut done = 0;
        if self.far.wires.network_is_due(self.far.lines.len()) {
            done = self.drain_network(segment, share)?;
            self.far.wires.looked_at_network(done);
        }
        for link in links {
            let Some(mut plug) = self.far.wires.take(link) else { continue };
            let outcome = self.drain(segment, &mut plug.wire, &mut plug.burst, Some(link), share);
            self.far.wires.put(link, plug);
            match outcome? {
                Ok(count) => done += count,
                Err(_) => self.lose_wire(link),
            }
        }
        self.look_around(segment, monotonic_ns())?;
        Ok(done)
    }

    fn drain_network(&mut self, segment: &mut Segment, share: usize) -> Result<usize> {
        let Some(mut port) = self.far.port.take() else { return Ok(0) };
        let mut burst = std::mem::take(&mut self.far.burst);
        let outcome = self.drain(segment, &mut port, &mut burst, None, share);
        (self.far.port, self.far.burst) = (Some(port), burst);
        outcome?.map_err(|error| StateError::Os {
            what: "receiving packets",
            source: std::io::Error::other(error.to_string()),
        })
    }

    /// Take in packets of one port: that of all links, or the wire of one. There are `share` of them, and a poll's changes
    /// have to fit the state's log.
    fn drain(
        &mut self,
        segment: &mut Segment,
        port: &mut dyn Port,
        burst: &mut Burst,
        wire: Option<u32>,
        share: usize,
    ) -> Result<port::Result<usize>> {
        let mut done = 0;
        let mut bytes = 0;
        let mut now = monotonic_ns();
        while done * share < PACKETS && bytes * share < BYTES && self.outbox.has_room() && !segment.half_logged() {
            if !burst.left() {
                *burst = match port.receive() {
                    Ok(count) => Burst { count, looked: 0, at: monotonic_ns() },
                    Err(error) => return Ok(Err(error)),
                };
                now = burst.at;
                if burst.count == 0 {
                    break;
                }
            }
            let (packet, from) = port.packet(burst.looked);
            let came = self.far.came(now, burst.at - port.waited(burst.looked).min(burst.at));
            burst.looked += 1;
            done += 1;
            bytes += packet.len();
            self.packet(segment, came, packet, wire.map_or(Via::Network(from.ip()), Via::Wire))?;
        }
        Ok(Ok(done))
    }

    fn packet(&mut self, segment: &mut Segment, came: Came, packet: &[u8], via: Via) -> Result<()> {
        let Ok((_, flags, flow, number)) = wire::clear(packet) else { return Ok(()) };
        let link = flow & 0xffff;
        let salt = (flow >> 16) as u16;
        if self.far.links.get(link).is_none_or(|row| row.salt != salt) {
            return Ok(());
        }
        let Some(line) = self.far.lines.get_mut(&link) else { return Ok(()) };
        let theirs = match via {
            Via::Network(ip) => line.attached.address.ip() == ip,
            Via::Wire(of) => of == link,
        };
        if !theirs {
            return Ok(());
        }
        let mut opened = std::mem::take(&mut self.far.opened);
        let plain = match &line.seal {
            None => (flags & SEALED == 0).then_some(packet),
            Some(seal) => {
                opened.clear();
                opened.extend_from_slice(packet);
                if flags & SEALED == 0 {
                    None
                } else {
                    seal.open(number, &mut opened)
                }
            }
        };
        let parsed = plain.and_then(|plain| Header::parse(plain).ok());
        let outcome = match parsed {
            Some((header, payload)) => self.take_packet(segment, came, (link, via), &header, payload),
            None => {
                line.bad += 1;
                Ok(())
            }
        };
        self.far.opened = opened;
        outcome
    }

    fn take_packet(
        &mut self,
        segment: &mut Segment,
        came: Came,
        (link, via): (u32, Via),
        header: &Header,
        payload: &[u8],
    ) -> Result<()> {
        let mut header = *header;
        if !self.far.held.may_have(of_link(link), MARGIN) && !self.far.held.may_have(of_link(link), self.early(payload))
        {
            // What it carries has to come again; what it acknowledges counts.
            header.flags &= !PAYLOAD;
        }
        let Some(line) = self.far.lines.get_mut(&link) else { return Ok(()) };
        let newer = |epoch: u32| header.epoch.wrapping_sub(epoch) as i32 > 0;
        if line.flow.peer_epoch.is_some_and(newer) {
            if came.taken < line.restarted + RESTARTS_APART {
                return Ok(());
            }
            line.restarted = came.taken;
        }
        let receipt = match line.flow.receive(came.taken, &header, came.queued) {
            Ok(receipt) => receipt,
            Err(_) => {
                line.bad += 1;
                return Ok(());
            }
        };
        if matches!(via, Via::Network(_)) && receipt != Receipt::Stale {
            // Who has a wire sends nothing here.
            self.far.wires.take(link);
        }
        let restarted = line.peer_epoch.is_some() && line.peer_epoch != line.flow.peer_epoch;
        line.peer_epoch = line.flow.peer_epoch;
        let mut tokens = std::mem::take(&mut self.far.tokens);
        tokens.extend(line.flow.acked());
        // Before what the new engine has counts: pieces of messages that only the old one had would complete them.
        if restarted {
            self.resync(link);
        }
        for token in tokens.drain(..) {
            self.arrived(segment, link, token as u32)?;
        }
        self.far.tokens = tokens;
        if receipt == Receipt::Deliver {
            let mut reader = Reader::new(payload);
            while !reader.is_empty() {
                let Ok((ends, frame)) = frame::parse(&mut reader) else {
                    if let Some(line) = self.far.lines.get_mut(&link) {
                        line.bad += 1;
                    }
                    break;
                };
                self.frame(segment, link, ends, frame)?;
            }
        }
        self.far.rouse(link);
        Ok(())
    }

    /// How many messages of a packet would have to be held.
    fn early(&self, payload: &[u8]) -> usize {
        let mut early = 0;
        let mut reader = Reader::new(payload);
        let mut reached: HashMap<(u32, u16), u64> = HashMap::new();
        while let Ok((ends, frame)) = frame::parse(&mut reader) {
            if let Frame::Message { seq, total, bytes, .. } = frame {
                let key = (ends.to, ends.stream);
                let row = self.far.by_stream.get(&key);
                let next = row.and_then(|row| self.far.streams.get(*row)).map_or(0, |stream| stream.next);
                let next = reached.entry(key).or_insert(next);
                early += usize::from(seq > *next);
                if seq == *next && bytes.len() == usize::from(total) {
                    *next += 1;
                }
            }
        }
        early
    }

    /// The peer's engine has a packet for good.
    fn arrived(&mut self, segment: &mut Segment, link: u32, token: u32) -> Result<()> {
        let Some(line) = self.far.lines.get_mut(&link) else { return Ok(()) };
        let items = std::mem::take(&mut line.packets.at(token).items);
        for item in &items {
            match *item {
                Item::Reply { slot } | Item::Datagram { slot } => {
                    if let Some(line) = self.far.lines.get_mut(&link) {
                        line.slots.give_back(slot);
                    }
                }
                Item::Message { row, id, piece } => self.message_arrived(segment, link, row, id, piece)?,
                _ => {}
            }
        }
        if let Some(line) = self.far.lines.get_mut(&link) {
            line.packets.at(token).items = items;
            line.packets.give_back(token);
        }
        Ok(())
    }

    fn message_arrived(&mut self, segment: &mut Segment, link: u32, row: u32, id: u64, piece: u32) -> Result<()> {
        let Some(line) = self.far.lines.get(&link) else { return Ok(()) };
        let Some(message) = self.far.sending.get(row).filter(|message| message.id == id) else { return Ok(()) };
        let (connection, count) = (message.connection, pieces(message.bytes.len(), line.message_chunk()));
        let acked = self.far.acked.entry(row).or_default();
        *acked |= 1 << piece;
        if acked.count_ones() < count {
            return Ok(());
        }
        self.far.acked.remove(&row);
        self.far.sending.remove(segment, row)?;
        let end = self.far.end(connection);
        end.under_way = end.under_way.saturating_sub(1);
        if end.under_way == 0 && self.connections.get(connection).is_some_and(|own| own.channel == NOBODY) {
            self.hang_up(segment, connection)?;
        }
        Ok(())
    }

    /// The row of a connection that the peer of `link` speaks of.
    pub(super) fn far_connection(&mut self, link: u32, ends: Ends) -> Option<Connection> {
        let own = self.connections.get(ends.to).filter(|own| own.link == link && own.cookie as u8 == ends.cookie);
        // What comes before the answer to `Open` says that it was accepted.
        match own {
            Some(own) if own.peer == ends.from && !own.opening => return Some(*own),
            Some(own) if own.opening && ends.from != 0 => return Some(*own),
            _ => {}
        }
        let back = Ends { to: ends.from, from: ends.to, ..ends };
        self.far.answer(link, Item::Gone(back));
        None
    }

    fn frame(&mut self, segment: &mut Segment, link: u32, ends: Ends, frame: Frame<'_>) -> Result<()> {
        match frame {
            Frame::Open { cookie, name } => return self.opened(segment, link, ends, cookie, name),
            Frame::Refuse { cookie, status } => return self.refused(segment, link, ends, cookie, status),
            Frame::Gone => {
                let own =
                    self.connections.get(ends.to).filter(|own| own.link == link && own.cookie as u8 == ends.cookie);
                return match own {
                    Some(own) if !own.opening && own.peer == ends.from => self.lose(segment, ends.to, Status::Closed),
                    _ => Ok(()),
                };
            }
            _ => {}
        }
        let Some(own) = self.far_connection(link, ends) else { return Ok(()) };
        if own.opening {
            self.accepted(segment, link, ends)?;
        }
        match frame {
            Frame::Close => self.lose(segment, ends.to, Status::Closed),
            Frame::Message { seq, total, offset, bytes } => {
                self.message_came(segment, ends, &own, seq, (total, offset, bytes))
            }
            Frame::Datagram { bytes } => {
                if own.channel < NOBODY && self.outbox.may_hold(own.channel, ends.to) {
                    let head = answer(Kind::Datagram, Status::Ok, ends.stream, ends.to, bytes.len() as u64);
                    self.outbox.put(own.channel, 0, 0, &head, bytes);
                }
                Ok(())
            }
            Frame::Credit { taken } => {
                let end = self.far.end(ends.to);
                // What was said earlier may come later.
                if !end.heard || end.credit.is_none_or(|credit| taken.wrapping_sub(credit) as i32 > 0) {
                    (end.credit, end.heard) = (Some(taken), true);
                }
                Ok(())
            }
            Frame::Offer { seq, floor, len } => self.offered(segment, ends, seq, floor, len),
            Frame::Grant { seq, at } => {
                self.granted(link, ends.to, seq, at);
                Ok(())
            }
            Frame::Piece { seq, offset, bytes } => self.piece_came(segment, ends, &own, (seq, offset, bytes)),
            Frame::Finish { seq, status, value } => self.exported(segment, ends.to, &own, (seq, status, value)),
            Frame::Request { part, floor, kind, body } => {
                self.requested(segment, link, ends, (part, floor, kind, body))
            }
            Frame::Reply { part, status, value, bytes } => {
                self.replied(segment, link, ends, (part, status, value, bytes))
            }
            Frame::Accept { .. } | Frame::Alive | Frame::Open { .. } | Frame::Refuse { .. } | Frame::Gone => Ok(()),
        }
    }

    // -- connections ------------------------------------------------------------------------------------------

    fn opened(&mut self, segment: &mut Segment, link: u32, ends: Ends, cookie: u32, name: &[u8]) -> Result<()> {
        if let Some(number) = self.far.by_peer.get(&(link, ends.from)).copied() {
            if self.connections.get(number).is_some_and(|own| own.cookie == cookie) {
                self.far.answer(link, Item::Accept(number));
                return Ok(());
            }
            // The peer forgot that one, for it used its number again.
            self.lose(segment, number, Status::Closed)?;
        }
        let channel = if name == b".echo" { Some(ECHO) } else { self.bound(name) };
        let refusal = match channel {
            None => Some(Status::NoPeer),
            Some(_) if !self.connections.may_have(of_link(link), 1) => Some(Status::Full),
            Some(_) => None,
        };
        if let Some(status) = refusal {
            self.far.answer(link, Item::Refuse { to: ends.from, cookie, status: status as u8 });
            return Ok(());
        }
        let channel = channel.unwrap_or(ECHO);
        let made = Connection { channel, peer: ends.from, link, cookie, ..Connection::default() };
        let number = self.connections.insert(segment, made)?;
        self.far.know_peer(link, ends.from, number);
        self.far.end(number).credit = Some(0);
        if channel != ECHO {
            self.outbox.put(channel, 0, 0, &answer(Kind::Connected, Status::Ok, 0, number, 0), name);
        }
        self.far.queue(link, Item::Accept(number));
        Ok(())
    }

    fn accepted(&mut self, segment: &mut Segment, link: u32, ends: Ends) -> Result<()> {
        let Some(own) = self.connections.get(ends.to).copied() else { return Ok(()) };
        self.far.blobs.remove(segment, own.name)?;
        self.connections.update(segment, ends.to, |own| {
            (own.peer, own.opening, own.name) = (ends.from, false, 0);
        })?;
        self.far.know_peer(link, ends.from, ends.to);
        if own.channel < NOBODY {
            let said = answer(Kind::Connect, Status::Ok, 0, ends.to, ends.to.into());
            self.outbox.put(own.channel, 0, own.tag, &said, &[]);
        }
        Ok(())
    }

    fn refused(&mut self, segment: &mut Segment, link: u32, ends: Ends, cookie: u32, status: u8) -> Result<()> {
        let own = self.connections.get(ends.to);
        if own.is_none_or(|own| own.link != link || !own.opening || own.cookie != cookie) {
            return Ok(());
        }
        self.lose(segment, ends.to, Status::of(status).unwrap_or(Status::Bad))
    }

    // -- messages ---------------------------------------------------------------------------------------------

    fn message_came(
        &mut self,
        segment: &mut Segment,
        ends: Ends,
        own: &Connection,
        seq: u64,
        (total, offset, bytes): (u16, u16, &[u8]),
    ) -> Result<()> {
        let known = self.far.by_stream.contains_key(&(ends.to, ends.stream));
        let owner = of_link(own.link);
        let streams = self.far.end(ends.to).streams.len();
        if !known && (streams >= STREAMS || !self.far.streams.may_have(owner, 1)) {
            return self.break_off(segment, ends, own);
        }
        let (row, stream) = self.far.stream(segment, owner, ends.to, ends.stream)?;
        let key = (ends.to, ends.stream, seq);
        if seq < stream.next || self.far.by_held.contains_key(&key) || usize::from(total) > SMALL {
            return Ok(());
        }
        if seq - stream.next > u64::from(CREDITS) * 4 {
            return self.break_off(segment, ends, own);
        }
        if bytes.len() == usize::from(total) {
            return self.message_whole(segment, ends, own, (row, stream), seq, bytes);
        }
        let partial = &mut self.far.end(ends.to).partial;
        if partial.len() >= PARTIAL && !partial.contains_key(&(ends.stream, seq)) {
            return self.break_off(segment, ends, own);
        }
        let (whole, came) =
            partial.entry((ends.stream, seq)).or_insert_with(|| (vec![0; total.into()], Ranges::default()));
        let (start, end) = (usize::from(offset), usize::from(offset) + bytes.len());
        let Some(place) = whole.get_mut(start..end) else { return self.break_off(segment, ends, own) };
        place.copy_from_slice(bytes);
        came.add(start as u64, end as u64);
        if came.floor() < whole.len() as u64 {
            return Ok(());
        }
        let Some((whole, _)) = partial.remove(&(ends.stream, seq)) else { return Ok(()) };
        self.message_whole(segment, ends, own, (row, stream), seq, &whole)
    }

    fn message_whole(
        &mut self,
        segment: &mut Segment,
        ends: Ends,
        own: &Connection,
        (row, stream): (u32, Stream),
        seq: u64,
        bytes: &[u8],
    ) -> Result<()> {
        if seq > stream.next {
            let id = self.far.next_id();
            let held = Held {
                owner: of_link(own.link),
                id,
                connection: ends.to,
                stream: ends.stream,
                seq,
                bytes: bytes.to_vec(),
            };
            let row = self.far.held.insert(segment, held)?;
            self.far.by_held.insert((ends.to, ends.stream, seq), row);
            return Ok(());
        }
        let mut next = seq + 1;
        self.hand_on(segment, ends, own, bytes)?;
        while let Some(row) = self.far.by_held.remove(&(ends.to, ends.stream, next)) {
            if let Some(held) = self.far.held.remove(segment, row)? {
                self.hand_on(segment, ends, own, &held.bytes)?;
            }
            next += 1;
        }
        self.far.streams.update(segment, row, |stream| stream.next = next)
    }

    /// A message's turn has come.
    fn hand_on(&mut self, segment: &mut Segment, ends: Ends, own: &Connection, bytes: &[u8]) -> Result<()> {
        let end = self.far.end(ends.to);
        end.came = end.came.wrapping_add(1);
        match own.channel {
            NOBODY => {}
            ECHO => {
                self.settled(ends.to);
                // Who does not listen to its echo has none.
                let _ = self.far_send(segment, ends.to, own, ends.stream, bytes)?;
            }
            channel => {
                let head = answer(Kind::Message, Status::Ok, ends.stream, ends.to, bytes.len() as u64);
                self.outbox.put(channel, ends.to, 0, &head, bytes);
            }
        }
        Ok(())
    }

    /// Tell the peer of messages that its application took, when it may have to know.
    pub fn settled(&mut self, connection: u32) {
        let Some(own) = self.connections.get(connection).filter(|own| own.link != 0) else { return };
        let (link, held) = (own.link, self.outbox.held(connection));
        let end = self.far.end(connection);
        let taken = end.came.wrapping_sub(held);
        if taken.wrapping_sub(end.told) >= CREDITS / 4 {
            end.told = taken;
            self.far.queue(link, Item::Credit(connection));
        }
    }

    /// Have a message on its way to another host.
    pub(in crate::pony) fn far_send(
        &mut self,
        segment: &mut Segment,
        number: u32,
        own: &Connection,
        stream: u16,
        bytes: &[u8],
    ) -> Result<std::result::Result<u64, Status>> {
        let end = self.far.end(number);
        let under_way = end.credit.map_or(0, |credit| end.sent.wrapping_sub(credit));
        // What a peer sends to the engine itself comes back on its account.
        let owner = if own.channel == ECHO { of_link(own.link) } else { own.channel };
        let streams = self.far.by_stream.contains_key(&(number, stream)) || self.far.streams.may_have(owner, 1);
        if under_way >= CREDITS || !self.far.sending.may_have(owner, 1) || !streams {
            return Ok(Err(Status::Full));
        }
        let (row, found) = self.far.stream(segment, owner, number, stream)?;
        let id = self.far.next_id();
        let message = Sending { owner, id, connection: number, stream, seq: found.out, bytes: bytes.to_vec() };
        let place = self.far.sending.insert(segment, message)?;
        self.far.streams.update(segment, row, |stream| stream.out += 1)?;
        let end = self.far.end(number);
        end.sent = end.sent.wrapping_add(1);
        end.under_way += 1;
        if let Some(chunk) = self.far.lines.get(&own.link).map(|line| line.message_chunk()) {
            for piece in 0..pieces(bytes.len(), chunk) {
                self.far.queue(own.link, Item::Message { row: place, id, piece });
            }
        }
        Ok(Ok(bytes.len() as u64))
    }

    /// The peer does what no correct one does: the connection ends, others go on.
    pub(super) fn break_off(&mut self, segment: &mut Segment, ends: Ends, own: &Connection) -> Result<()> {
        let back = Ends { to: ends.from, from: ends.to, ..ends };
        self.far.queue(own.link, Item::Gone(back));
        self.lose(segment, ends.to, Status::Closed)
    }
}
