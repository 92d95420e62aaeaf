//! Everything that the state says is under way, said once more: after this engine forgot what it had said, and after a peer
//! forgot what it had heard.

use super::line::{Item, Line};
use super::rows::Ask;
use super::{Far, Import};
use crate::pony::command::Kind;
use crate::pony::desk::Desk;
use crate::pony::rows::Connection;
use crate::state::{Result, Segment};

impl Desk {
    /// Links as the state has them, after a crash, an upgrade, or at a beginning.
    pub(in crate::pony) fn reconnect(&mut self) {
        let far = &mut self.far;
        for (_, stream) in far.streams.iter() {
            let end = far.ends.entry(stream.connection).or_default();
            end.streams.push(stream.stream);
            end.sent = end.sent.wrapping_add(stream.out as u32);
            end.came = end.came.wrapping_add(stream.next as u32);
        }
        for (_, item) in far.sending.iter() {
            far.ends.entry(item.connection).or_default().under_way += 1;
        }
        for (row, item) in far.exports.iter() {
            far.ends.entry(item.connection).or_default().exports.insert(item.seq, row);
        }
        for (row, item) in far.asks.iter() {
            far.ends.entry(item.connection).or_default().asks.insert(item.id, row);
        }
        for (number, own) in self.connections.iter().filter(|(_, own)| own.link != 0) {
            let end = far.ends.entry(number).or_default();
            // The peer says what is right as soon as it hears from us.
            end.credit = Some(end.sent.wrapping_sub(end.under_way));
            end.told = end.came.wrapping_sub(self.outbox.held(number));
            if !own.opening {
                far.know_peer(own.link, own.peer, number);
            }
        }
        let links: Vec<u32> = far.links.iter().map(|(number, _)| number).collect();
        for link in links {
            let far = &mut self.far;
            if let Some((row, attached)) = far.links.get(link).and_then(|row| Some((row, row.attached?))) {
                far.lines.insert(link, Box::new(Line::new(row, attached)));
                self.resync(link);
            }
        }
    }

    /// Packets have another size: writes are cut into other parts, which the peer must not take for those that it has seen. What
    /// was written of one that is under way is written once more.
    pub(super) fn cut_anew(&mut self, segment: &mut Segment, link: u32) -> Result<()> {
        let connections = &self.connections;
        let ours = |ask: &Ask| connections.get(ask.connection).is_some_and(|own| own.link == link);
        let writes = |ask: &Ask| [Kind::Write as u8, Kind::Writes as u8].contains(&ask.kind);
        let found = self.far.asks.iter().filter(|(_, ask)| writes(ask) && ours(ask));
        let mut rows: Vec<(u64, u32, u32)> = found.map(|(row, ask)| (ask.id, row, ask.connection)).collect();
        rows.sort_unstable();
        for (old, row, connection) in rows {
            let id = self.far.next_id();
            self.far.asks.update(segment, row, |ask| ask.id = id)?;
            let asks = &mut self.far.end(connection).asks;
            asks.remove(&old);
            asks.insert(id, row);
        }
        Ok(())
    }

    /// The peer of a link knows nothing any more of what it did not put into its state.
    pub(super) fn resync(&mut self, link: u32) {
        let Some(line) = self.far.lines.get_mut(&link) else { return };
        for item in line.control.drain(..) {
            if let Item::Reply { slot } | Item::Datagram { slot } = item {
                line.slots.give_back(slot);
            }
        }
        line.bulk.clear();
        line.asking.clear();
        line.asked = 0;
        let chunk = line.message_chunk();
        let ends: Vec<(u32, Connection)> =
            self.connections.iter().filter(|(_, own)| own.link == link).map(|(number, own)| (number, *own)).collect();
        for (number, own) in &ends {
            self.far.greet(*number, own);
        }
        let mut messages: Vec<(u64, u32, usize)> = self
            .far
            .sending
            .iter()
            .filter(|(_, item)| self.connections.get(item.connection).is_some_and(|own| own.link == link))
            .map(|(row, item)| (item.id, row, item.bytes.len()))
            .collect();
        messages.sort_unstable();
        for (id, row, len) in messages {
            self.far.acked.remove(&row);
            for piece in 0..pieces(len, chunk) {
                self.far.queue(link, Item::Message { row, id, piece });
            }
        }
        for (number, own) in ends.iter().filter(|(_, own)| !own.opening) {
            self.far.repeat(*number, own);
        }
        self.far.rouse(link);
    }
}

/// Packets that a message of `len` bytes takes.
pub fn pieces(len: usize, chunk: usize) -> u32 {
    len.div_ceil(chunk).max(1) as u32
}

impl Far {
    fn greet(&mut self, number: u32, own: &Connection) {
        if own.opening {
            self.queue(own.link, Item::Open(number));
            return;
        }
        self.queue(own.link, Item::Alive(number));
        self.queue(own.link, Item::Credit(number));
    }

    /// Large messages and operations of one connection, from the beginning.
    fn repeat(&mut self, number: u32, own: &Connection) {
        let end = self.ends.entry(number).or_default();
        end.partial.clear();
        end.offers.clear();
        for import in end.imports.values_mut() {
            import.came = super::ranges::Ranges::from(import.came.floor());
        }
        let exports: Vec<u32> = end.exports.values().copied().collect();
        let asks: Vec<u32> = end.asks.values().copied().collect();
        for row in exports {
            let id = self.exports.get(row).map_or(0, |export| export.id);
            self.queue(own.link, Item::Offer { row, id });
        }
        for row in asks {
            self.start(own.link, row);
        }
    }
}

impl Import {
    pub fn done(&self) -> bool {
        self.came.floor() >= self.len
    }
}
