//! How connections to other hosts begin and end.

use std::collections::HashSet;

use super::frame::{Ends, DATAGRAM};
use super::line::Item;
use super::rows::{Blob, Held, Link, Sending, HOST};
use super::Far;
use crate::pony::command::{answer, Head, Kind, Status, NAME};
use crate::pony::desk::{Desk, Outcome};
use crate::pony::flow::{Nanos, MILLISECOND};
use crate::pony::rows::{Connection, NOBODY};
use crate::pony::transfers::End;
use crate::state::{Result, Segment};
use crate::stats::monotonic_ns;

/// How long nothing was heard, though something is under way, until connections are given up, and until control code is
/// asked for another way.
const GIVE_UP: Nanos = 10_000 * MILLISECOND;
const LOOK_AROUND: Nanos = 2_000 * MILLISECOND;
/// What waits to go to one host, beyond which datagrams are lost.
const MOST_QUEUED: usize = 4096;
const EVERY: Nanos = 100 * MILLISECOND;

impl Desk {
    /// Connect to a name of another host; the answer comes later. Raises `Full`.
    pub(in crate::pony) fn connect_far(
        &mut self,
        segment: &mut Segment,
        channel: u64,
        tag: u64,
        host: &[u8],
        name: &[u8],
    ) -> Result<Outcome> {
        if host.is_empty() || host.len() > HOST || name.is_empty() || name.len() > NAME {
            return Ok(Err(Status::Bad));
        }
        if self.far.port.is_none() {
            return Ok(Err(Status::Unreachable));
        }
        if !self.connections.may_have(channel, 1) || !self.far.blobs.may_have(channel, 1) {
            return Ok(Err(Status::Full));
        }
        let link = match self.far.by_host.get(host).copied() {
            Some(link) => link,
            None if self.far.links.left() == 0 && !self.forget_host(segment)? => return Ok(Err(Status::Full)),
            None => self.far.link(segment, host)?,
        };
        self.far.cookie = self.far.cookie.wrapping_add(1);
        let name = self.far.blobs.insert(segment, Blob { owner: channel, bytes: name.to_vec() })?;
        let cookie = self.far.cookie;
        let made = Connection { channel, link, cookie, asked: true, opening: true, tag, name, ..Connection::default() };
        let number = self.connections.insert(segment, made)?;
        self.far.end(number).credit = Some(0);
        if self.far.lines.contains_key(&link) {
            self.far.queue(link, Item::Open(number));
        } else {
            self.far.want(link, monotonic_ns());
        }
        Ok(Ok(None))
    }

    /// Forget a host that was asked for in vain, and that nobody asks for any more; false when there is none.
    fn forget_host(&mut self, segment: &mut Segment) -> Result<bool> {
        let wanted: HashSet<u32> = self.connections.iter().map(|(_, own)| own.link).collect();
        let idle = |link: &u32| !self.far.lines.contains_key(link) && !wanted.contains(link);
        let Some(link) = self.far.links.iter().map(|(link, _)| link).find(idle) else { return Ok(false) };
        self.far.unlink(segment, link)?;
        Ok(true)
    }

    /// The application has closed its end, or is gone itself. What it sent still goes out.
    pub(in crate::pony) fn leave(&mut self, segment: &mut Segment, number: u32) -> Result<()> {
        let Some(own) = self.connections.get(number).copied() else { return Ok(()) };
        self.end_operations(segment, number, &own, Status::Closed)?;
        let under_way = self.far.ends.get(&number).is_some_and(|end| end.under_way > 0);
        if under_way && !own.opening {
            return self.connections.update(segment, number, |own| own.channel = NOBODY);
        }
        self.hang_up(segment, number)
    }

    /// Nothing is left to be said over a connection.
    pub(super) fn hang_up(&mut self, segment: &mut Segment, number: u32) -> Result<()> {
        let Some(own) = self.connections.remove(segment, number)? else { return Ok(()) };
        if !own.opening {
            let ends = Ends { to: own.peer, from: number, stream: 0, cookie: own.cookie as u8 };
            self.far.queue(own.link, Item::Close(ends));
        }
        self.far.drop_end(segment, number, &own)
    }

    /// The other end of a connection is gone, or never came to be.
    pub(super) fn lose(&mut self, segment: &mut Segment, number: u32, status: Status) -> Result<()> {
        let Some(own) = self.connections.get(number).copied() else { return Ok(()) };
        self.end_operations(segment, number, &own, status)?;
        self.far.drop_end(segment, number, &own)?;
        if own.opening || own.channel >= NOBODY {
            self.connections.remove(segment, number)?;
        } else {
            self.connections.update(segment, number, |own| (own.peer, own.link) = (0, 0))?;
        }
        if own.channel >= NOBODY {
            return Ok(());
        }
        let (kind, connection) = if own.opening { (Kind::Connect, 0) } else { (Kind::Closed, number) };
        self.outbox.put(own.channel, 0, own.tag * u64::from(own.opening), &answer(kind, status, 0, connection, 0), &[]);
        Ok(())
    }

    /// Operations of a connection end, and their application is told.
    fn end_operations(&mut self, segment: &mut Segment, number: u32, own: &Connection, status: Status) -> Result<()> {
        self.transfers.end(segment, End { number, channel: own.channel }, None, &mut self.outbox)?;
        let Some(end) = self.far.ends.get_mut(&number) else { return Ok(()) };
        let (exports, asks) = (std::mem::take(&mut end.exports), end.asks.clone());
        for row in exports.into_values() {
            if let Some(export) = self.far.exports.remove(segment, row)? {
                let said = answer(Kind::SendArena, status, export.stream, number, 0);
                self.outbox.put(own.channel, 0, export.tag, &said, &[]);
            }
        }
        for row in asks.into_values() {
            self.finish_ask(segment, row, Some(status))?;
        }
        Ok(())
    }

    /// Give up what cannot be reached; ask for ways to who is wanted.
    pub(in crate::pony) fn look_around(&mut self, segment: &mut Segment, now: Nanos) -> Result<()> {
        if now < self.far.looked_around + EVERY {
            return Ok(());
        }
        self.far.looked_around = now;
        self.lose_silent_wires(now);
        let silent = |far: &Far, link: u32| far.lines.get(&link).map(|line| line.flow.silence(now));
        let wanted: Vec<(u32, Nanos)> = self
            .far
            .links
            .iter()
            .filter_map(|(link, _)| match silent(&self.far, link) {
                None if self.connections.iter().any(|(_, own)| own.link == link) => Some((link, 0)),
                Some(silence) if silence > LOOK_AROUND => Some((link, silence)),
                // New keys come with a new set-up.
                _ if self.far.lines.get(&link).is_some_and(|line| line.stale(now)) => Some((link, 0)),
                _ if self.far.misses_wire(link) => Some((link, 0)),
                _ => None,
            })
            .collect();
        for (link, silence) in wanted {
            self.far.want(link, now);
            if silence > GIVE_UP {
                self.give_up(segment, link, Status::Unreachable)?;
            }
        }
        Ok(())
    }

    /// Connections over a link end.
    pub(super) fn give_up(&mut self, segment: &mut Segment, link: u32, status: Status) -> Result<()> {
        let numbers: Vec<u32> =
            self.connections.iter().filter(|(_, own)| own.link == link).map(|(number, _)| number).collect();
        for number in numbers {
            self.lose(segment, number, status)?;
        }
        Ok(())
    }
}

impl Far {
    /// Have a datagram on its way. It is in no state: a crash loses it, and so does a line that has too many.
    pub(in crate::pony) fn send_datagram(
        &mut self,
        head: Head,
        own: &Connection,
        bytes: &[u8],
    ) -> std::result::Result<(), Status> {
        let Some(line) = self.lines.get_mut(&own.link) else { return Ok(()) };
        if bytes.len() > line.room() - DATAGRAM {
            return Err(Status::TooLong);
        }
        if line.control.len() < MOST_QUEUED {
            let slot = line.slots.take();
            let place = line.slots.at(slot);
            let (to, from, stream, cookie) = (own.peer, head.connection, head.stream, own.cookie as u8);
            place.ends = Some(Ends { to, from, stream, cookie });
            place.body.clear();
            place.body.extend_from_slice(bytes);
            self.queue(own.link, Item::Datagram { slot });
        }
        Ok(())
    }

    /// A link to `host`, without a way there. Raises `Full`.
    pub(super) fn link(&mut self, segment: &mut Segment, host: &[u8]) -> Result<u32> {
        let made = Link { host: host.to_vec(), salt: 0, epoch: self.epoch, attached: None };
        let link = self.links.insert(segment, made)?;
        self.by_host.insert(host.to_vec(), link);
        Ok(link)
    }

    /// Everything that is known of a host, to which there are no connections.
    pub(super) fn unlink(&mut self, segment: &mut Segment, link: u32) -> Result<()> {
        self.lines.remove(&link);
        self.wires.take(link);
        self.ready.retain(|other| *other != link);
        self.wanted.remove(&link);
        self.refusals.remove(&link);
        if let Some(row) = self.links.remove(segment, link)? {
            self.by_host.remove(&row.host);
        }
        Ok(())
    }

    fn want(&mut self, link: u32, now: Nanos) {
        let Some(row) = self.links.get(link) else { return };
        let last = self.wanted.entry(link).or_insert(0);
        if *last == 0 || now > *last + LOOK_AROUND {
            *last = now;
            let host = String::from_utf8_lossy(&row.host);
            self.said.push_back(serde_json::json!({ "want": host }).to_string().into_bytes());
        }
    }

    /// Everything that was kept for a connection.
    fn drop_end(&mut self, segment: &mut Segment, number: u32, own: &Connection) -> Result<()> {
        self.forget_peer(own.link, own.peer);
        self.blobs.remove(segment, own.name)?;
        let Some(end) = self.ends.remove(&number) else { return Ok(()) };
        if end.under_way > 0 {
            let mine = |(row, item): (u32, &Sending)| (item.connection == number).then_some(row);
            let rows: Vec<u32> = self.sending.iter().filter_map(mine).collect();
            for row in rows {
                self.acked.remove(&row);
                self.sending.remove(segment, row)?;
            }
        }
        if !self.by_held.is_empty() {
            let mine = |(row, item): (u32, &Held)| (item.connection == number).then_some(row);
            let rows: Vec<u32> = self.held.iter().filter_map(mine).collect();
            for row in rows {
                if let Some(item) = self.held.remove(segment, row)? {
                    self.by_held.remove(&(item.connection, item.stream, item.seq));
                }
            }
        }
        for stream in end.streams {
            if let Some(row) = self.by_stream.remove(&(number, stream)) {
                self.streams.remove(segment, row)?;
            }
        }
        for row in end.endings.into_values().chain(end.finished.into_values()) {
            self.endings.remove(segment, row)?;
        }
        Ok(())
    }
}
