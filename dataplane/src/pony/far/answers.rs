//! Operations that another host asks for. What reads is carried out when the answer is written; what changes memory, when it
//! is asked for, and how that went is remembered, so that it happens once.

use super::frame::{self, Ends, Frame, Part, Writer};
use super::line::{Item, Slot};
use super::rows::Ending;
use super::{transmit, ENDINGS, REQUESTS};
use crate::pony::bursts::{self, Each};
use crate::pony::command::{Access, Kind, Reader, Scan, Short, Status};
use crate::pony::desk::Desk;
use crate::pony::memory::{Regions, Sink};
use crate::pony::numbered::of_link;
use crate::pony::rows::{Connection, ECHO};
use crate::pony::space::Seen;
use crate::pony::words;
use crate::state::{Result, Segment};

/// Write the answer to a request. None: there is nobody to answer any more. False: there is no room.
pub fn reply(slot: &Slot, view: &transmit::View<'_>, writer: &mut Writer<'_>) -> Option<bool> {
    let (ends, part) = (slot.ends?, slot.part?);
    let own = view.connections.get(ends.from).filter(|own| own.peer == ends.to)?;
    if let Some((status, value)) = slot.ending {
        if writer.room() < frame::REPLY {
            return Some(false);
        }
        writer.frame(ends, &Frame::Reply { part, status, value, bytes: &[] });
        return Some(true);
    }
    let want = wanted(slot.kind, &slot.body).unwrap_or(0).min(writer_limit(writer));
    if writer.room() < frame::REPLY + want {
        return Some(false);
    }
    let start = writer.len();
    writer.take(frame::REPLY);
    let out = writer.take(want);
    let seen = view.space.seen(own.channel, ends.from);
    let done = if own.channel == ECHO {
        out.fill(0);
        Ok((Status::Ok, want as u64, want))
    } else {
        read(slot.kind, &slot.body, &seen, out)
    };
    let (status, value, len) = done.unwrap_or((Status::Bad, 0, 0));
    writer.cut(start);
    writer.reply(ends, part, status as u8, value, len);
    writer.take(len);
    Some(true)
}

/// A reply is never longer than a packet of the longest.
fn writer_limit(writer: &Writer<'_>) -> usize {
    (writer.len() + writer.room()).saturating_sub(frame::REPLY)
}

/// The most bytes that a request wants.
fn wanted(kind: u8, body: &[u8]) -> std::result::Result<usize, Short> {
    let kind = Kind::of(kind).ok_or(Short)?;
    // Words and halves before it.
    let (words, halves) = match kind {
        Kind::Read => (2, 0),
        Kind::Indirect => (2, 2),
        Kind::Scan => (3, 2),
        Kind::Reads | Kind::Indirects => (1, 2),
        _ => return Err(Short),
    };
    let mut reader = Reader::new(body.get(words * 8 + halves * 4..).ok_or(Short)?);
    let want = reader.u32()? as usize;
    let many = matches!(kind, Kind::Reads | Kind::Indirects);
    Ok(if many { want * usize::from(reader.u16()?) } else { want })
}

/// Carry out a request that reads: how it went, its value, bytes of `out`.
fn read(kind: u8, body: &[u8], seen: &Seen<'_>, out: &mut [u8]) -> std::result::Result<(Status, u64, usize), Short> {
    let mut reader = Reader::new(body);
    let kind = Kind::of(kind).ok_or(Short)?;
    let place = match seen.find(reader.handle()?) {
        Ok(place) => place,
        Err(status) => return Ok((status, 0, 0)),
    };
    if matches!(kind, Kind::Reads | Kind::Indirects) {
        let part = bursts::Part { cap: reader.u32()?, skip: reader.u32()?, want: reader.u32()? };
        reader.u16()?;
        let each = if kind == Kind::Reads { Each::Read } else { Each::Indirect };
        let (done, status) =
            bursts::collect(each, place, seen, reader.rest(), part, out).unwrap_or_else(|status| (0, status));
        return Ok((status, done as u64, (done * part.want as usize).min(out.len())));
    }
    if kind == Kind::Read {
        let at = reader.u64()?;
        return Ok(match place.read(at, out) {
            Ok(()) => (Status::Ok, out.len() as u64, out.len()),
            Err(status) => (status, 0, 0),
        });
    }
    let (access, skip) = if kind == Kind::Indirect {
        let (index, len) = (reader.u64()?, reader.u32()?);
        (Access::Indirect { index, len }, reader.u32()?)
    } else {
        let (at, needle, len, skip) = (reader.u64()?, reader.u64()?, reader.u32()?, reader.u32()?);
        reader.u32()?;
        let (entries, stride, pointer) = (reader.u16()?, reader.u16()?, reader.u16()?);
        (Access::Scan(Scan { at, needle, len, entries, stride, pointer }), skip)
    };
    let mut sink = Sink::Part { bytes: out, skip: skip as usize, at: 0 };
    let value = place.access(access, seen, &mut sink);
    let Sink::Part { at, .. } = sink else { return Err(Short) };
    Ok(match value {
        Ok(value) => (Status::Ok, value, at),
        Err(status) => (status, 0, 0),
    })
}

/// Carry out a request that changes memory.
fn change(
    segment: &mut Segment,
    kind: Kind,
    body: &[u8],
    seen: &Seen<'_>,
) -> std::result::Result<Result<(Status, u64)>, Short> {
    let mut reader = Reader::new(body);
    let place = match seen.find(reader.handle()?) {
        Ok(place) => place,
        Err(status) => return Ok(Ok((status, 0))),
    };
    let mut nothing = Vec::new();
    let mut sink = Sink::Message(&mut nothing);
    let done = match kind {
        Kind::Write => {
            let at = reader.u64()?;
            place.access(Access::Write { at, bytes: reader.rest() }, seen, &mut sink)
        }
        Kind::CompareSwap | Kind::FetchAdd => {
            let (at, first) = (reader.u64()?, reader.u64()?);
            let access = if kind == Kind::FetchAdd {
                Access::FetchAdd { at, add: first }
            } else {
                Access::CompareSwap { at, expected: first, desired: reader.u64()? }
            };
            if let Err(error) = words::note(segment, place, &access) {
                return Ok(Err(error));
            }
            place.access(access, seen, &mut sink)
        }
        _ => {
            let (_size, skip, want) = (reader.u32()?, reader.u32()?, reader.u32()? as usize);
            let count = usize::from(reader.u16()?);
            let rest = reader.rest();
            let (numbers, bytes) = rest.split_at_checked(count * 8).ok_or(Short)?;
            if bytes.len() != count * want {
                return Err(Short);
            }
            for (i, number) in numbers.chunks_exact(8).enumerate() {
                let mut word = [0; 8];
                word.copy_from_slice(number);
                let at = u64::from_le_bytes(word).saturating_add(u64::from(skip));
                let bytes = &bytes[i * want..(i + 1) * want];
                if let Err(status) = place.access(Access::Write { at, bytes }, seen, &mut sink) {
                    return Ok(Ok((status, i as u64)));
                }
            }
            Ok(count as u64)
        }
    };
    Ok(Ok(match done {
        Ok(value) => (Status::Ok, value),
        Err(status) => (status, 0),
    }))
}

impl Desk {
    /// A request came. Raises `Full`.
    pub(super) fn requested(
        &mut self,
        segment: &mut Segment,
        link: u32,
        ends: Ends,
        (part, floor, kind, body): (Part, u64, u8, &[u8]),
    ) -> Result<()> {
        let Some(own) = self.far_connection(link, ends) else { return Ok(()) };
        let number = ends.to;
        if floor > own.floor {
            self.connections.update(segment, number, |own| own.floor = floor)?;
            self.far.forget(segment, number, floor, false)?;
        }
        let back = Ends { to: ends.from, from: number, stream: 0, cookie: own.cookie as u8 };
        let ending = match Kind::of(kind) {
            Some(kind @ (Kind::Write | Kind::Writes | Kind::CompareSwap | Kind::FetchAdd)) => {
                if part.id < own.floor {
                    return Ok(());
                }
                match self.far.remembered(number, part.id, part.part) {
                    Some(ending) => Some((ending.status as u8, ending.value)),
                    None => Some(self.change(segment, &own, number, part, kind, body)?),
                }
            }
            Some(Kind::Read | Kind::Reads | Kind::Indirect | Kind::Indirects | Kind::Scan) => None,
            _ => Some((Status::Bad as u8, 0)),
        };
        let Some(line) = self.far.lines.get_mut(&link).filter(|line| line.slots.used() < REQUESTS) else {
            return Ok(());
        };
        let slot = line.slots.take();
        let place = line.slots.at(slot);
        (place.ends, place.part, place.kind, place.ending) = (Some(back), Some(part), kind, ending);
        place.body.clear();
        if ending.is_none() {
            place.body.extend_from_slice(body);
        }
        self.far.queue(link, Item::Reply { slot });
        Ok(())
    }

    fn change(
        &mut self,
        segment: &mut Segment,
        own: &Connection,
        number: u32,
        part: Part,
        kind: Kind,
        body: &[u8],
    ) -> Result<(u8, u64)> {
        let many = self.far.ends.get(&number).is_some_and(|end| end.endings.len() >= ENDINGS);
        if many || !self.far.endings.may_have(of_link(own.link), 1) {
            return Ok((Status::Full as u8, 0));
        }
        let seen = self.space.seen(own.channel, number);
        let (status, value) = if own.channel == ECHO {
            (Status::Ok, body.len() as u64)
        } else {
            change(segment, kind, body, &seen).unwrap_or(Ok((Status::Bad, 0)))?
        };
        let ending =
            Ending { owner: of_link(own.link), connection: number, id: part.id, part: part.part, status, value };
        self.far.remember(segment, ending)?;
        Ok((status as u8, value))
    }
}
