//! The ring under loom: every interleaving, and every value that the memory model lets a load return.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --no-default-features --test loom_ring`
//!
//! A slot is loom's `UnsafeCell`: an access that overlaps another one, or that nothing orders after it, fails the
//! model, so a torn or early read cannot pass. Sleeping is a condition variable without a timeout: a lost wake-up is a
//! deadlock, which loom reports. The last tests break the protocol and expect the model to notice.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use snap_dataplane::layout::{inline_slots, PREFIX, SLOT};
use snap_dataplane::ring::{Consumer, Memory, Producer, Wake, ARMED_EVENT, ARMED_FUTEX, DISARMED};
// Not loom's: dropping that one panics while a deadlock is being reported, which ends the process.
use std::sync::Arc;

struct Model {
    tail: AtomicU64,
    head: AtomicU64,
    data_armed: AtomicU32,
    room_armed: AtomicU32,
    slots: Vec<UnsafeCell<[u8; SLOT]>>,
    data: Bell,
    room: Bell,
}

impl Model {
    fn new(capacity: usize) -> Arc<Model> {
        Arc::new(Model {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            data_armed: AtomicU32::new(DISARMED),
            room_armed: AtomicU32::new(DISARMED),
            slots: (0..capacity).map(|_| UnsafeCell::new([0; SLOT])).collect(),
            data: Bell::default(),
            room: Bell::default(),
        })
    }

    /// Runs of bytes, one per slot, of a range that may wrap.
    fn runs(&self, position: u64, len: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let size = self.slots.len() * SLOT;
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = (position as usize + done) % size;
            let count = (SLOT - at % SLOT).min(len - done);
            done += count;
            Some((at / SLOT, at % SLOT, done - count, count))
        })
    }
}

impl Memory for Model {
    fn capacity(&self) -> u64 {
        self.slots.len() as u64
    }
    fn tail(&self) -> &AtomicU64 {
        &self.tail
    }
    fn head(&self) -> &AtomicU64 {
        &self.head
    }
    fn data_armed(&self) -> &AtomicU32 {
        &self.data_armed
    }
    fn room_armed(&self) -> &AtomicU32 {
        &self.room_armed
    }
    fn write_prefix(&self, index: u64, words: [u64; 2]) {
        self.write(index * SLOT as u64, &words[0].to_le_bytes());
        self.write(index * SLOT as u64 + 8, &words[1].to_le_bytes());
    }
    fn read_prefix(&self, index: u64) -> [u64; 2] {
        let mut bytes = [0; PREFIX];
        self.read(index * SLOT as u64, &mut bytes);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        [word(0), word(8)]
    }
    fn write(&self, position: u64, bytes: &[u8]) {
        for (slot, at, from, count) in self.runs(position, bytes.len()) {
            // SAFETY: loom checks that nobody else accesses the slot meanwhile.
            self.slots[slot]
                .with_mut(|place| unsafe { (&mut *place)[at..at + count].copy_from_slice(&bytes[from..from + count]) });
        }
    }
    fn read(&self, position: u64, out: &mut [u8]) {
        for (slot, at, from, count) in self.runs(position, out.len()) {
            // SAFETY: as in `write`.
            self.slots[slot]
                .with(|place| unsafe { out[from..from + count].copy_from_slice(&(&*place)[at..at + count]) });
        }
    }
}

/// What the system offers to sleepers, without its timeouts.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// As futex(2): under the lock, sleep only if the word is still armed. As an eventfd: until it was rung.
    fn sleep(&self, word: &AtomicU32, how: u32) {
        let mut rung = self.rung.lock().expect("no thread panics with it");
        if how == ARMED_EVENT {
            while !*rung {
                rung = self.changed.wait(rung).expect("as above");
            }
            *rung = false;
        } else if word.load(Ordering::Relaxed) == ARMED_FUTEX {
            drop(self.changed.wait(rung).expect("as above"));
        }
    }

    fn wake(&self, wake: Wake) {
        if wake.0 != DISARMED {
            *self.rung.lock().expect("as above") = true;
            self.changed.notify_all();
        }
    }
}

/// Message `number`, of a length that is part of what is checked.
fn message(number: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| (number as usize * 31 + at) as u8).collect()
}

fn produce(mem: &Model, lengths: &[usize], how: u32) {
    let mut producer = Producer::new();
    for (number, len) in lengths.iter().enumerate() {
        let want = inline_slots(*len);
        while producer.room(mem, want).expect("sound") < want {
            if producer.arm(mem, want, how).expect("sound") {
                mem.room.sleep(&mem.room_armed, how);
            }
        }
        producer.put_inline(mem, number as u64, &message(number as u64, *len));
        mem.data.wake(producer.publish(mem));
    }
}

fn consume(mem: &Model, lengths: &[usize], how: u32) {
    let mut consumer = Consumer::new();
    for (number, len) in lengths.iter().enumerate() {
        let header = loop {
            if let Some(header) = consumer.peek(mem).expect("sound") {
                break header;
            }
            mem.room.wake(consumer.release(mem));
            if consumer.arm(mem, how).expect("sound") {
                mem.data.sleep(&mem.data_armed, how);
            }
        };
        assert_eq!((header.tag, header.len), (number as u64, *len));
        let mut out = vec![0; header.len];
        consumer.read_inline(mem, &mut out);
        assert_eq!(out, message(number as u64, *len));
        consumer.advance(header.slots);
        mem.room.wake(consumer.release_some(mem));
    }
    assert_eq!(consumer.peek(mem).expect("sound"), None);
    mem.room.wake(consumer.release(mem));
}

fn explore(preemptions: Option<usize>, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    builder.check(body);
}

fn exchange(capacity: usize, lengths: &'static [usize], how: u32, preemptions: Option<usize>) {
    explore(preemptions, move || {
        let mem = Model::new(capacity);
        let theirs = mem.clone();
        let producer = thread::spawn(move || produce(&theirs, lengths, how));
        consume(&mem, lengths, how);
        producer.join().expect("the producer ends");
    });
}

/// Both ends sleep whenever they can, so this covers transfer and both directions of the armed-word protocol.
#[test]
fn every_message_arrives_once_in_order_and_no_futex_sleeper_is_forgotten() {
    exchange(2, &[8, 8, 8], ARMED_FUTEX, Some(3));
}

#[test]
fn no_eventfd_sleeper_is_forgotten_either() {
    exchange(2, &[8, 8, 8], ARMED_EVENT, Some(3));
}

#[test]
fn messages_of_several_slots_wrap_around_untorn() {
    exchange(4, &[INLINE_TWO, 200, INLINE_TWO], ARMED_FUTEX, Some(3));
}

/// Without a bound on preemptions.
#[test]
fn one_message_in_every_interleaving_there_is() {
    exchange(2, &[8], ARMED_FUTEX, None);
}

/// A ring of one message: the second one waits for the first one's slots.
#[test]
fn two_messages_through_one_place() {
    exchange(2, &[INLINE_TWO, INLINE_TWO], ARMED_FUTEX, Some(3));
}

/// Two slots.
const INLINE_TWO: usize = 60;

/// With `capacity` 4, a quarter is one slot; with 8 the consumer keeps what it consumed back until it finds nothing.
#[test]
fn slots_given_back_late_are_given_back() {
    exchange(8, &[200, 200, 200], ARMED_FUTEX, Some(2));
}

#[test]
fn a_burst_is_seen_whole_or_not_at_all() {
    explore(None, || {
        let mem = Model::new(4);
        let theirs = mem.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new();
            (0..3).for_each(|tag| producer.put_inline(&*theirs, tag, &[7; 8]));
            let _ = producer.publish(&*theirs);
        });
        let mut consumer = Consumer::new();
        let seen = consumer.available(&*mem).expect("sound");
        assert!(seen == 0 || seen == 3, "part of a burst: {seen}");
        producer.join().expect("the producer ends");
    });
}

// -- the model notices when the protocol is broken ------------------------------------------------------------

/// One message and one sleeper, with the steps of both sides as parameters.
fn sleep_and_publish(arm: fn(&Model) -> bool, publish: fn(&Model) -> Wake) {
    explore(None, move || {
        let mem = Model::new(2);
        let theirs = mem.clone();
        let producer = thread::spawn(move || {
            theirs.write(0, &[1; 8]);
            theirs.data.wake(publish(&theirs));
        });
        while mem.tail.load(Ordering::Acquire) == 0 {
            if arm(&mem) {
                mem.data.sleep(&mem.data_armed, ARMED_FUTEX);
            }
        }
        mem.read(0, &mut [0; 8]);
        producer.join().expect("the producer ends");
    });
}

fn sound_arm(mem: &Model) -> bool {
    mem.data_armed.store(ARMED_FUTEX, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    mem.tail.load(Ordering::Acquire) == 0
}

fn arm_without_another_look(mem: &Model) -> bool {
    mem.data_armed.store(ARMED_FUTEX, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    true
}

fn arm_without_a_fence(mem: &Model) -> bool {
    mem.data_armed.store(ARMED_FUTEX, Ordering::Relaxed);
    mem.tail.load(Ordering::Acquire) == 0
}

fn sound_publish(mem: &Model) -> Wake {
    mem.tail.store(1, Ordering::Release);
    fence(Ordering::SeqCst);
    taken_down(mem)
}

fn publish_without_a_fence(mem: &Model) -> Wake {
    mem.tail.store(1, Ordering::Release);
    taken_down(mem)
}

fn publish_unordered(mem: &Model) -> Wake {
    mem.tail.store(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    taken_down(mem)
}

fn taken_down(mem: &Model) -> Wake {
    if mem.data_armed.load(Ordering::Relaxed) == DISARMED {
        return Wake(DISARMED);
    }
    Wake(mem.data_armed.swap(DISARMED, Ordering::AcqRel))
}

#[test]
fn the_copied_protocol_is_sound_before_it_is_broken() {
    sleep_and_publish(sound_arm, sound_publish);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_model_notices_a_missing_second_look() {
    sleep_and_publish(arm_without_another_look, sound_publish);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_model_notices_a_missing_fence_of_the_sleeper() {
    sleep_and_publish(arm_without_a_fence, sound_publish);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_model_notices_a_missing_fence_of_the_publisher() {
    sleep_and_publish(sound_arm, publish_without_a_fence);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_model_notices_an_unordered_publication() {
    sleep_and_publish(sound_arm, publish_unordered);
}
