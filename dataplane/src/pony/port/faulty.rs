//! Any port, and a bad network behind it: for tests and measurements. The same seed, packets and clock give the same
//! faults, whatever else happens.
//!
//! Faults are those of the way out; a pair of ports has two. Packets are kept here until they are due, and move on with
//! `flush`: whoever sleeps must wake by `due`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::BorrowedFd;

use super::{Address, Port, Result, Statistics};

/// Chances are from 0 to 1 for each packet, times in nanoseconds. The default is a perfect network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub loss: f64,
    pub duplicate: f64,
    /// One bit of the packet is another.
    pub corrupt: f64,
    /// A packet that is late by up to `lateness`, so that others overtake it.
    pub reorder: f64,
    pub lateness: u64,
    /// Of every packet.
    pub delay: u64,
    /// Bytes per second; 0 is no limit.
    pub rate: u64,
    /// Bytes that wait for the rate before packets are lost at the tail; 0 is no limit.
    pub queue: u64,
    /// Of every `stall_every` ns, nothing moves in the last `stall`; 0 is never.
    pub stall_every: u64,
    pub stall: u64,
}

/// What happened to packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Toll {
    pub lost: u64,
    pub duplicated: u64,
    pub corrupted: u64,
    pub reordered: u64,
    /// Lost at the tail of the queue.
    pub overflowed: u64,
}

/// A packet on its way. Ordered by when it is due, then by when it came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    due: u64,
    number: u64,
    bytes: Vec<u8>,
    to: Address,
    path: u8,
}

pub struct Faulty<P, C> {
    inner: P,
    clock: C,
    faults: Faults,
    random: Random,
    flying: BinaryHeap<Reverse<Flying>>,
    number: u64,
    /// When the link has sent all that it was given, ns.
    link_free: u64,
    scratch: Vec<u8>,
    /// Nothing happens to packets, and none is kept: they go the way that they would go without this.
    perfect: bool,
    toll: Toll,
}

impl Faults {
    fn none(&self) -> bool {
        let chances = [self.loss, self.duplicate, self.corrupt, self.reorder];
        chances.iter().all(|chance| *chance <= 0.0) && self.delay.max(self.rate).max(self.stall) == 0
    }
}

impl<P: Port, C: Fn() -> u64> Faulty<P, C> {
    /// `clock` tells nanoseconds from any start.
    pub fn new(inner: P, faults: Faults, seed: u64, clock: C) -> Self {
        let scratch = vec![0; inner.mtu()];
        let (flying, random, toll) = (BinaryHeap::new(), Random(seed), Toll::default());
        let perfect = faults.none();
        Faulty { inner, clock, faults, random, flying, number: 0, link_free: 0, scratch, perfect, toll }
    }

    /// Other faults from now on, for what is pushed from now on.
    pub fn set(&mut self, faults: Faults, seed: u64) {
        (self.faults, self.random) = (faults, Random(seed));
        self.perfect = faults.none() && self.flying.is_empty();
    }

    pub fn toll(&self) -> Toll {
        self.toll
    }

    pub fn inner(&self) -> &P {
        &self.inner
    }

    /// When the next packet wants to move on; None: none is here.
    pub fn due(&self) -> Option<u64> {
        self.flying.peek().map(|Reverse(next)| self.after_stall(next.due))
    }

    /// `time`, or the end of the stall that it is in.
    fn after_stall(&self, time: u64) -> u64 {
        let Faults { stall_every, stall, .. } = self.faults;
        if stall_every == 0 || time % stall_every < stall_every.saturating_sub(stall) {
            return time;
        }
        (time / stall_every + 1) * stall_every
    }

    /// When a packet of `len` bytes that enters the link now has left it; None: the queue is full.
    fn through_link(&mut self, now: u64, len: usize) -> Option<u64> {
        let Faults { rate, queue, .. } = self.faults;
        if rate == 0 {
            return Some(now);
        }
        let start = self.link_free.max(now);
        let waiting = u128::from(start - now) * u128::from(rate) / 1_000_000_000;
        if queue > 0 && waiting + len as u128 > u128::from(queue) {
            return None;
        }
        self.link_free = start + (len as u128 * 1_000_000_000 / u128::from(rate)) as u64;
        Some(self.link_free)
    }

    fn launch(&mut self, due: u64, bytes: Vec<u8>, to: Address, path: u8) {
        self.flying.push(Reverse(Flying { due, number: self.number, bytes, to, path }));
        self.number += 1;
    }
}

impl<P: Port, C: Fn() -> u64> Port for Faulty<P, C> {
    fn mtu(&self) -> usize {
        self.inner.mtu()
    }

    fn frame(&mut self) -> Option<&mut [u8]> {
        if self.perfect {
            return self.inner.frame();
        }
        Some(&mut self.scratch)
    }

    fn push(&mut self, len: usize, to: Address, path: u8) {
        if self.perfect {
            return self.inner.push(len, to, path);
        }
        assert!(len > 0 && len <= self.scratch.len());
        // Each packet draws the same numbers, so that one fault more or less leaves the others where they are.
        let [lost, twice, wrong, late] = [(); 4].map(|()| self.random.chance());
        let (bit, lateness) = (self.random.below(len as u64 * 8), self.random.below(self.faults.lateness));
        if lost < self.faults.loss {
            self.toll.lost += 1;
            return;
        }
        let now = (self.clock)();
        let Some(left) = self.through_link(now, len) else {
            self.toll.overflowed += 1;
            return;
        };
        let mut bytes = self.scratch[..len].to_vec();
        let mut due = left + self.faults.delay;
        if wrong < self.faults.corrupt {
            self.toll.corrupted += 1;
            bytes[bit as usize / 8] ^= 1 << (bit % 8);
        }
        if late < self.faults.reorder {
            self.toll.reordered += 1;
            due += lateness;
        }
        if twice < self.faults.duplicate {
            self.toll.duplicated += 1;
            self.launch(due, bytes.clone(), to, path);
        }
        self.launch(due, bytes, to, path);
    }

    /// Hand on what is due, as far as the port behind has room.
    fn flush(&mut self) -> Result<()> {
        if self.perfect {
            return self.inner.flush();
        }
        let now = (self.clock)();
        while self.due().is_some_and(|due| due <= now) && self.after_stall(now) == now {
            let Some(frame) = self.inner.frame() else {
                break;
            };
            if let Some(Reverse(packet)) = self.flying.pop() {
                frame[..packet.bytes.len()].copy_from_slice(&packet.bytes);
                self.inner.push(packet.bytes.len(), packet.to, packet.path);
            }
        }
        self.perfect = self.faults.none() && self.flying.is_empty();
        self.inner.flush()
    }

    fn receive(&mut self) -> Result<usize> {
        self.inner.receive()
    }

    fn packet(&self, index: usize) -> (&[u8], Address) {
        self.inner.packet(index)
    }

    fn waited(&self, index: usize) -> u64 {
        self.inner.waited(index)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }

    fn blocked(&self) -> Option<BorrowedFd<'_>> {
        self.inner.blocked()
    }

    fn arm(&mut self) -> bool {
        self.inner.arm()
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }

    fn statistics(&self) -> Statistics {
        self.inner.statistics()
    }
}

/// SplitMix64: one state word, any seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn chance(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From 0 to below `limit`; 0 when that is 0. Drawn in any case.
    fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }
}
