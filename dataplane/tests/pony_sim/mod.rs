//! A virtual network with virtual time, and flows on it.

mod bulk;
pub mod end;
mod hostile;
pub mod link;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use end::{Books, End};
use link::{Link, Rng};
use snap_dataplane::pony::flow::{Algorithm, Header, Nanos, Settings, Version, MILLISECOND};

/// What a packet with payload weighs on a link: as one that fills its frame.
pub const FULL: usize = 4_096;

pub const SETTINGS: Settings =
    Settings { version: Version::Two, algorithm: Algorithm::Swift, remote: 0, epoch: 1, first: 1 };

enum Event {
    Wake(u32),
    /// Packet (in `packets`), to whom, how long it waited there.
    Arrive(u32, u32, Nanos),
}

pub struct World {
    pub now: Nanos,
    pub ends: Vec<End>,
    /// `books[i]`: of what end i sends.
    pub books: Vec<Books>,
    pub links: Vec<Link>,
    pub rng: Rng,
    pub events: u64,
    heap: BinaryHeap<Reverse<(Nanos, u64, u32)>>,
    slots: Vec<Event>,
    free_slots: Vec<u32>,
    packets: Vec<Vec<u8>>,
    free: Vec<u32>,
    scratch: Vec<u8>,
    seed: u64,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}, virtual time {} us", self.seed, self.now / 1_000);
        }
    }
}

impl World {
    pub fn new(seed: u64, links: Vec<Link>) -> World {
        World {
            // Soon the low 32 bits of the clock wrap.
            now: (1 << 32) - 10 * MILLISECOND,
            ends: Vec::new(),
            books: Vec::new(),
            links,
            rng: Rng(seed),
            events: 0,
            heap: BinaryHeap::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            packets: Vec::new(),
            free: Vec::new(),
            scratch: Vec::new(),
            seed,
        }
    }

    /// A flow between two new ends: the first has `tokens.0` to send on link `links.0`.
    pub fn flow(&mut self, settings: Settings, tokens: (usize, usize), links: (usize, usize), start: Nanos) -> u32 {
        let me = self.ends.len() as u32;
        self.ends.push(End::new(me + 1, links.0, settings, self.now + start));
        self.ends.push(End::new(me, links.1, settings, self.now + start));
        // Those who receive are on one host.
        self.ends[me as usize].ahead = self.rng.below(1 << 40);
        self.books.push(Books::new(tokens.0));
        self.books.push(Books::new(tokens.1));
        self.wake(me, self.now + start);
        self.wake(me + 1, self.now + start);
        me
    }

    fn schedule(&mut self, at: Nanos, event: Event) {
        let slot = match self.free_slots.pop() {
            Some(slot) => {
                self.slots[slot as usize] = event;
                slot
            }
            None => {
                self.slots.push(event);
                self.slots.len() as u32 - 1
            }
        };
        self.events += 1;
        self.heap.push(Reverse((at, self.events, slot)));
    }

    fn wake(&mut self, who: u32, at: Nanos) {
        let end = &mut self.ends[who as usize];
        if at < end.wake_at {
            end.wake_at = at;
            self.schedule(at, Event::Wake(who));
        }
    }

    fn buffer(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.packets.push(Vec::new());
            self.packets.len() as u32 - 1
        })
    }

    fn release(&mut self, buffer: u32) {
        self.packets[buffer as usize].clear();
        self.free.push(buffer);
    }

    pub fn pump(&mut self, who: u32) {
        let me = who as usize;
        for round in 0.. {
            assert!(round < 10_000, "it never stops sending");
            let buffer = self.buffer();
            let packet = &mut self.packets[buffer as usize];
            if !self.ends[me].next_packet(self.now, &mut self.books[me], packet) {
                self.release(buffer);
                break;
            }
            let (to, link) = (self.ends[me].peer, self.ends[me].link);
            let header = self.ends[me].flow.settings.version.header();
            let size = if packet.len() > header { FULL } else { header };
            let [first, second] = self.links[link].send(self.now, size, packet, &mut self.rng);
            if let Some((at, waits)) = second {
                let copy = self.buffer();
                let bytes = std::mem::take(&mut self.packets[buffer as usize]);
                self.packets[copy as usize].clone_from(&bytes);
                self.packets[buffer as usize] = bytes;
                self.schedule(at, Event::Arrive(copy, to, waits));
            }
            match first {
                Some((at, waits)) => self.schedule(at, Event::Arrive(buffer, to, waits)),
                None => self.release(buffer),
            }
        }
        if let Some(at) = self.ends[me].wants(self.now) {
            let at = at.max(self.now + 1);
            self.wake(who, at);
        }
    }

    pub fn restart(&mut self, who: u32) {
        let (me, peer) = (who as usize, self.ends[who as usize].peer as usize);
        let mut mine = std::mem::take(&mut self.books[me]);
        self.ends[me].restart(self.now, &mut mine, &mut self.books[peer]);
        self.books[me] = mine;
        // What its packets in the network carry comes once more in any case.
        for packet in &self.packets {
            if let Ok((header, bytes)) = Header::parse(packet) {
                if header.flow == who && header.carries() {
                    self.books[peer].excused[u64::from_le_bytes(bytes[..8].try_into().expect("is 8 bytes")) as usize] =
                        true;
                }
            }
        }
        self.pump(who);
    }

    /// One event; whether there was one.
    pub fn step(&mut self) -> bool {
        let Some(Reverse((at, _, slot))) = self.heap.pop() else { return false };
        self.now = at;
        let event = std::mem::replace(&mut self.slots[slot as usize], Event::Wake(0));
        self.free_slots.push(slot);
        match event {
            Event::Wake(who) => {
                // Another wake-up may have come earlier.
                if self.ends[who as usize].wake_at == at {
                    self.ends[who as usize].wake_at = Nanos::MAX;
                    self.pump(who);
                }
            }
            Event::Arrive(buffer, to, waits) => {
                let World { ends, books, packets, scratch, .. } = self;
                let end = &mut ends[to as usize];
                let theirs = &mut books[end.peer as usize];
                end.receive(at, &packets[buffer as usize], waits, theirs, scratch);
                self.release(buffer);
                self.pump(to);
            }
        }
        true
    }

    pub fn run_until(&mut self, end: Nanos) {
        while self.heap.peek().is_some_and(|next| next.0 .0 <= end) && self.step() {}
        self.now = self.now.max(end);
    }

    fn finished(&self) -> bool {
        self.books.iter().all(|books| books.finished == books.acked.len())
    }

    /// Until everything was acknowledged and nothing is under way; at most `limit` ns.
    pub fn finish(&mut self, limit: Nanos) {
        let end = self.now + limit;
        while self.step() {
            assert!(self.now < end, "not finished: {:?}", self.states());
        }
        assert!(self.finished(), "nothing more happens: {:?}", self.states());
        for (end, books) in self.ends.iter().zip(&self.books) {
            assert!(end.flow.idle() && end.flow.flying() == 0);
            assert_eq!(end.flow.deadline(), None);
            assert!(books.delivered.iter().all(|count| *count > 0));
        }
    }

    fn states(&self) -> Vec<String> {
        let state = |(end, books): (&End, &Books)| {
            format!("{} of {}, {:?}", books.finished, books.acked.len(), end.flow.counts)
        };
        self.ends.iter().zip(&self.books).map(state).take(4).collect()
    }

    pub fn report(&self, what: &str) {
        for (end, books) in self.ends.iter().zip(&self.books).take(1) {
            let counts = end.flow.counts;
            if counts.sent > 0 {
                println!(
                    "{what}: {} tokens in {} us: again {:.2} %, needless {:.2} %, {:?}, paths {}, window {:.2}",
                    books.acked.len(),
                    books.finished_at.saturating_sub(end.started_at) / 1_000,
                    counts.again as f64 * 100.0 / counts.sent.max(1) as f64,
                    end.flow.spurious() as f64 * 100.0 / counts.sent.max(1) as f64,
                    counts,
                    end.flow.path.changes,
                    end.flow.congestion_window(),
                );
            }
        }
    }
}
