//! What goes out. Packets are written when the port has room and the flow lets them go, from what the state says then.

use rustc_hash::FxHashMap;

use super::frame::{self, Ends, Frame, Writer};
use super::line::{Item, Line, PARTS};
use super::rows::{Export, Sending};
use super::{answers, asks, seal, End, Far};
use crate::pony::command::Piece;
use crate::pony::desk::Desk;
use crate::pony::flow::wire::SEALED;
use crate::pony::flow::{Header, Nanos, Send, Wheel};
use crate::pony::numbered::Numbered;
use crate::pony::port::Port;
use crate::pony::rows::Connection;
use crate::pony::space::Space;
use crate::stats::monotonic_ns;

/// Packets of one line before another has its turn.
const TURN: usize = 64;
/// Bytes that leave a UDP port at once: about as many as go through the network as one.
const FLUSH: usize = 60_000;
/// Bytes that the other end of a wire may work on while more are written.
const PORTION: usize = 16_000;
/// Less of a large message is not worth a place in a packet with other things.
const LEAST_PIECE: usize = 256;

/// What a line does after its turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Wait,
    /// It wants another turn soon.
    More,
    /// The same, but its port has no room.
    Blocked,
}

/// What frames are written from.
pub struct View<'a> {
    pub connections: &'a Numbered<Connection>,
    pub space: &'a Space,
    pub sending: &'a Numbered<Sending>,
    pub exports: &'a Numbered<Export>,
    pub asks: asks::View<'a>,
    pub ends: &'a FxHashMap<u32, End>,
}

impl Desk {
    /// Send what may go; how many packets. Everything that is looked at is permanent already: nothing of the poll under
    /// way may come before this.
    pub fn transmit(&mut self, now: Nanos) -> usize {
        if std::mem::take(&mut self.far.hold) {
            return 1;
        }
        let Some(mut port) = self.far.port.take() else { return 0 };
        let mut due = std::mem::take(&mut self.far.due);
        let wheel = self.far.wheel.get_or_insert_with(|| Wheel::new(now));
        wheel.expire(now, &mut due);
        for link in due.drain(..) {
            if let Some(line) = self.far.lines.get_mut(&link).filter(|line| line.armed <= now) {
                line.armed = Nanos::MAX;
            }
            self.far.rouse(link);
        }
        self.far.due = due;
        self.far.blocked = 0;
        let mut sent = 0;
        for _ in 0..self.far.ready.len() {
            let Some(link) = self.far.ready.pop_front() else { break };
            let Some(mut line) = self.far.lines.remove(&link) else { continue };
            line.ready = false;
            let mut plug = self.far.wires.take(link);
            let (out, portion): (&mut dyn Port, usize) = match &mut plug {
                Some(plug) => (&mut plug.wire, PORTION),
                None => (&mut port, FLUSH),
            };
            let (count, then) = self.push(&mut line, out, portion, now);
            sent += count;
            self.arm(link, &mut line, now);
            self.far.lines.insert(link, line);
            let holds = plug.as_mut().is_none_or(|plug| plug.wire.flush().is_ok());
            if let Some(plug) = plug {
                self.far.wires.put(link, plug);
            }
            if !holds {
                self.lose_wire(link);
            } else if then != Then::Wait {
                self.far.rouse(link);
                self.far.blocked += usize::from(then == Then::Blocked);
            }
        }
        // What does not get out now is lost, as on a wire, or stays for the next time.
        let _ = port.flush();
        self.far.port = Some(port);
        sent
    }

    /// Packets of one line: how many, and what comes then. They leave when there are `portion` bytes of them, so that the
    /// peer works on them while the next are written.
    fn push(&mut self, line: &mut Line, port: &mut dyn Port, portion: usize, now: Nanos) -> (usize, Then) {
        let (mut now, mut bytes) = (now, 0);
        for count in 0..TURN {
            if bytes >= portion {
                // What cannot leave waits for room, which `frame` tells; what is wrong shows again.
                let _ = port.flush();
                (now, bytes) = (monotonic_ns(), 0);
            }
            if port.frame().is_none() && (port.flush().is_err() || port.frame().is_none()) {
                return (count, Then::Blocked);
            }
            let went = match line.flow.poll(now) {
                Send::Again(token) => Some(self.write(line, port, now, Some(token)).unwrap_or(0)),
                Send::New if line.has_work() => self.write(line, port, now, None),
                Send::New | Send::Nothing => None,
            };
            bytes += went.unwrap_or(0);
            if went.is_none() {
                if line.flow.ack_due(now) {
                    let header = line.flow.ack(now);
                    if let Some(frame) = port.frame() {
                        let len = finish(line, header, frame);
                        port.push(len, line.attached.address, line.flow.path.number);
                    }
                    return (count + 1, Then::Wait);
                }
                return (count, Then::Wait);
            }
        }
        (TURN, Then::More)
    }

    /// Write one packet, anew or once more: its bytes. None when there turned out to be nothing to say.
    fn write(&mut self, line: &mut Line, port: &mut dyn Port, now: Nanos, again: Option<u64>) -> Option<usize> {
        let (start, room) = (line.attached.version.header(), line.room());
        let body = port.frame()?.get_mut(start..start + room)?;
        let mut writer = Writer::new(body);
        let Far { sending, exports, asks, blobs, progress, ends, .. } = &self.far;
        let asks = asks::View { asks, blobs, progress };
        let view = View { connections: &self.connections, space: &self.space, sending, exports, asks, ends };
        let token = match again {
            Some(token) => {
                let mut items = std::mem::take(&mut line.packets.at(token as u32).items);
                // An answer that is longer by now, and does not fit any more, goes with another packet.
                let mut left = Vec::new();
                items.retain(|item| {
                    let fits = view.encode(line, *item, &mut writer);
                    if !fits {
                        left.push(*item);
                    }
                    fits
                });
                line.control.extend(left);
                line.packets.at(token as u32).items = items;
                token
            }
            None => {
                let token = line.packets.take();
                let mut items = std::mem::take(&mut line.packets.at(token).items);
                items.clear();
                view.gather(line, &mut writer, &mut items);
                let nothing = items.is_empty();
                line.packets.at(token).items = items;
                if nothing {
                    line.packets.give_back(token);
                    return None;
                }
                u64::from(token)
            }
        };
        let len = writer.len() as u16;
        let header = line.flow.header(now, token, len);
        let len = finish(line, header, port.frame()?);
        port.push(len, line.attached.address, line.flow.path.number);
        Some(len)
    }

    /// Have the wheel look at the line when it has to.
    fn arm(&mut self, link: u32, line: &mut Line, now: Nanos) {
        let paced = Some(line.flow.paced_until()).filter(|until| *until > now && line.has_work());
        let Some(next) = [line.flow.deadline(), paced].into_iter().flatten().min() else { return };
        if next < line.armed {
            line.armed = next;
            if let Some(wheel) = &mut self.far.wheel {
                wheel.insert(next, link);
            }
        }
    }
}

/// Put the header before a payload that is there, and seal it if that is wanted: the packet's length.
fn finish(line: &Line, mut header: Header, frame: &mut [u8]) -> usize {
    let len = header.version.header() + usize::from(header.len);
    let Some(sealed) = &line.seal else {
        header.write(&mut frame[..len]);
        return len;
    };
    header.flags |= SEALED;
    header.write(&mut frame[..len]);
    sealed.seal(header.number, &mut frame[..len + seal::TAG]);
    len + seal::TAG
}

impl View<'_> {
    /// Fill a new packet.
    fn gather(&self, line: &mut Line, writer: &mut Writer<'_>, items: &mut Vec<Item>) {
        line.turn = !line.turn && !line.bulk.is_empty();
        if line.turn {
            self.gather_bulk(line, writer, items);
        }
        while let Some(item) = line.control.front().copied() {
            let before = writer.len();
            if !self.encode(line, item, writer) {
                break;
            }
            line.control.pop_front();
            // What has become void says nothing.
            if writer.len() > before {
                items.push(item);
            } else if let Item::Reply { slot } | Item::Datagram { slot } = item {
                line.slots.give_back(slot);
            }
        }
        while line.asked < PARTS {
            let Some((row, attempt, next)) = line.asking.pop_front() else { break };
            let Some(part) = self.asks.part(row, attempt, next) else { continue };
            let item = Item::Request { row, part };
            let before = writer.len();
            if !self.encode(line, item, writer) {
                line.asking.push_front((row, attempt, next));
                break;
            }
            line.asking.push_front((row, attempt, next + 1));
            if writer.len() > before {
                line.asked += 1;
                items.push(item);
            }
        }
        if line.control.is_empty() {
            self.gather_bulk(line, writer, items);
        }
    }

    fn gather_bulk(&self, line: &mut Line, writer: &mut Writer<'_>, items: &mut Vec<Item>) {
        while let Some((row, id, offset)) = line.bulk.pop_front() {
            let Some(export) = self.exports.get(row).filter(|export| export.id == id) else { continue };
            let left = export.piece.len.saturating_sub(offset);
            let room = writer.room().saturating_sub(frame::PIECE) as u64;
            if room < left.min(LEAST_PIECE as u64) || writer.room() < frame::PIECE {
                line.bulk.push_front((row, id, offset));
                return;
            }
            let len = left.min(room) as u32;
            let item = Item::Piece { row, id, offset, len };
            self.encode(line, item, writer);
            items.push(item);
            if left > u64::from(len) {
                line.bulk.push_back((row, id, offset + u64::from(len)));
            }
        }
    }

    fn ends(&self, connection: u32) -> Option<Ends> {
        let own = self.connections.get(connection)?;
        Some(Ends { to: own.peer, from: connection, stream: 0, cookie: own.cookie as u8 })
    }

    /// False when there is no room; true without anything written when it is void.
    fn encode(&self, line: &Line, item: Item, writer: &mut Writer<'_>) -> bool {
        self.try_encode(line, item, writer).unwrap_or(true)
    }

    /// None: void.
    fn try_encode(&self, line: &Line, item: Item, writer: &mut Writer<'_>) -> Option<bool> {
        let room = writer.room();
        let (ends, frame) = match item {
            Item::Open(connection) => {
                let own = self.connections.get(connection).filter(|own| own.opening)?;
                let name = self.asks.blobs.get(own.name)?.bytes.as_slice();
                if room < frame::OPEN + name.len() {
                    return Some(false);
                }
                (self.ends(connection)?, Frame::Open { cookie: own.cookie, name })
            }
            Item::Message { row, id, piece } => {
                let message = self.sending.get(row).filter(|message| message.id == id)?;
                let chunk = line.message_chunk();
                let offset = piece as usize * chunk;
                let bytes = message.bytes.get(offset..)?;
                let bytes = &bytes[..bytes.len().min(chunk)];
                if room < frame::MESSAGE + bytes.len() {
                    return Some(false);
                }
                let ends = Ends { stream: message.stream, ..self.ends(message.connection)? };
                let (total, offset) = (message.bytes.len() as u16, offset as u16);
                (ends, Frame::Message { seq: message.seq, total, offset, bytes })
            }
            Item::Datagram { slot } => {
                let slot = line.slots.get(slot);
                if room < frame::DATAGRAM + slot.body.len() {
                    return Some(false);
                }
                (slot.ends?, Frame::Datagram { bytes: &slot.body })
            }
            Item::Request { row, part } => return self.asks.encode(row, part, self, writer),
            Item::Reply { slot } => return answers::reply(line.slots.get(slot), self, writer),
            Item::Piece { row, id, offset, len } => return self.piece(row, id, offset, len as usize, writer),
            _ if room < frame::SHORT => return Some(false),
            Item::Accept(connection) => {
                let cookie = self.connections.get(connection)?.cookie;
                (self.ends(connection)?, Frame::Accept { cookie })
            }
            Item::Refuse { to, cookie, status } => {
                let ends = Ends { to, from: 0, stream: 0, cookie: cookie as u8 };
                (ends, Frame::Refuse { cookie, status })
            }
            Item::Close(ends) => (ends, Frame::Close),
            Item::Gone(ends) => (ends, Frame::Gone),
            Item::Alive(connection) => (self.ends(connection)?, Frame::Alive),
            Item::Credit(connection) => {
                let taken = self.ends.get(&connection)?.told;
                (self.ends(connection)?, Frame::Credit { taken })
            }
            Item::Offer { row, id } => {
                let export = self.exports.get(row).filter(|export| export.id == id)?;
                let floor = *self.ends.get(&export.connection)?.exports.first_key_value()?.0;
                let ends = Ends { stream: export.stream, ..self.ends(export.connection)? };
                (ends, Frame::Offer { seq: export.seq, floor, len: export.piece.len })
            }
            Item::Grant { connection, seq, id } => {
                let import = self.ends.get(&connection)?.imports.get(&seq).filter(|import| import.id == id)?;
                (self.ends(connection)?, Frame::Grant { seq, at: import.came.floor() })
            }
            Item::Finish { ends, seq, status, value } => (ends, Frame::Finish { seq, status, value }),
        };
        writer.frame(ends, &frame);
        Some(true)
    }

    fn piece(&self, row: u32, id: u64, offset: u64, len: usize, writer: &mut Writer<'_>) -> Option<bool> {
        let export = self.exports.get(row).filter(|export| export.id == id)?;
        let own = self.connections.get(export.connection)?;
        let piece = Piece { offset: export.piece.offset + offset, len: len as u64 };
        let (core, range) = self.space.range(own.channel, piece).ok()?;
        let ends = Ends { stream: export.stream, ..self.ends(export.connection)? };
        if writer.room() < frame::PIECE + len {
            return Some(false);
        }
        writer.piece(ends, export.seq, offset, len);
        core.arena()?.read(range.start, writer.take(len));
        Some(true)
    }
}
