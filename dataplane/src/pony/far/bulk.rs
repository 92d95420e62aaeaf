//! Large messages: offered, and sent when there is a place for them, straight into it.

use super::frame::Ends;
use super::line::Item;
use super::ranges::Ranges;
use super::rows::{Ending, Export};
use super::{Import, EXPORTS, FINISHED, LARGE};
use crate::pony::command::{answer, Head, Kind, Piece, Status};
use crate::pony::desk::{Desk, Order, Outcome};
use crate::pony::numbered::of_link;
use crate::pony::rows::{Connection, ECHO};
use crate::pony::transfers::End;
use crate::state::{Result, Segment};

/// Large messages of one connection that come in at a time.
const IMPORTS: usize = 8;
/// Those that wait for places: a correct peer has no more than `EXPORTS`, and as many from before it lost count.
const OFFERS: usize = 4 * EXPORTS;
/// A correct peer leaves no more holes than packets are under way, twice when it begins anew.
const HOLES: usize = 512;
/// Messages of one connection; what lies beyond is a lie.
const LAST: u64 = 1 << 62;
/// The state learns of the progress of a large message every so many bytes.
const STEP: u64 = 256 * 1024;

impl Desk {
    pub(super) fn offered(&mut self, segment: &mut Segment, ends: Ends, seq: u64, floor: u64, len: u64) -> Result<()> {
        let number = ends.to;
        let Some(own) = self.connections.get(number).copied() else { return Ok(()) };
        if seq.max(floor) > LAST {
            return self.break_off(segment, ends, &own);
        }
        if floor > own.large_floor {
            self.connections.update(segment, number, |own| own.large_floor = floor)?;
            self.far.forget(segment, number, floor, true)?;
        }
        if seq < own.large_floor {
            return Ok(());
        }
        let back = Ends { to: ends.from, from: number, ..ends };
        if let Some(ending) = self.far.remembered(number, seq, LARGE) {
            let finish = Item::Finish { ends: back, seq, status: ending.status as u8, value: ending.value };
            self.far.answer(own.link, finish);
            return Ok(());
        }
        // Each of those that wait may come to an end right now.
        if !self.far.endings.may_have(of_link(own.link), FINISHED) {
            return self.break_off(segment, ends, &own);
        }
        let end = self.far.end(number);
        if let Some(import) = end.imports.get(&seq) {
            let id = import.id;
            self.far.answer(own.link, Item::Grant { connection: number, seq, id });
            return Ok(());
        }
        if end.finished.len() >= FINISHED {
            return self.break_off(segment, ends, &own);
        }
        if end.offers.len() < OFFERS {
            end.offers.insert(seq, len);
        }
        self.match_places(segment, number)
    }

    /// Large messages of another host meet the places that were posted, in order.
    pub(in crate::pony) fn match_places(&mut self, segment: &mut Segment, number: u32) -> Result<()> {
        loop {
            let Some(own) = self.connections.get(number).copied() else { return Ok(()) };
            let id = self.far.next_id();
            let end = self.far.ends.entry(number).or_default();
            if end.imports.len() >= IMPORTS {
                return Ok(());
            }
            let mut seq = own.large_floor;
            while end.imports.contains_key(&seq) || end.finished.contains_key(&(seq, LARGE)) {
                seq += 1;
            }
            let Some(len) = end.offers.get(&seq).copied() else { return Ok(()) };
            if own.channel == ECHO {
                end.offers.remove(&seq);
                end.imports.insert(seq, Import { len, place: 0, came: Ranges::default(), id });
                self.far.queue(own.link, Item::Grant { connection: number, seq, id });
                self.finish_import(segment, number, seq)?;
                continue;
            }
            let taken = end.imports.len();
            let Some((row, place)) = self.transfers.place(number, taken) else { return Ok(()) };
            end.offers.remove(&seq);
            if len > place.piece.len {
                self.end_import(segment, number, seq, Status::TooLong, place.piece.len)?;
                continue;
            }
            end.imports.insert(seq, Import { len, place: row, came: Ranges::from(place.done), id });
            self.far.queue(own.link, Item::Grant { connection: number, seq, id });
            self.finish_import(segment, number, seq)?;
        }
    }

    /// A large message for another host, or a place for one of its.
    pub(in crate::pony) fn offer_far(
        &mut self,
        segment: &mut Segment,
        order: &Order<'_>,
        head: Head,
        own: &Connection,
        piece: Piece,
        posted: bool,
    ) -> Result<Outcome> {
        let number = head.connection;
        if posted {
            let taken = self.transfers.add(segment, number, head.stream, true, order.tag, piece)?;
            if !taken {
                return Ok(Err(Status::Full));
            }
            self.match_places(segment, number)?;
            return Ok(Ok(None));
        }
        if self.far.end(number).exports.len() >= EXPORTS || !self.far.exports.may_have(own.channel, 1) {
            return Ok(Err(Status::Full));
        }
        let seq = own.large;
        self.connections.update(segment, number, |own| own.large += 1)?;
        let id = self.far.next_id();
        let (owner, stream, tag) = (own.channel, head.stream, order.tag);
        let export = Export { owner, connection: number, stream, seq, tag, piece, id };
        let row = self.far.exports.insert(segment, export)?;
        self.far.end(number).exports.insert(seq, row);
        self.far.queue(own.link, Item::Offer { row, id });
        Ok(Ok(None))
    }

    pub(super) fn granted(&mut self, link: u32, number: u32, seq: u64, at: u64) {
        let Some(row) = self.far.end(number).exports.get(&seq).copied() else { return };
        let Some(line) = self.far.lines.get_mut(&link) else { return };
        let Some(export) = self.far.exports.get(row).filter(|export| at < export.piece.len) else { return };
        // What is left of an earlier message in that row is another's.
        if line.bulk.iter().all(|(other, id, _)| (*other, *id) != (row, export.id)) {
            line.bulk.push_back((row, export.id, at));
        }
        self.far.rouse(link);
    }

    pub(super) fn piece_came(
        &mut self,
        segment: &mut Segment,
        ends: Ends,
        own: &Connection,
        (seq, offset, bytes): (u64, u64, &[u8]),
    ) -> Result<()> {
        let number = ends.to;
        let Some(import) = self.far.end(number).imports.get_mut(&seq) else { return Ok(()) };
        let Some(end) = offset.checked_add(bytes.len() as u64).filter(|end| *end <= import.len) else {
            return self.break_off(segment, ends, own);
        };
        let before = import.came.floor();
        import.came.add(offset, end);
        if import.came.holes() > HOLES {
            return self.break_off(segment, ends, own);
        }
        let (row, floor) = (import.place, import.came.floor());
        if let Some(place) = self.transfers.posted(row) {
            let piece = Piece { offset: place.piece.offset + offset, len: bytes.len() as u64 };
            if let Ok((core, range)) = self.space.range(own.channel, piece) {
                if let Some(arena) = core.arena() {
                    arena.write(range.start, bytes);
                }
            }
            if floor / STEP > before / STEP {
                self.transfers.advance(segment, row, floor)?;
            }
        }
        self.finish_import(segment, number, seq)
    }

    /// If all of it is here.
    fn finish_import(&mut self, segment: &mut Segment, number: u32, seq: u64) -> Result<()> {
        let Some(import) = self.far.end(number).imports.get(&seq).filter(|import| import.done()) else { return Ok(()) };
        let (row, len) = (import.place, import.len);
        self.far.end(number).imports.remove(&seq);
        if let Some(own) = self.connections.get(number) {
            let to = End { number, channel: own.channel };
            self.transfers.fill(segment, to, row, 0, len, &mut self.outbox)?;
        }
        self.end_import(segment, number, seq, Status::Ok, len)?;
        self.match_places(segment, number)
    }

    fn end_import(&mut self, segment: &mut Segment, number: u32, seq: u64, status: Status, value: u64) -> Result<()> {
        let Some(own) = self.connections.get(number) else { return Ok(()) };
        let owner = of_link(own.link);
        self.far.remember(segment, Ending { owner, connection: number, id: seq, part: LARGE, status, value })?;
        let ends = Ends { to: own.peer, from: number, stream: 0, cookie: own.cookie as u8 };
        self.far.queue(own.link, Item::Finish { ends, seq, status: status as u8, value });
        Ok(())
    }

    /// A large message of ours has come to its end.
    pub(super) fn exported(
        &mut self,
        segment: &mut Segment,
        number: u32,
        own: &Connection,
        (seq, status, value): (u64, u8, u64),
    ) -> Result<()> {
        let Some(row) = self.far.end(number).exports.remove(&seq) else { return Ok(()) };
        let Some(export) = self.far.exports.remove(segment, row)? else { return Ok(()) };
        let status = Status::of(status).unwrap_or(Status::Bad);
        let said = answer(Kind::SendArena, status, export.stream, number, value);
        self.outbox.put(own.channel, 0, export.tag, &said, &[]);
        Ok(())
    }
}
