//! Between hosts: operations of our applications that other engines carry out, and of theirs that we do.
//!
//! What must not be lost is in the state before anything of it goes out, and an acknowledgement goes out only when what it
//! acknowledges is in the state. So an engine that dies, or is replaced, sends again whatever its state says is under way,
//! and a peer that learns of it does the same; who gets something for the second time knows it by its number.

mod answers;
mod asks;
mod bulk;
mod control;
mod endings;
pub mod frame;
mod line;
mod ranges;
mod receive;
mod resync;
pub mod rows;
mod seal;
mod transmit;
pub mod wires;

use std::collections::{BTreeMap, HashMap, VecDeque};

use rustc_hash::FxHashMap;

use self::asks::Progress;
use self::line::{Item, Line};
use self::ranges::Ranges;
use self::rows::{Ask, Blob, Ending, Export, Held, Link, Sending, Stream};
use self::wires::Wires;
use super::flow::{Nanos, Wheel};
use super::numbered::Numbered;
use super::port::faulty::{Faults, Faulty};
use super::port::{Burst, Port};
use crate::state::{Frame, ObjectSpec, Result, Segment};
use crate::stats::monotonic_ns;

/// Large messages of one connection that may be under way.
const EXPORTS: usize = 64;
/// Operations of one connection on the peer's memory that may be under way.
const ASKS: usize = 1024;

/// What one peer may have here: streams and parts of messages of a connection, endings that it does not forget, requests
/// and other things that wait to be answered. More is more than a correct one ever has.
const STREAMS: usize = 4096;
const PARTIAL: usize = 256;
const ENDINGS: usize = 65_536;
const FINISHED: usize = 1024;
const REQUESTS: usize = 4096;
const QUEUED: usize = 65_536;

/// The part of an ending that is a large message's, whose number it has instead of an operation's.
const LARGE: u32 = u32::MAX;

/// The way to other hosts, behind which the network can be made a bad one.
pub type Way = Faulty<Box<dyn Port + Send>, fn() -> Nanos>;

/// What is known of one end of a connection to another host, besides its row.
#[derive(Default)]
struct End {
    /// Messages that were sent, and that the peer's application took, modulo 2^32; None: it has not said yet.
    sent: u32,
    credit: Option<u32>,
    /// Whether the peer said it to this engine, which else has guessed.
    heard: bool,
    /// Messages that came, and what the peer was last told of those taken.
    came: u32,
    told: u32,
    /// Messages that the peer's engine does not have yet.
    under_way: u32,
    streams: Vec<u16>,
    exports: BTreeMap<u64, u32>,
    asks: BTreeMap<u64, u32>,
    /// How operations of the peer ended, by number and part: rows. Large messages are numbered apart, see `LARGE`.
    endings: BTreeMap<(u64, u32), u32>,
    finished: BTreeMap<(u64, u32), u32>,
    /// Large messages that the peer has, and those that come in.
    offers: BTreeMap<u64, u64>,
    imports: BTreeMap<u64, Import>,
    /// Messages that came in part: of stream and number.
    partial: HashMap<(u16, u64), (Vec<u8>, Ranges)>,
}

impl End {
    fn endings(&mut self, part: u32) -> &mut BTreeMap<(u64, u32), u32> {
        if part == LARGE {
            &mut self.finished
        } else {
            &mut self.endings
        }
    }
}

/// A large message that comes in.
#[derive(Default)]
struct Import {
    len: u64,
    /// Where it goes: a posted place's row; 0: nowhere.
    place: u32,
    came: Ranges,
    /// Tells it from a later one of the same connection and number.
    id: u64,
}

#[derive(Default)]
pub struct Far {
    links: Numbered<Link>,
    by_host: HashMap<Vec<u8>, u32>,
    lines: FxHashMap<u32, Box<Line>>,
    streams: Numbered<Stream>,
    by_stream: HashMap<(u32, u16), u32>,
    sending: Numbered<Sending>,
    /// Of each row of `sending`: which pieces the peer has.
    acked: FxHashMap<u32, u16>,
    held: Numbered<Held>,
    by_held: HashMap<(u32, u16, u64), u32>,
    exports: Numbered<Export>,
    asks: Numbered<Ask>,
    progress: FxHashMap<u32, Progress>,
    /// Of operations, so that answers to an earlier one are known.
    attempts: u32,
    blobs: Numbered<Blob>,
    endings: Numbered<Ending>,
    ends: FxHashMap<u32, End>,
    /// By link and number of the peer's end.
    by_peer: HashMap<(u32, u32), u32>,
    cookie: u32,
    epoch: u32,
    id: u64,
    port: Option<Way>,
    pub wires: Wires,
    wheel: Option<Wheel>,
    due: Vec<u32>,
    ready: VecDeque<u32>,
    burst: Burst,
    /// When the engine slept last.
    slept_at: Nanos,
    woke_at: Nanos,
    opened: Vec<u8>,
    /// Of those that are ready, how many found no room in their port.
    blocked: usize,
    said: VecDeque<Vec<u8>>,
    /// Hosts that are wanted: when that was said last.
    wanted: FxHashMap<u32, Nanos>,
    tokens: Vec<u64>,
    looked_around: Nanos,
    /// Why control code found no way to a host, until it does.
    refusals: FxHashMap<u32, String>,
    /// The state was changed outside of a poll, and is not permanent before the next one ends.
    hold: bool,
}

impl Far {
    pub fn objects() -> [ObjectSpec; 8] {
        [
            Numbered::<Link>::object(),
            Numbered::<Stream>::object(),
            Numbered::<Sending>::object(),
            Numbered::<Held>::object(),
            Numbered::<Export>::object(),
            Numbered::<Ask>::object(),
            Numbered::<Blob>::object(),
            Numbered::<Ending>::object(),
        ]
    }

    /// What the state has; links begin a new epoch. Raises `Schema`, `Damaged`, `Full`.
    pub fn adopt(segment: &mut Segment, port: Option<Way>) -> Result<Far> {
        let frame: &Frame = segment;
        let mut far = Far {
            links: Numbered::adopt(frame)?,
            streams: Numbered::adopt(frame)?,
            sending: Numbered::adopt(frame)?,
            held: Numbered::adopt(frame)?,
            exports: Numbered::adopt(frame)?,
            asks: Numbered::adopt(frame)?,
            blobs: Numbered::adopt(frame)?,
            endings: Numbered::adopt(frame)?,
            port,
            hold: true,
            ..Far::default()
        };
        far.by_host = far.links.iter().map(|(number, link)| (link.host.clone(), number)).collect();
        far.by_stream = far.streams.iter().map(|(row, item)| ((item.connection, item.stream), row)).collect();
        far.by_held = far.held.iter().map(|(row, item)| ((item.connection, item.stream, item.seq), row)).collect();
        for (row, item) in far.endings.iter() {
            far.ends.entry(item.connection).or_default().endings(item.part).insert((item.id, item.part), row);
        }
        far.epoch = far.links.iter().map(|(_, link)| link.epoch).max().unwrap_or(0) + 1;
        far.id = line::first(far.epoch);
        // Frames tell the last byte of it: the first ones of an epoch must differ from the first ones of those before, for what
        // is late may speak of these.
        far.cookie = far.epoch << 20 | (far.epoch.wrapping_mul(97) & 0xff);
        far.attempts = far.epoch << 20;
        let numbers: Vec<u32> = far.links.iter().map(|(number, _)| number).collect();
        for number in numbers {
            let epoch = far.epoch;
            far.links.update(segment, number, |link| link.epoch = epoch)?;
        }
        Ok(far)
    }

    pub fn with(port: Box<dyn Port + Send>) -> Far {
        Far { port: Some(Faulty::new(port, Faults::default(), 0, monotonic_ns)), ..Far::default() }
    }

    pub fn take_port(&mut self) -> Option<Way> {
        self.port.take()
    }

    pub fn port(&self) -> Option<&Way> {
        self.port.as_ref()
    }

    /// Numbers of operations: none is used twice, not even after a crash.
    fn next_id(&mut self) -> u64 {
        self.id += 1;
        self.id
    }

    fn end(&mut self, connection: u32) -> &mut End {
        self.ends.entry(connection).or_default()
    }

    fn know_peer(&mut self, link: u32, peer: u32, number: u32) {
        self.by_peer.insert((link, peer), number);
    }

    fn forget_peer(&mut self, link: u32, peer: u32) {
        self.by_peer.remove(&(link, peer));
    }

    /// Answer what a peer said, unless it leaves too much unanswered already.
    fn answer(&mut self, link: u32, item: Item) {
        if self.lines.get(&link).is_some_and(|line| line.control.len() < QUEUED) {
            self.queue(link, item);
        }
    }

    /// Have something sent over a link, as soon as it is permanent that it is to be sent.
    fn queue(&mut self, link: u32, item: Item) {
        if let Some(line) = self.lines.get_mut(&link) {
            line.control.push_back(item);
        }
        self.rouse(link);
    }

    /// A line has something to do.
    fn rouse(&mut self, link: u32) {
        if let Some(line) = self.lines.get_mut(&link) {
            if !line.ready {
                line.ready = true;
                self.ready.push_back(link);
            }
        }
    }

    /// Whether there is something to do now, and if not, when.
    pub fn rest(&mut self, now: Nanos) -> Option<Nanos> {
        if self.burst.left() || self.eager() {
            return None;
        }
        if !self.port.as_mut().is_none_or(|port| port.arm()) || !self.wires.arm() {
            return None;
        }
        let timer = self.wheel.as_ref().and_then(Wheel::next);
        let late = self.port.as_ref().and_then(Faulty::due);
        let next = timer.into_iter().chain(late).min().unwrap_or(Nanos::MAX);
        self.slept_at = now;
        (next > now).then_some(next)
    }

    /// Whether there is something to send that a port would take.
    pub fn eager(&self) -> bool {
        self.ready.len() > self.blocked
    }

    pub fn wake(&mut self) {
        self.woke_at = monotonic_ns();
        if let Some(port) = &mut self.port {
            port.disarm();
        }
        self.wires.disarm();
    }

    pub fn say(&mut self) -> Option<Vec<u8>> {
        self.said.pop_front()
    }

    /// The stream's row, made for `owner` if there is none. Raises `Full`.
    fn stream(&mut self, segment: &mut Segment, owner: u64, connection: u32, stream: u16) -> Result<(u32, Stream)> {
        if let Some(row) = self.by_stream.get(&(connection, stream)).copied() {
            if let Some(found) = self.streams.get(row) {
                return Ok((row, *found));
            }
        }
        let made = Stream { owner, connection, stream, out: 0, next: 0 };
        let row = self.streams.insert(segment, made)?;
        self.by_stream.insert((connection, stream), row);
        self.end(connection).streams.push(stream);
        Ok((row, made))
    }

    /// Remember how an operation of the peer ended. Raises `Full`.
    fn remember(&mut self, segment: &mut Segment, ending: Ending) -> Result<()> {
        let row = self.endings.insert(segment, ending)?;
        self.end(ending.connection).endings(ending.part).insert((ending.id, ending.part), row);
        Ok(())
    }

    fn remembered(&self, connection: u32, id: u64, part: u32) -> Option<Ending> {
        let end = self.ends.get(&connection)?;
        let endings = if part == LARGE { &end.finished } else { &end.endings };
        self.endings.get(*endings.get(&(id, part))?).copied()
    }

    /// Forget how operations below `floor` ended, or large messages: the peer knows.
    fn forget(&mut self, segment: &mut Segment, connection: u32, floor: u64, large: bool) -> Result<()> {
        let Some(end) = self.ends.get_mut(&connection) else { return Ok(()) };
        let endings = if large { &mut end.finished } else { &mut end.endings };
        while let Some(entry) = endings.first_entry().filter(|entry| entry.key().0 < floor) {
            self.endings.remove(segment, entry.remove())?;
        }
        Ok(())
    }
}
