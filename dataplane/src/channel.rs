//! One end of a channel as two halves, `Tx` and `Rx`, over what they share (`core`).
//!
//! The way of a message: `Tx` writes it into its ring (inline) or its pool (by reference) and publishes; `Rx` at the
//! other end copies the descriptor once, checks it, and takes the payload out or lends it. Nothing here waits:
//! operations say `Full` or `None`, and the waiting loops (Python face, poller, engine) arm and sleep.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

pub use crate::core::{clear_longest_wait, init_header, set_state, Core, Grant, Role, State, RIGHT_RECV, RIGHT_SEND};
use crate::core::{count, lock};
use crate::error::{Error, Fault, Result};
use crate::layout::{self, Header, PoolRef, INLINE_MAX};
use crate::ring::{take_down, Consumer, Inline, Memory, Producer};
use crate::ringmem::RingMemory;
use crate::segment::Mapping;
use crate::stats;
use crate::sync;

/// Open this end of a granted channel. Checks the header against the grant.
pub fn open(grant: &Grant<'_>) -> Result<(Arc<Core>, Tx, Rx)> {
    let core = Core::open(grant)?;
    let mem = |direction| RingMemory::new(&core.ring, core.slots, direction);
    let tx = Tx {
        mem: mem(core.own_direction()),
        core: core.clone(),
        producer: Producer::new(),
        stalled: None,
        deferred: false,
        counted: [0; 2],
    };
    let rx = Rx {
        mem: mem(core.peer_direction()),
        core: core.clone(),
        consumer: Consumer::new(),
        crowd: Crowd::default(),
        waits_since: None,
        counted: [0; 2],
    };
    Ok((core, tx, rx))
}

/// The sending half.
pub struct Tx {
    mem: RingMemory,
    core: Arc<Core>,
    producer: Producer,
    /// What there was when something last did not fit: an engine then waits for more of it, not for messages.
    stalled: Option<Stall>,
    /// Nothing is published but by a commit.
    deferred: bool,
    /// Messages and bytes sent at the last commit.
    counted: [u64; 2],
}

#[derive(Clone, Copy)]
struct Stall {
    /// Free slots of the ring.
    slots: u64,
    /// `Allocations::freed`: whoever takes returned payloads in (statistics do as well), the count tells.
    freed: u64,
}

/// Pool memory that the sender fills before it sends it.
#[derive(Clone, Copy, Debug)]
pub struct LoanRef {
    pub place: PoolRef,
    pub len: usize,
}

impl Tx {
    /// Begin a burst.
    #[inline]
    pub fn check(&self) -> Result<()> {
        self.core.check()?;
        if self.core.role == Role::Client && self.core.rights & RIGHT_SEND == 0 {
            return Err(Error::Denied("send"));
        }
        if self.core.role == Role::Server && self.core.rights & RIGHT_RECV == 0 {
            return Err(Error::Denied("recv"));
        }
        Ok(())
    }

    /// Slots that can be written now.
    pub fn slots_free(&mut self) -> Result<u64> {
        let capacity = self.mem.capacity();
        self.producer.room(&self.mem, capacity).map_err(|fault| self.core.fail(fault))
    }

    /// Make sure of `slots` slots, or say `Full`.
    #[inline]
    pub fn reserve(&mut self, slots: u64) -> Result<()> {
        match self.producer.room(&self.mem, slots) {
            Ok(room) if room >= slots && !self.core.paused_now() => {
                self.stalled = None;
                Ok(())
            }
            Ok(room) => {
                self.stall(room);
                Err(Error::Full)
            }
            Err(fault) => Err(self.core.fail(fault)),
        }
    }

    #[cold]
    fn stall(&mut self, slots: u64) {
        self.stalled = Some(Stall { slots, freed: lock(&self.core.allocations).freed() });
    }

    /// Messages of any inline length that are sure to fit now. None at all marks this half as stalled.
    pub fn room(&mut self) -> Result<u64> {
        let room = self.slots_free()?;
        if room < layout::MAX_SLOTS_PER_MESSAGE {
            self.stall(room);
        }
        Ok(room / layout::MAX_SLOTS_PER_MESSAGE)
    }

    pub fn stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// Ask to be woken when more room comes than there was at the stall, in the ring or the pool; false: it has come.
    pub fn arm_stalled(&mut self, how: u32) -> Result<bool> {
        let announced = self.raise(how);
        sync::settle(announced);
        let still = self.still_stalled()?;
        if !still {
            self.lower();
        }
        Ok(still)
    }

    /// Raise the armed word only: `sync::settle` with what this returns, and another look, must follow before anybody sleeps.
    pub fn raise(&mut self, how: u32) -> bool {
        self.producer.raise(&self.mem, how)
    }

    pub fn lower(&self) {
        self.mem.room_armed().swap(crate::ring::DISARMED, Ordering::AcqRel);
    }

    /// Whether nothing came back since the stall. When something did, the stall is over.
    pub fn still_stalled(&mut self) -> Result<bool> {
        let slots = self.slots_free()?;
        self.collect()?;
        let freed = lock(&self.core.allocations).freed();
        let still = self.stalled.is_some_and(|stall| slots <= stall.slots && freed == stall.freed);
        if !still {
            self.stalled = None;
        }
        Ok(still)
    }

    fn collect(&self) -> Result<()> {
        let core = &self.core;
        lock(&core.allocations).collect(&core.ring, core.slots, core.own_direction()).map_err(|fault| core.fail(fault))
    }

    /// Put a message into the burst: inline when it fits, else copied into the pool. `Full` leaves nothing behind.
    #[inline]
    pub fn put(&mut self, tag: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() > INLINE_MAX {
            return self.put_large(tag, bytes);
        }
        self.reserve(layout::inline_slots(bytes.len()))?;
        self.put_reserved(tag, bytes);
        Ok(())
    }

    /// Put an inline message for whose slots `reserve` was called: a pause since then does not hold it.
    #[inline]
    pub fn put_reserved(&mut self, tag: u64, bytes: &[u8]) {
        self.producer.put_inline(&self.mem, tag, bytes);
        count(&self.core.counters.sent, 1);
        count(&self.core.counters.sent_bytes, bytes.len() as u64);
    }

    /// Put as many inline messages of `size` bytes from `records` into the burst as fit now (some: publish, and go on); 0 is
    /// `Full`. `size` is at most `INLINE_MAX`.
    pub fn put_packed(&mut self, tag: u64, records: &[u8], size: usize) -> Result<usize> {
        self.reserve(layout::inline_slots(size))?;
        let put = self.producer.put_packed(&self.mem, tag, records, size).map_err(|fault| self.core.fail(fault))?;
        count(&self.core.counters.sent, put as u64);
        count(&self.core.counters.sent_bytes, (put * size) as u64);
        Ok(put)
    }

    fn put_large(&mut self, tag: u64, bytes: &[u8]) -> Result<()> {
        self.reserve(1)?;
        let loan = self.loan(bytes.len())?;
        match self.core.own_pool() {
            Some(pool) => pool.write(loan.place.offset as usize, bytes),
            None => return Err(Error::Size { len: bytes.len(), max: INLINE_MAX }),
        }
        self.put_loan_reserved(tag, loan);
        Ok(())
    }

    /// Memory of the pool to fill. `Full` when it is exhausted for now, `Size` when it could never hold `len`.
    pub fn loan(&mut self, len: usize) -> Result<LoanRef> {
        let core = &self.core;
        let mut allocations = lock(&core.allocations);
        if allocations.never(len) {
            return Err(Error::Size { len, max: allocations.largest().max(INLINE_MAX) });
        }
        let mut place = allocations.allocate(len);
        if place.is_none() {
            // Only now: what has come back is taken in by the batch, for it lies on a line that the consumer writes.
            allocations.collect(&core.ring, core.slots, core.own_direction()).map_err(|fault| core.fail(fault))?;
            place = allocations.allocate(len);
        }
        drop(allocations);
        match place {
            Some(place) => Ok(LoanRef { place, len }),
            None => {
                let slots = self.slots_free()?;
                self.stall(slots);
                Err(Error::Full)
            }
        }
    }

    /// Put a filled loan into the burst. One that was lent before another process served is of no use any more: `Closed`.
    pub fn put_loan(&mut self, tag: u64, loan: LoanRef) -> Result<()> {
        self.reserve(1)?;
        if self.deferred && !lock(&self.core.allocations).is_out(loan.place.token) {
            return Err(Error::Closed);
        }
        self.put_loan_reserved(tag, loan);
        Ok(())
    }

    /// Put a filled loan for whose slot `reserve` was called: a pause since then does not hold it.
    pub fn put_loan_reserved(&mut self, tag: u64, loan: LoanRef) {
        if self.deferred {
            lock(&self.core.allocations).sent(loan.place.token, self.producer.tail());
        }
        self.producer.put_pooled(&self.mem, tag, loan.len, loan.place);
        count(&self.core.counters.sent, 1);
        count(&self.core.counters.sent_bytes, loan.len as u64);
    }

    /// End the burst: one store, and a bell if the other side sleeps. In a ledger, its commit does that.
    #[inline]
    pub fn publish(&mut self) {
        if !self.deferred {
            self.publish_now();
        }
    }

    #[inline]
    fn publish_now(&mut self) {
        let wake = self.producer.publish(&self.mem);
        self.core.ring_peer(self.mem.data_armed(), wake);
    }

    pub fn armed_word(&self) -> &AtomicU32 {
        self.mem.room_armed()
    }

    /// Whether anything was sent since the last commit.
    #[inline]
    pub(crate) fn touched(&self) -> bool {
        self.producer.tail() != self.producer.published()
    }

    /// Slots ever written.
    pub(crate) fn tail(&self) -> u64 {
        self.producer.tail()
    }

    /// After a commit: let the peer see it.
    pub(crate) fn keep(&mut self) {
        lock(&self.core.allocations).keep();
        self.counted = self.counts();
        self.publish_now();
    }

    /// As if nothing had been sent since the last commit. A stall stays one if the peer has anything to make room of.
    pub(crate) fn take_back(&mut self) {
        self.producer.rewind();
        let [sent, bytes] = self.counted;
        self.core.counters.sent.store(sent, Ordering::Relaxed);
        self.core.counters.sent_bytes.store(bytes, Ordering::Relaxed);
        let mut allocations = lock(&self.core.allocations);
        allocations.take_back();
        let waits = allocations.out() > 0;
        drop(allocations);
        if self.stalled.take().is_some() {
            match self.slots_free() {
                Ok(room) if waits || room < layout::MAX_SLOTS_PER_MESSAGE => self.stall(room),
                _ => {}
            }
        }
    }

    /// Send nothing but by commits, and nothing at all before `resume`.
    pub(crate) fn defer(&mut self) {
        self.deferred = true;
    }

    /// Go on after the first `tail` slots, which are for good, with what they carried; they are published again.
    pub(crate) fn resume(&mut self, tail: u64) -> Result<()> {
        let core = &self.core;
        let outcome = self
            .producer
            .resume(&self.mem, tail)
            .and_then(|()| lock(&core.allocations).resume(&core.ring, core.slots, core.own_direction(), tail));
        outcome.map_err(|fault| core.fail(fault))?;
        (self.stalled, self.counted) = (None, self.counts());
        core.ring_peer(self.mem.data_armed(), take_down(self.mem.data_armed(), true));
        Ok(())
    }

    /// Somebody else is going to send.
    pub(crate) fn retire(&mut self) {
        self.producer.retire(&self.mem);
        self.stalled = None;
    }

    fn counts(&self) -> [u64; 2] {
        [&self.core.counters.sent, &self.core.counters.sent_bytes].map(|counter| counter.load(Ordering::Relaxed))
    }

    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }
}

/// The receiving half.
pub struct Rx {
    mem: RingMemory,
    core: Arc<Core>,
    consumer: Consumer,
    crowd: Crowd,
    /// The client waits, since this time (CLOCK_MONOTONIC, ns).
    waits_since: Option<u64>,
    /// Messages and bytes received at the last commit.
    counted: [u64; 2],
}

/// Whether a spinning receiver is in its sender's way. One that is faster finds the ring empty after every message or two
/// and looks at once again: each look takes the line away on which the sender is about to publish, and the rate falls to that
/// of line transfers. Then it is better to leave the line alone until a few messages have come together.
#[derive(Default)]
struct Crowd {
    /// Times in a row that the ring was empty after a few messages and nothing had been sent in return.
    streak: u32,
    received: u64,
    sent: u64,
}

const CROWD_STREAK: u32 = 64;
const CROWD_MESSAGES: u64 = 4;

impl Rx {
    /// Begin a burst. A peer that is gone is reported only when everything it sent has been received, unless the kernel
    /// shut the gate: then nothing more is, whatever the state word says.
    #[inline]
    pub fn check(&mut self) -> Result<()> {
        match self.core.check() {
            Ok(()) => Ok(()),
            Err(Error::Gone) if self.core.gate_open() && self.pending()? => Ok(()),
            Err(error) => Err(error),
        }
    }

    #[cold]
    fn pending(&mut self) -> Result<bool> {
        let available = self.consumer.available(&self.mem).map_err(|fault| self.core.fail(fault))?;
        Ok(available > 0)
    }

    /// The next message's checked header. When there is none, everything consumed is given back.
    #[inline]
    pub fn peek(&mut self) -> Result<Option<Header>> {
        match self.consumer.peek(&self.mem) {
            Ok(Some(header)) => {
                if self.core.role == Role::Server && self.core.rights & RIGHT_SEND == 0 {
                    return Err(self.core.fail(Fault::Right));
                }
                if header.pooled && header.len > self.core.peer_pool().map_or(0, Mapping::len) {
                    return Err(self.core.fail(Fault::Length));
                }
                if self.waits_since.is_some() {
                    self.waited();
                }
                Ok(Some(header))
            }
            Ok(None) => {
                self.release();
                Ok(None)
            }
            Err(fault) => Err(self.core.fail(fault)),
        }
    }

    #[inline]
    fn step(&mut self, header: Header) {
        self.consumer.advance(header.slots);
        count(&self.core.counters.received, 1);
        count(&self.core.counters.received_bytes, header.len as u64);
        let wake = self.consumer.release_some(&self.mem);
        self.core.ring_peer(self.mem.room_armed(), wake);
    }

    /// Copy the payload of the message that `peek` showed into `out` (of its length) and step over it.
    #[inline]
    pub fn take_into(&mut self, header: Header, out: &mut [u8]) -> Result<()> {
        if header.pooled {
            let place = self.take_pooled(header)?;
            if let Some(pool) = self.core.peer_pool() {
                pool.read(place.offset as usize, out);
            }
            self.core.give_back(place.token);
            return Ok(());
        }
        self.consumer.read_inline(&self.mem, out);
        self.step(header);
        Ok(())
    }

    /// Pass up to `limit` inline messages that are there now to `take`, until it says no; how many. What ends them, if
    /// anything does, is what `peek` shows.
    #[inline]
    pub fn take_inline(&mut self, limit: usize, mut take: impl FnMut(Inline<'_, RingMemory>) -> bool) -> Result<usize> {
        if self.peek()?.is_none() {
            return Ok(0);
        }
        let (mut taken, mut bytes) = (0, 0);
        loop {
            let more = self.consumer.take_inline(&self.mem, limit - taken, &mut take);
            let (more, size) = more.map_err(|fault| self.core.fail(fault))?;
            let wake = self.consumer.release_some(&self.mem);
            self.core.ring_peer(self.mem.room_armed(), wake);
            taken += more;
            bytes += size;
            if more == 0 || taken == limit {
                break;
            }
        }
        count(&self.core.counters.received, taken as u64);
        count(&self.core.counters.received_bytes, bytes as u64);
        Ok(taken)
    }

    /// Copy inline messages of exactly `size` bytes into `out`, as many as there are now; how many. What ends them, if
    /// anything does, is what `peek` shows.
    pub fn take_packed(&mut self, out: &mut [u8], size: usize) -> Result<usize> {
        // The checks of a message that need not be made for each of them: `peek` makes them for the first.
        if size > INLINE_MAX || self.peek()?.is_none() {
            return Ok(0);
        }
        let mut taken = 0;
        loop {
            let more = self.consumer.take_packed(&self.mem, &mut out[taken * size..], size);
            let more = more.map_err(|fault| self.core.fail(fault))?;
            let wake = self.consumer.release_some(&self.mem);
            self.core.ring_peer(self.mem.room_armed(), wake);
            taken += more;
            if more == 0 || (taken + 1) * size > out.len() {
                break;
            }
        }
        count(&self.core.counters.received, taken as u64);
        count(&self.core.counters.received_bytes, (taken * size) as u64);
        Ok(taken)
    }

    /// Step over a pooled message and keep its payload, until `Core::give_back` of its token.
    pub fn take_pooled(&mut self, header: Header) -> Result<PoolRef> {
        let place = self.consumer.read_pool_ref(&self.mem);
        let limit = self.core.peer_pool().map_or(0, Mapping::len) as u64;
        if place.offset > limit || header.len as u64 > limit - place.offset {
            return Err(self.core.fail(Fault::Offset));
        }
        self.core.claim(place.token, self.consumer.head())?;
        self.step(header);
        Ok(place)
    }

    /// The client begins to wait for a message, or goes on to: the length of its waits is measured, as long as it really
    /// waits (nothing on the way of a message reads a clock).
    pub fn begin_wait(&mut self) {
        if self.core.role == Role::Client && self.waits_since.is_none() {
            self.waits_since = Some(stats::monotonic_ns());
        }
    }

    /// The wait is over, with a message or without.
    #[cold]
    pub fn waited(&mut self) {
        let Some(since) = self.waits_since.take() else { return };
        let since = since.max(self.core.ring.u64_at(layout::OFF_WAITS_SINCE).load(Ordering::Acquire));
        let waited = stats::monotonic_ns().saturating_sub(since);
        let longest = self.core.ring.u64_at(layout::OFF_LONGEST_WAIT);
        if waited > longest.load(Ordering::Relaxed) {
            longest.store(waited, Ordering::Relaxed);
        }
    }

    /// Before spinning on an empty ring: whether to leave it alone for a moment first (see `Crowd`). A reply in between, as in
    /// a round trip, never crowds.
    pub fn crowding(&mut self) -> bool {
        let received = self.core.counters.received.load(Ordering::Relaxed);
        let sent = self.core.counters.sent.load(Ordering::Relaxed);
        let few = received.wrapping_sub(self.crowd.received) <= CROWD_MESSAGES && sent == self.crowd.sent;
        let streak = if few { self.crowd.streak.saturating_add(1) } else { 0 };
        self.crowd = Crowd { streak, received, sent };
        streak > CROWD_STREAK
    }

    /// The next message took its time: nobody is crowded.
    pub fn uncrowd(&mut self) {
        self.crowd.streak = 0;
    }

    /// Give all consumed slots back to the sender.
    #[inline]
    pub fn release(&mut self) {
        let wake = self.consumer.release(&self.mem);
        self.core.ring_peer(self.mem.room_armed(), wake);
    }

    /// Ask to be woken by the next message; false when there is one now.
    pub fn arm(&mut self, how: u32) -> Result<bool> {
        self.release();
        self.begin_wait();
        let armed = self.consumer.arm(&self.mem, how).map_err(|fault| self.core.fail(fault))?;
        if armed || !self.core.paused() {
            return Ok(armed);
        }
        // What a pause holds back is not there yet; the end of the pause wakes everybody.
        let announced = self.raise(how);
        sync::settle(announced);
        let still = self.core.paused();
        if !still {
            self.lower();
        }
        Ok(still)
    }

    /// Raise the armed word only, as `Tx::raise`.
    pub fn raise(&mut self, how: u32) -> bool {
        self.release();
        self.consumer.raise(&self.mem, how)
    }

    pub fn lower(&self) {
        self.mem.data_armed().swap(crate::ring::DISARMED, Ordering::AcqRel);
    }

    /// Whether there is nothing to receive and nothing to say.
    pub fn idle(&mut self) -> bool {
        (matches!(self.peek(), Ok(None)) || self.core.paused()) && self.check().is_ok()
    }

    pub fn armed_word(&self) -> &AtomicU32 {
        self.mem.data_armed()
    }

    /// Whether anything was received or given back since the last commit.
    #[inline]
    pub(crate) fn touched(&self) -> bool {
        self.consumer.head() != self.consumer.kept() || self.core.returning()
    }

    /// Slots ever consumed, and tokens ever given back, with those that the commit under way gives back.
    pub(crate) fn write(&mut self) -> (u64, u64) {
        (self.consumer.head(), self.core.write_returns())
    }

    /// After a commit: what was consumed may be given back, and what was given back is.
    pub(crate) fn keep(&mut self) {
        self.consumer.keep();
        self.counted = self.counts();
        let wake = self.consumer.release_some(&self.mem);
        self.core.ring_peer(self.mem.room_armed(), wake);
        self.core.publish_returns();
    }

    /// As if nothing had been received since the last commit. Payloads that came before and were released meanwhile stay so.
    pub(crate) fn take_back(&mut self) {
        self.rewind(self.consumer.kept());
        let [received, bytes] = self.counted;
        self.core.counters.received.store(received, Ordering::Relaxed);
        self.core.counters.received_bytes.store(bytes, Ordering::Relaxed);
    }

    fn rewind(&mut self, head: u64) {
        self.consumer.rewind(head);
        self.core.returns().rewind(head);
    }

    /// Have the last `count` messages since the last commit come again. False when there are not so many.
    pub fn unread(&mut self, count: usize) -> Result<bool> {
        let mut heads = Vec::new();
        let mut bytes = Vec::new();
        let mut at = self.consumer.kept();
        while at < self.consumer.head() {
            let header = self.consumer.look_back(&self.mem, at).map_err(|fault| self.core.fail(fault))?;
            heads.push(at);
            bytes.push(header.len as u64);
            at += header.slots;
        }
        if count > heads.len() {
            return Ok(false);
        }
        let first = heads.len() - count;
        if let Some(head) = heads.get(first) {
            self.rewind(*head);
            let counters = &self.core.counters;
            let less = |counter: &AtomicU64, by: u64| {
                counter.store(counter.load(Ordering::Relaxed).saturating_sub(by), Ordering::Relaxed);
            };
            less(&counters.received, count as u64);
            less(&counters.received_bytes, bytes[first..].iter().sum());
        }
        Ok(true)
    }

    /// Give nothing back but by commits, and nothing at all before `resume`.
    pub(crate) fn defer(&mut self) {
        self.consumer.keep();
    }

    /// Go on after the first `head` slots and `returned` tokens, which are for good; they are given back again.
    pub(crate) fn resume(&mut self, head: u64, returned: u64) -> Result<()> {
        let core = &self.core;
        let outcome = self.consumer.resume(&self.mem, head);
        let outcome = outcome.and_then(|()| core.resume_returns(head, returned));
        outcome.map_err(|fault| core.fail(fault))?;
        self.counted = self.counts();
        core.ring_room(take_down(self.mem.room_armed(), true));
        Ok(())
    }

    /// Somebody else is going to receive.
    pub(crate) fn retire(&mut self) {
        self.release();
        self.consumer.retire(&self.mem);
    }

    fn counts(&self) -> [u64; 2] {
        [&self.core.counters.received, &self.core.counters.received_bytes].map(|count| count.load(Ordering::Relaxed))
    }

    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }
}
