//! Single-producer single-consumer ring of 64-byte slots, over memory that the other side may scribble on.
//!
//! Each side keeps its own index in private memory and only ever *writes* it to the shared one; the other side's
//! index is copied once, checked against what is possible, and cached until it is used up. A burst is published by
//! one store. A message takes one slot or, inline and longer than 48 bytes, the following ones too.
//!
//! Sleeping: the waiter arms a word, fences, looks again, and only then sleeps; the other side publishes, fences,
//! and rings if the word is armed. One of the two always sees the other (Dekker), which `tests/loom_ring.rs` checks. Armed
//! words change by read-modify-write only: both sides write them.

use crate::error::Fault;
use crate::layout::{self, Header, PoolRef, INLINE_FIRST, PREFIX, SLOT};
use crate::sync::{full_fence, light_fence, settle, AtomicU32, AtomicU64, Ordering};

/// An armed word's values: nobody waits, a thread waits by futex on the word itself, or an eventfd is to be written.
pub const DISARMED: u32 = 0;
pub const ARMED_FUTEX: u32 = 1;
pub const ARMED_EVENT: u32 = 2;

/// Memory of one direction of a channel.
pub trait Memory {
    /// Slots; a power of two.
    fn capacity(&self) -> u64;
    fn tail(&self) -> &AtomicU64;
    fn head(&self) -> &AtomicU64;
    /// Armed by the consumer that waits for messages.
    fn data_armed(&self) -> &AtomicU32;
    /// Armed by the producer that waits for room.
    fn room_armed(&self) -> &AtomicU32;
    /// Whether the consumer (the producer) sleeps now and then: its peer then fences after every publication. Unannounced
    /// sleep is safe as well, but each time costs the sleeper a barrier on every processor. The default is a memory whose
    /// peers always fence.
    fn data_sleepy(&self) -> bool {
        true
    }
    fn room_sleepy(&self) -> bool {
        true
    }
    fn announce_data(&self, _sleepy: bool) {}
    fn announce_room(&self, _sleepy: bool) {}
    /// The 16-byte prefix of a slot. Index is masked.
    fn write_prefix(&self, index: u64, words: [u64; 2]);
    fn read_prefix(&self, index: u64) -> [u64; 2];
    /// Copy at a byte position of the ring, wrapping at its end. `bytes` is at most the ring's size.
    fn write(&self, position: u64, bytes: &[u8]);
    fn read(&self, position: u64, out: &mut [u8]);
    /// Hints, nothing else: this slot is going to be written, or read.
    fn expect_write(&self, _index: u64) {}
    fn expect_read(&self, _index: u64) {}
}

/// How many slots ahead a side tells the cache what it will touch. The producer's next lines are in the consumer's cache
/// from the last lap: fetched only when written, each costs a transfer on the way of a message.
const AHEAD: u64 = 8;

/// Whoever must be woken after a publication: the value that its armed word had.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake(pub u32);

/// Take an armed word down if it is up. The caller has published just before; `sleepy` is what the sleeper announced.
#[inline]
pub fn take_down(word: &AtomicU32, sleepy: bool) -> Wake {
    if sleepy {
        full_fence();
    } else {
        light_fence();
    }
    if word.load(Ordering::Relaxed) == DISARMED {
        return Wake(DISARMED);
    }
    Wake(word.swap(DISARMED, Ordering::AcqRel))
}

/// Looks that found something, since the last sleep, after which one no longer counts as sleepy.
const CALM: u32 = 64;

/// Whether this side has announced that it sleeps now and then.
#[derive(Default)]
struct Sleeper {
    announced: bool,
    calm: u32,
}

impl Sleeper {
    /// About to sleep: true when that has to be announced first.
    fn sleeps(&mut self) -> bool {
        self.calm = 0;
        !std::mem::replace(&mut self.announced, true)
    }

    /// Found something without sleeping: true when that has gone on for so long that the announcement can go.
    #[inline]
    fn awake(&mut self) -> bool {
        if !self.announced {
            return false;
        }
        self.calm += 1;
        self.announced = self.calm < CALM;
        !self.announced
    }
}

pub struct Producer {
    tail: u64,
    published: u64,
    head: u64,
    sleeper: Sleeper,
}

impl Producer {
    /// Take over a ring from its start.
    pub fn new() -> Self {
        Producer { tail: 0, published: 0, head: 0, sleeper: Sleeper::default() }
    }

    /// Slots that can be written now; looks at the consumer's index only when the cached one leaves fewer than `want`.
    #[inline]
    pub fn room(&mut self, mem: &impl Memory, want: u64) -> Result<u64, Fault> {
        let free = mem.capacity() - (self.tail - self.head);
        if free >= want {
            return Ok(free);
        }
        let head = mem.head().load(Ordering::Acquire);
        // Between our old view and what we published: anything else was never a state of this ring.
        if head.wrapping_sub(self.head) > self.published - self.head {
            return Err(Fault::Index);
        }
        if head != self.head && self.sleeper.awake() {
            mem.announce_room(false);
        }
        self.head = head;
        Ok(mem.capacity() - (self.tail - head))
    }

    /// Write an inline message. The caller has made sure of `inline_slots(len)` slots of room.
    #[inline]
    pub fn put_inline(&mut self, mem: &impl Memory, tag: u64, bytes: &[u8]) {
        let slots = layout::inline_slots(bytes.len());
        // Only lines that the consumer is known to be done with: taking away one that it still reads costs it a transfer.
        if self.tail + AHEAD + slots <= self.head + mem.capacity() {
            mem.expect_write(self.tail + AHEAD);
            mem.expect_write(self.tail + AHEAD + slots - 1);
        }
        mem.write_prefix(self.tail, layout::emit(bytes.len(), tag, false));
        mem.write(self.tail * SLOT as u64 + PREFIX as u64, bytes);
        self.tail += slots;
    }

    /// Write as many inline messages of `size` bytes from `records` as there is room for, up to a quarter of the ring (so
    /// that the consumer starts before we end); how many.
    pub fn put_packed(&mut self, mem: &impl Memory, tag: u64, records: &[u8], size: usize) -> Result<usize, Fault> {
        let slots = layout::inline_slots(size);
        let quarter = mem.capacity() / 4 / slots;
        let wanted = (records.len() / size).min(quarter as usize);
        let room = self.room(mem, wanted as u64 * slots)? / slots;
        let count = wanted.min(room as usize);
        let words = layout::emit(size, tag, false);
        for record in records.chunks_exact(size).take(count) {
            mem.write_prefix(self.tail, words);
            mem.write(self.tail * SLOT as u64 + PREFIX as u64, record);
            self.tail += slots;
        }
        Ok(count)
    }

    /// Write a message whose payload is in the pool. The caller has made sure of one slot of room.
    #[inline]
    pub fn put_pooled(&mut self, mem: &impl Memory, tag: u64, len: usize, place: PoolRef) {
        mem.write_prefix(self.tail, layout::emit(len, tag, true));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&place.offset.to_le_bytes());
        bytes[8..].copy_from_slice(&place.token.to_le_bytes());
        mem.write(self.tail * SLOT as u64 + PREFIX as u64, &bytes);
        self.tail += 1;
    }

    /// Slots ever written.
    #[inline]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Slots ever made visible.
    #[inline]
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Forget what was put and not yet published.
    pub fn rewind(&mut self) {
        self.tail = self.published;
    }

    /// Go on where another producer of this ring stopped, who had written `tail` slots for good; they are published again.
    /// Its announcement of sleep ends with it.
    pub fn resume(&mut self, mem: &impl Memory, tail: u64) -> Result<(), Fault> {
        let head = mem.head().load(Ordering::Acquire);
        if tail.wrapping_sub(head) > mem.capacity() {
            return Err(Fault::Index);
        }
        *self = Producer { tail, published: tail, head, sleeper: Sleeper::default() };
        self.retire(mem);
        mem.tail().store(tail, Ordering::Release);
        Ok(())
    }

    /// Sleep no more: somebody else is going to produce.
    pub fn retire(&mut self, mem: &impl Memory) {
        self.sleeper = Sleeper::default();
        mem.announce_room(false);
        mem.room_armed().swap(DISARMED, Ordering::AcqRel);
    }

    /// Make everything that was put visible at once.
    #[inline]
    pub fn publish(&mut self, mem: &impl Memory) -> Wake {
        if self.tail == self.published {
            return Wake(DISARMED);
        }
        mem.tail().store(self.tail, Ordering::Release);
        self.published = self.tail;
        take_down(mem.data_armed(), mem.data_sleepy())
    }

    /// Raise the armed word only: `settle` and another look must follow before anybody sleeps. True when the announcement
    /// is new, so that the fence has to be the heavy one.
    pub fn raise(&mut self, mem: &impl Memory, how: u32) -> bool {
        let announce = self.sleeper.sleeps();
        if announce {
            mem.announce_room(true);
        }
        mem.room_armed().swap(how, Ordering::AcqRel);
        announce
    }

    /// Ask to be woken when the consumer makes room; false when there are `want` slots already.
    pub fn arm(&mut self, mem: &impl Memory, want: u64, how: u32) -> Result<bool, Fault> {
        settle(self.raise(mem, how));
        if self.room(mem, want)? < want {
            return Ok(true);
        }
        mem.room_armed().swap(DISARMED, Ordering::AcqRel);
        Ok(false)
    }
}

impl Default for Producer {
    fn default() -> Self {
        Self::new()
    }
}

/// An inline message still in the ring, for `Consumer::take_inline`.
pub struct Inline<'a, M> {
    mem: &'a M,
    position: u64,
    pub len: usize,
    pub tag: u64,
}

impl<M: Memory> Inline<'_, M> {
    /// `out` is `len` bytes long.
    #[inline]
    pub fn copy_to(&self, out: &mut [u8]) {
        self.mem.read(self.position, out);
    }
}

pub struct Consumer {
    head: u64,
    released: u64,
    tail: u64,
    /// Nothing beyond is given back: those slots are needed again should this process die now. `u64::MAX`: no limit.
    limit: u64,
    sleeper: Sleeper,
}

impl Consumer {
    pub fn new() -> Self {
        Consumer { head: 0, released: 0, tail: 0, limit: u64::MAX, sleeper: Sleeper::default() }
    }

    /// Slots ever consumed.
    #[inline]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// What was consumed up to now is consumed for good, and nothing beyond is given back before the next call.
    #[inline]
    pub fn keep(&mut self) {
        self.limit = self.head;
    }

    /// Slots consumed for good.
    #[inline]
    pub fn kept(&self) -> u64 {
        self.limit
    }

    /// Have messages come again from `head` on, which is not before what was kept.
    pub fn rewind(&mut self, head: u64) {
        self.head = head.clamp(self.limit.min(self.head), self.head);
    }

    /// Go on where another consumer of this ring stopped, who had consumed `head` slots for good; they are given back again.
    /// Its announcement of sleep ends with it.
    pub fn resume(&mut self, mem: &impl Memory, head: u64) -> Result<(), Fault> {
        let tail = mem.tail().load(Ordering::Acquire);
        if tail.wrapping_sub(head) > mem.capacity() {
            return Err(Fault::Index);
        }
        *self = Consumer { head, released: head, tail, limit: head, sleeper: Sleeper::default() };
        self.retire(mem);
        mem.head().store(head, Ordering::Release);
        Ok(())
    }

    /// Sleep no more: somebody else is going to consume.
    pub fn retire(&mut self, mem: &impl Memory) {
        self.sleeper = Sleeper::default();
        mem.announce_data(false);
        mem.data_armed().swap(DISARMED, Ordering::AcqRel);
    }

    /// The checked header of a message that was stepped over, at `position` between what was kept and what was consumed.
    pub fn look_back(&self, mem: &impl Memory, position: u64) -> Result<Header, Fault> {
        layout::parse(mem.read_prefix(position), self.head.saturating_sub(position))
    }

    /// Published slots not yet consumed; looks at the producer's index only when the cached one is used up.
    #[inline]
    pub fn available(&mut self, mem: &impl Memory) -> Result<u64, Fault> {
        if self.tail != self.head {
            return Ok(self.tail - self.head);
        }
        self.refresh(mem)
    }

    #[inline]
    fn refresh(&mut self, mem: &impl Memory) -> Result<u64, Fault> {
        let tail = mem.tail().load(Ordering::Acquire);
        // Never backwards, and never more than fits after what we have given back.
        if tail.wrapping_sub(self.released) > mem.capacity()
            || tail.wrapping_sub(self.released) < self.tail - self.released
        {
            return Err(Fault::Index);
        }
        if tail != self.tail && self.sleeper.awake() {
            mem.announce_data(false);
        }
        self.tail = tail;
        Ok(tail - self.head)
    }

    /// The next message's header, if there is a message.
    #[inline]
    pub fn peek(&mut self, mem: &impl Memory) -> Result<Option<Header>, Fault> {
        let available = self.available(mem)?;
        if available == 0 {
            return Ok(None);
        }
        if available > AHEAD {
            mem.expect_read(self.head + AHEAD);
        }
        layout::parse(mem.read_prefix(self.head), available).map(Some)
    }

    /// Copy inline messages of exactly `size` bytes into `out`, up to a quarter of the ring; how many. Stops, without a word,
    /// before anything else: `peek` then tells what that is.
    pub fn take_packed(&mut self, mem: &impl Memory, out: &mut [u8], size: usize) -> Result<usize, Fault> {
        let slots = layout::inline_slots(size);
        let [wanted, _] = layout::emit(size, 0, false);
        let available = self.available(mem)?.min(mem.capacity() / 4) / slots;
        let mut taken = 0;
        for place in out.chunks_exact_mut(size).take(available as usize) {
            if mem.read_prefix(self.head)[0] != wanted {
                break;
            }
            mem.read(self.head * SLOT as u64 + PREFIX as u64, place);
            self.head += slots;
            taken += 1;
        }
        Ok(taken)
    }

    /// Pass up to `limit` inline messages, at most a quarter of the ring, to `take`; how many and their bytes together.
    /// Stops, without a word, before anything else: `peek` then tells what that is.
    #[inline]
    pub fn take_inline<M: Memory>(
        &mut self,
        mem: &M,
        limit: usize,
        mut take: impl FnMut(Inline<'_, M>) -> bool,
    ) -> Result<(usize, usize), Fault> {
        let mut available = self.available(mem)?.min(mem.capacity() / 4);
        let (mut taken, mut bytes) = (0, 0);
        while taken < limit && available > 0 {
            let Ok(header) = layout::parse(mem.read_prefix(self.head), available) else { break };
            let position = self.head * SLOT as u64 + PREFIX as u64;
            if header.pooled || !take(Inline { mem, position, len: header.len, tag: header.tag }) {
                break;
            }
            self.head += header.slots;
            available -= header.slots;
            taken += 1;
            bytes += header.len;
        }
        Ok((taken, bytes))
    }

    /// Copy the payload of the inline message at the head; `out` has the header's length.
    #[inline]
    pub fn read_inline(&self, mem: &impl Memory, out: &mut [u8]) {
        mem.read(self.head * SLOT as u64 + PREFIX as u64, out);
    }

    /// The pool reference of the message at the head: still the peer's claim.
    #[inline]
    pub fn read_pool_ref(&self, mem: &impl Memory) -> PoolRef {
        self.read_pool_ref_at(mem, self.head)
    }

    /// The same of a message at another place.
    pub fn read_pool_ref_at(&self, mem: &impl Memory, position: u64) -> PoolRef {
        const _: () = assert!(INLINE_FIRST >= 16);
        let mut bytes = [0; 16];
        mem.read(position * SLOT as u64 + PREFIX as u64, &mut bytes);
        let word = |half: &[u8]| half.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        PoolRef { offset: word(&bytes[..8]), token: word(&bytes[8..]) }
    }

    /// Step over the message at the head.
    #[inline]
    pub fn advance(&mut self, slots: u64) {
        self.head += slots;
    }

    /// Give consumed slots back, but only when a quarter of the ring has come together: a store and a fence a message
    /// would be on the way of every reply. Whoever finds the ring empty calls `release`.
    #[inline]
    pub fn release_some(&mut self, mem: &impl Memory) -> Wake {
        if self.head.min(self.limit) - self.released < mem.capacity() / 4 {
            return Wake(DISARMED);
        }
        self.release(mem)
    }

    /// Give all consumed slots back.
    #[inline]
    pub fn release(&mut self, mem: &impl Memory) -> Wake {
        let head = self.head.min(self.limit);
        if head == self.released {
            return Wake(DISARMED);
        }
        mem.head().store(head, Ordering::Release);
        self.released = head;
        take_down(mem.room_armed(), mem.room_sleepy())
    }

    /// Raise the armed word only, as `Producer::raise`.
    pub fn raise(&mut self, mem: &impl Memory, how: u32) -> bool {
        let announce = self.sleeper.sleeps();
        if announce {
            mem.announce_data(true);
        }
        mem.data_armed().swap(how, Ordering::AcqRel);
        announce
    }

    /// Ask to be woken by the next message; false when there is one already.
    pub fn arm(&mut self, mem: &impl Memory, how: u32) -> Result<bool, Fault> {
        settle(self.raise(mem, how));
        if self.available(mem)? == 0 {
            return Ok(true);
        }
        mem.data_armed().swap(DISARMED, Ordering::AcqRel);
        Ok(false)
    }
}

impl Default for Consumer {
    fn default() -> Self {
        Self::new()
    }
}
