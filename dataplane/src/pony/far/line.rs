//! The way to one other host: its flow, and what waits to go over it. Nothing of it outlives the engine's process; `resync`
//! fills it again from the state.

use std::collections::VecDeque;

use super::frame::{Ends, Part, REPLY, REQUEST};
use super::rows::{Attached, Link};
use super::seal::Seal;
use crate::pony::flow::{Flow, Nanos, Settings};
use crate::stats::monotonic_ns;

/// How long keys serve, in ns: an hour.
const KEYS_SERVE: Nanos = 3_600_000_000_000;
/// Parts of operations that are asked for at a time.
pub const PARTS: u32 = 512;

/// Something that a packet carries. What it says is looked up when the packet is written, and again when it is written
/// once more: rows are named with what tells them from later ones of the same number.
#[derive(Clone, Copy, Debug)]
pub enum Item {
    Open(u32),
    Accept(u32),
    Refuse { to: u32, cookie: u32, status: u8 },
    Close(Ends),
    Gone(Ends),
    Alive(u32),
    Credit(u32),
    Message { row: u32, id: u64, piece: u32 },
    Datagram { slot: u32 },
    Offer { row: u32, id: u64 },
    Grant { connection: u32, seq: u64, id: u64 },
    Piece { row: u32, id: u64, offset: u64, len: u32 },
    Finish { ends: Ends, seq: u64, status: u8, value: u64 },
    Request { row: u32, part: Part },
    Reply { slot: u32 },
}

/// What a packet under way carries.
#[derive(Default)]
pub struct Packet {
    pub items: Vec<Item>,
}

/// A request that is answered when its answer is written, or a datagram.
#[derive(Default)]
pub struct Slot {
    pub ends: Option<Ends>,
    pub part: Option<Part>,
    pub kind: u8,
    pub body: Vec<u8>,
    /// How it ended, if it was carried out already.
    pub ending: Option<(u8, u64)>,
}

/// Things with numbers that are used again.
pub struct Slab<T> {
    items: Vec<T>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { items: Vec::new(), free: Vec::new() }
    }
}

impl<T: Default> Slab<T> {
    pub fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.items.push(T::default());
            self.items.len() as u32 - 1
        })
    }

    pub fn give_back(&mut self, number: u32) {
        self.free.push(number);
    }

    pub fn used(&self) -> usize {
        self.items.len() - self.free.len()
    }

    pub fn at(&mut self, number: u32) -> &mut T {
        &mut self.items[number as usize]
    }

    pub fn get(&self, number: u32) -> &T {
        &self.items[number as usize]
    }
}

pub struct Line {
    pub flow: Flow,
    pub attached: Attached,
    pub seal: Option<Seal>,
    pub control: VecDeque<Item>,
    /// Large messages that the peer has a place for: row, id, next byte.
    pub bulk: VecDeque<(u32, u64, u64)>,
    /// Operations with parts that were not asked for yet: row, attempt, next part.
    pub asking: VecDeque<(u32, u32, u32)>,
    /// Parts that were asked for, and are not here.
    pub asked: u32,
    pub packets: Slab<Packet>,
    pub slots: Slab<Slot>,
    /// When the wheel looks at this line next.
    pub armed: Nanos,
    /// Whether it is in the list of those with something to do.
    pub ready: bool,
    /// Whether the last packet was one of bulk data.
    pub turn: bool,
    pub peer_epoch: Option<u32>,
    /// When the peer began anew last.
    pub restarted: Nanos,
    pub bad: u64,
    /// When its keys were agreed, as far as this process knows.
    pub since: Nanos,
}

impl Line {
    pub fn new(link: &Link, attached: Attached) -> Line {
        let settings = Settings {
            version: attached.version,
            algorithm: attached.algorithm,
            remote: attached.remote,
            epoch: link.epoch,
            first: first(link.epoch),
        };
        Line {
            flow: Flow::new(settings),
            attached,
            seal: attached.keys.map(|keys| Seal::new(&keys[0], &keys[1])),
            control: VecDeque::new(),
            bulk: VecDeque::new(),
            asking: VecDeque::new(),
            asked: 0,
            packets: Slab::default(),
            slots: Slab::default(),
            armed: Nanos::MAX,
            ready: false,
            turn: false,
            peer_epoch: None,
            restarted: 0,
            bad: 0,
            since: monotonic_ns(),
        }
    }

    /// Whether its keys have served for as long as they should.
    pub fn stale(&self, now: Nanos) -> bool {
        self.seal.is_some() && now.saturating_sub(self.since) > KEYS_SERVE
    }

    pub fn has_work(&self) -> bool {
        !self.control.is_empty() || !self.bulk.is_empty() || (!self.asking.is_empty() && self.asked < PARTS)
    }

    /// Bytes for frames in a packet.
    pub fn room(&self) -> usize {
        self.attached.room()
    }

    /// Bytes of a message in one packet, of a reply, of a request.
    pub fn message_chunk(&self) -> usize {
        self.room() - super::frame::MESSAGE
    }

    pub fn reply_chunk(&self) -> usize {
        self.room() - REPLY
    }

    pub fn request_chunk(&self) -> usize {
        self.room() - REQUEST
    }
}

/// Numbers of an epoch: above all those of earlier ones.
pub fn first(epoch: u32) -> u64 {
    u64::from(epoch) << 36
}
