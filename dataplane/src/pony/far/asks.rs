//! Operations on the memory of another host's applications: cut into parts that fit packets, asked for, and put together from
//! their answers.

use rustc_hash::FxHashMap;

use super::frame::{self, Ends, Part, Writer};
use super::line::Line;
use super::ranges::Ranges;
use super::rows::{Ask, Blob, BODY};
use super::{transmit, Far, ASKS};
use crate::layout::INLINE_MAX;
use crate::pony::bursts::Each;
use crate::pony::command::{
    answer, Access, Burst, Handle, Head, Kind, Piece, Reader, Scan, Short, Single, Status, ANSWER, INLINE,
};
use crate::pony::desk::{Desk, Order, Outcome};
use crate::pony::numbered::Numbered;
use crate::pony::rows::{Connection, SMALL};
use crate::pony::space::Space;
use crate::state::{Result, Segment};

/// What an operation is, as its command says.
#[derive(Clone, Copy)]
enum What {
    Read { region: Handle, at: u64, into: u64, len: u32 },
    Write { region: Handle, at: u64, from: u64, len: u64 },
    Word,
    Indirect { region: Handle, index: u64, into: u64, len: u32 },
    Scan { region: Handle, scan: Scan, into: u64 },
    Burst { each: Each, burst: Burst },
}

impl What {
    fn of(kind: u8, body: &[u8]) -> std::result::Result<What, Short> {
        let kind = Kind::of(kind).ok_or(Short)?;
        let each = match kind {
            Kind::Reads => Some(Each::Read),
            Kind::Writes => Some(Each::Write),
            Kind::Indirects => Some(Each::Indirect),
            _ => None,
        };
        let mut reader = Reader::new(body);
        if let Some(each) = each {
            return Ok(What::Burst { each, burst: Burst::parse(&mut reader)? });
        }
        if kind == Kind::Write {
            let region = reader.handle()?;
            return Ok(What::Write { region, at: reader.u64()?, from: reader.u64()?, len: reader.u64()? });
        }
        let (single, _) = Single::parse(kind, reader)?;
        let (region, into) = (single.region, single.into);
        Ok(match single.access {
            Access::Read { at, len } => What::Read { region, at, into, len },
            Access::Indirect { index, len } => What::Indirect { region, index, into, len },
            Access::Scan(scan) => What::Scan { region, scan, into },
            Access::Write { .. } | Access::CompareSwap { .. } | Access::FetchAdd { .. } => What::Word,
        })
    }

    fn len(&self) -> u64 {
        match *self {
            What::Read { len, .. } | What::Indirect { len, .. } => len.into(),
            What::Scan { scan, .. } => scan.len.into(),
            What::Write { len, .. } => len,
            What::Word => 8,
            What::Burst { burst, .. } => u64::from(burst.size) * u64::from(burst.count),
        }
    }

    /// Where in the own arena its bytes go or come from.
    fn place(&self) -> u64 {
        match *self {
            What::Read { into, .. } | What::Indirect { into, .. } | What::Scan { into, .. } => into,
            What::Write { from, .. } => from,
            What::Word => INLINE,
            What::Burst { burst, .. } => burst.into,
        }
    }
}

/// How an operation is cut: `per` numbers of a burst in each part, or each of them in `sub` parts of `chunk` bytes.
#[derive(Clone, Copy, Debug)]
struct Plan {
    chunk: u64,
    per: u64,
    sub: u64,
    parts: u64,
}

impl Plan {
    fn of(what: &What, line: &Line) -> Plan {
        let (reply, request) = (line.reply_chunk() as u64, line.request_chunk() as u64);
        match *what {
            What::Word => Plan { chunk: 8, per: 0, sub: 1, parts: 1 },
            What::Burst { each, burst } => {
                let (size, count) = (u64::from(burst.size), u64::from(burst.count));
                let (number, chunk) = match each {
                    Each::Read => (8, reply),
                    Each::Indirect => (4, reply),
                    Each::Write => (8, request - 32 - 8),
                };
                let numbers = (request - 32) / number;
                let per = match each {
                    Each::Write => (request - 32) / (8 + size),
                    _ => reply.checked_div(size).unwrap_or(numbers).min(numbers),
                };
                if per > 0 {
                    return Plan { chunk, per, sub: 1, parts: count.div_ceil(per).max(1) };
                }
                let sub = size.div_ceil(chunk);
                Plan { chunk, per: 1, sub, parts: count * sub }
            }
            _ => {
                let chunk = if matches!(what, What::Write { .. }) { request - 32 } else { reply };
                Plan { chunk, per: 0, sub: 1, parts: what.len().div_ceil(chunk).max(1) }
            }
        }
    }

    /// Of a burst: the first number of a part, how many it has, and where in each of them it begins.
    fn numbers(&self, part: u64, count: u64) -> (u64, u64, u64) {
        if self.sub > 1 {
            return (part / self.sub, 1, part % self.sub * self.chunk);
        }
        let first = part * self.per;
        (first, self.per.min(count.saturating_sub(first)), 0)
    }
}

/// How far an operation is.
pub struct Progress {
    attempt: u32,
    what: What,
    plan: Plan,
    /// Which parts were answered.
    answered: Ranges,
    status: Status,
    /// The first number of a burst that failed; what is answered otherwise.
    bad: u64,
    value: u64,
    inline: Vec<u8>,
}

/// What requests are written from.
pub struct View<'a> {
    pub asks: &'a Numbered<Ask>,
    pub blobs: &'a Numbered<Blob>,
    pub progress: &'a FxHashMap<u32, Progress>,
}

impl View<'_> {
    /// Part number `next` of an operation, if it has so many and this is still the attempt.
    pub fn part(&self, row: u32, attempt: u32, next: u32) -> Option<Part> {
        let (ask, progress) = (self.asks.get(row)?, self.progress.get(&row)?);
        if progress.attempt != attempt {
            return None;
        }
        let part = Part { id: ask.id, attempt, part: next };
        (u64::from(next) < progress.plan.parts).then_some(part)
    }

    /// None: void. False: there is no room.
    pub fn encode(&self, row: u32, part: Part, view: &transmit::View<'_>, writer: &mut Writer<'_>) -> Option<bool> {
        let ask = self.asks.get(row).filter(|ask| ask.id == part.id)?;
        let progress = self.progress.get(&row).filter(|progress| progress.attempt == part.attempt)?;
        let own = view.connections.get(ask.connection)?;
        let floor = *view.ends.get(&ask.connection)?.asks.first_key_value()?.0;
        let ends = Ends { to: own.peer, from: ask.connection, stream: 0, cookie: own.cookie as u8 };
        let Progress { what, plan, .. } = progress;
        let (index, chunk) = (u64::from(part.part), plan.chunk);
        let start = index * chunk;
        let want = what.len().saturating_sub(start).min(chunk) as usize;
        let begin = |writer: &mut Writer<'_>, len: usize| {
            let fits = writer.room() >= frame::REQUEST + len;
            if fits {
                writer.request(ends, part, floor, ask.kind, len);
            }
            fits
        };
        match *what {
            What::Read { region, at, .. } => {
                if !begin(writer, 20) {
                    return Some(false);
                }
                writer.words(&[region.word(), at + start]);
                writer.u32(want as u32);
            }
            What::Write { region, at, .. } => {
                if !begin(writer, 16 + want) {
                    return Some(false);
                }
                writer.words(&[region.word(), at + start]);
                self.bytes(ask, own, what.place(), start, view, writer.take(want))?;
            }
            What::Word => {
                let len = if ask.kind == Kind::FetchAdd as u8 { 24 } else { 32 };
                if !begin(writer, len) {
                    return Some(false);
                }
                writer.put(&ask.body[..len]);
            }
            What::Indirect { region, index, len, .. } => {
                if !begin(writer, 28) {
                    return Some(false);
                }
                writer.words(&[region.word(), index]);
                writer.halves(&[len, start as u32, want as u32]);
            }
            What::Scan { region, scan, .. } => {
                if !begin(writer, 42) {
                    return Some(false);
                }
                writer.words(&[region.word(), scan.at, scan.needle]);
                writer.halves(&[scan.len, start as u32, want as u32]);
                [scan.entries, scan.stride, scan.pointer].into_iter().for_each(|half| writer.u16(half));
            }
            What::Burst { each, burst } => {
                let (first, count, skip) = plan.numbers(index, burst.count.into());
                let size = u64::from(burst.size);
                let each_want = if plan.sub > 1 { (size - skip).min(chunk) } else { size };
                let width = if each == Each::Indirect { 4 } else { 8 };
                let data = if each == Each::Write { count * each_want } else { 0 };
                if !begin(writer, 22 + (count * width + data) as usize) {
                    return Some(false);
                }
                writer.u64(burst.region.word());
                writer.halves(&[burst.size, skip as u32, each_want as u32]);
                writer.u16(count as u16);
                let numbers = Piece { offset: burst.numbers + first * width, len: count * width };
                let (core, range) = view.space.range(own.channel, numbers).ok()?;
                core.arena()?.read(range.start, writer.take((count * width) as usize));
                if each == Each::Write {
                    for number in first..first + count {
                        let offset = burst.into + number * size + skip;
                        let (core, range) = view.space.range(own.channel, Piece { offset, len: each_want }).ok()?;
                        core.arena()?.read(range.start, writer.take(each_want as usize));
                    }
                }
            }
        }
        Some(true)
    }

    /// The bytes of a write from `start` on.
    fn bytes(
        &self,
        ask: &Ask,
        own: &Connection,
        from: u64,
        start: u64,
        view: &transmit::View<'_>,
        out: &mut [u8],
    ) -> Option<()> {
        if ask.blob != 0 {
            let bytes = &self.blobs.get(ask.blob)?.bytes;
            out.copy_from_slice(bytes.get(start as usize..start as usize + out.len())?);
            return Some(());
        }
        let piece = Piece { offset: from + start, len: out.len() as u64 };
        let (core, range) = view.space.range(own.channel, piece).ok()?;
        core.arena()?.read(range.start, out);
        Some(())
    }
}

impl Desk {
    /// Begin an operation on the memory of a peer on another host. Raises `Full`.
    pub fn ask(
        &mut self,
        segment: &mut Segment,
        order: &Order<'_>,
        head: Head,
        own: Connection,
        rest: &[u8],
    ) -> std::result::Result<Result<Outcome>, Short> {
        let what = What::of(head.kind as u8, rest)?;
        let inline = matches!(what, What::Write { from: INLINE, .. });
        if let Err(status) = self.may_ask(order.channel, head, &what, rest) {
            return Ok(Ok(Err(status)));
        }
        let mut body = [0; BODY];
        let fixed = if inline { 32 } else { rest.len().min(BODY) };
        body[..fixed].copy_from_slice(rest.get(..fixed).ok_or(Short)?);
        let bytes = if inline { rest[32..].to_vec() } else { Vec::new() };
        Ok(self.begin(segment, order.tag, head, own, body, bytes))
    }

    fn may_ask(&self, channel: u64, head: Head, what: &What, rest: &[u8]) -> std::result::Result<(), Status> {
        if self.far.ends.get(&head.connection).is_some_and(|end| end.asks.len() >= ASKS) {
            return Err(Status::Full);
        }
        match *what {
            What::Word => return Ok(()),
            What::Write { from: INLINE, len, .. } => {
                return if rest.len() as u64 != 32 + len {
                    Err(Status::Bad)
                } else if len > SMALL as u64 {
                    Err(Status::TooLong)
                } else {
                    Ok(())
                };
            }
            What::Burst { each, burst } => {
                let width = if each == Each::Indirect { 4 } else { 8 };
                if burst.count as usize > crate::pony::desk::BURST {
                    return Err(Status::TooLong);
                }
                let numbers = Piece { offset: burst.numbers, len: u64::from(burst.count) * width };
                self.space.range(channel, numbers)?;
            }
            _ if what.place() == INLINE => {
                return if what.len() > (INLINE_MAX - ANSWER) as u64 { Err(Status::TooLong) } else { Ok(()) };
            }
            _ => {}
        }
        self.space.range(channel, Piece { offset: what.place(), len: what.len() }).map(drop)
    }

    fn begin(
        &mut self,
        segment: &mut Segment,
        tag: u64,
        head: Head,
        own: Connection,
        body: [u8; BODY],
        bytes: Vec<u8>,
    ) -> Result<Outcome> {
        let far = &mut self.far;
        if !far.asks.may_have(own.channel, 1) || !far.blobs.may_have(own.channel, 1) {
            return Ok(Err(Status::Full));
        }
        let blob = if bytes.is_empty() { 0 } else { far.blobs.insert(segment, Blob { owner: own.channel, bytes })? };
        let id = far.next_id();
        let ask = Ask { owner: own.channel, connection: head.connection, kind: head.kind as u8, body, id, tag, blob };
        let row = far.asks.insert(segment, ask)?;
        far.end(head.connection).asks.insert(id, row);
        far.start(own.link, row);
        Ok(Ok(None))
    }

    /// An answer came. Raises `Full`.
    pub(super) fn replied(
        &mut self,
        segment: &mut Segment,
        link: u32,
        ends: Ends,
        (part, status, value, bytes): (Part, u8, u64, &[u8]),
    ) -> Result<()> {
        let Some(own) = self.far_connection(link, ends) else { return Ok(()) };
        let Far { ends: all, progress, lines, .. } = &mut self.far;
        let Some(row) = all.get(&ends.to).and_then(|end| end.asks.get(&part.id)).copied() else { return Ok(()) };
        let Some(progress) = progress.get_mut(&row) else { return Ok(()) };
        if progress.attempt != part.attempt || u64::from(part.part) >= progress.plan.parts {
            return Ok(());
        }
        if !progress.answered.add(part.part.into(), u64::from(part.part) + 1) {
            return Ok(());
        }
        if let Some(line) = lines.get_mut(&link) {
            line.asked = line.asked.saturating_sub(1);
        }
        let status = Status::of(status).unwrap_or(Status::Bad);
        let fits = progress.take(&self.space, own.channel, part.part.into(), bytes);
        let status = if fits || status != Status::Ok { status } else { Status::Bad };
        progress.note(part.part.into(), status, value);
        if progress.answered.floor() == progress.plan.parts {
            self.finish_ask(segment, row, None)?;
        }
        self.far.rouse(link);
        Ok(())
    }

    /// An operation is over, by its answers or with a status. Raises `Full`.
    pub(super) fn finish_ask(&mut self, segment: &mut Segment, row: u32, failed: Option<Status>) -> Result<()> {
        let Some(ask) = self.far.asks.remove(segment, row)? else { return Ok(()) };
        if ask.blob != 0 {
            self.far.blobs.remove(segment, ask.blob)?;
        }
        self.far.end(ask.connection).asks.remove(&ask.id);
        let progress = self.far.progress.remove(&row);
        if let (Some(progress), Some(own)) = (&progress, self.connections.get(ask.connection)) {
            if let Some(line) = self.far.lines.get_mut(&own.link) {
                progress.abandon(line, row);
            }
            self.far.rouse(own.link);
        }
        let (status, value, bytes) = match (failed, progress) {
            (None, Some(progress)) => progress.result(),
            (status, _) => (status.unwrap_or(Status::Bad), 0, Vec::new()),
        };
        let (Some(own), Some(kind)) = (self.connections.get(ask.connection), Kind::of(ask.kind)) else { return Ok(()) };
        self.outbox.put(own.channel, 0, ask.tag, &answer(kind, status, 0, ask.connection, value), &bytes);
        Ok(())
    }
}

impl Progress {
    /// Parts that were asked for, and that nobody waits for any more, make room for others.
    fn abandon(&self, line: &mut Line, row: u32) {
        let answered = self.answered.count();
        if answered == self.plan.parts {
            return;
        }
        let left = line.asking.iter().find(|asking| (asking.0, asking.1) == (row, self.attempt));
        let asked = left.map_or(self.plan.parts, |(_, _, next)| u64::from(*next));
        line.asked = line.asked.saturating_sub(asked.saturating_sub(answered) as u32);
    }

    /// Put the bytes of a part where they belong. False when they do not fit.
    fn take(&mut self, space: &Space, channel: u64, part: u64, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let at = match self.what {
            What::Burst { burst, .. } => {
                let (first, count, skip) = self.plan.numbers(part, burst.count.into());
                if bytes.len() as u64 > count * u64::from(burst.size) - skip {
                    return false;
                }
                first * u64::from(burst.size) + skip
            }
            _ => part * self.plan.chunk,
        };
        if at + bytes.len() as u64 > self.what.len() {
            return false;
        }
        if self.what.place() == INLINE {
            let end = at as usize + bytes.len();
            if self.inline.len() < end {
                self.inline.resize(end, 0);
            }
            self.inline[at as usize..end].copy_from_slice(bytes);
            return true;
        }
        let piece = Piece { offset: self.what.place() + at, len: bytes.len() as u64 };
        let Ok((core, range)) = space.range(channel, piece) else { return false };
        let Some(arena) = core.arena() else { return false };
        arena.write(range.start, bytes);
        true
    }

    fn note(&mut self, part: u64, status: Status, value: u64) {
        let first = match self.what {
            What::Burst { burst, .. } => self.plan.numbers(part, burst.count.into()).0,
            _ => 0,
        };
        if status == Status::Ok {
            if part == 0 {
                self.value = value;
            }
        } else if first.saturating_add(value) < self.bad || self.status == Status::Ok {
            (self.status, self.bad) = (status, first.saturating_add(value));
        }
    }

    fn result(self) -> (Status, u64, Vec<u8>) {
        if self.status != Status::Ok {
            return (self.status, if matches!(self.what, What::Burst { .. }) { self.bad } else { 0 }, Vec::new());
        }
        let value = match self.what {
            What::Burst { burst, .. } => burst.count.into(),
            What::Read { .. } | What::Write { .. } => self.what.len(),
            _ => self.value,
        };
        (Status::Ok, value, self.inline)
    }
}

impl Far {
    /// Begin to ask, or begin again.
    pub(super) fn start(&mut self, link: u32, row: u32) {
        self.attempts = self.attempts.wrapping_add(1);
        let (Some(ask), Some(line)) = (self.asks.get(row), self.lines.get_mut(&link)) else { return };
        let Ok(what) = What::of(ask.kind, &ask.body) else { return };
        let progress = Progress {
            attempt: self.attempts,
            what,
            plan: Plan::of(&what, line),
            answered: Ranges::default(),
            status: Status::Ok,
            bad: u64::MAX,
            value: 0,
            inline: Vec::new(),
        };
        line.asking.push_back((row, self.attempts, 0));
        self.progress.insert(row, progress);
        self.rouse(link);
    }
}
