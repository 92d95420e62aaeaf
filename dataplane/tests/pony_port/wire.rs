//! The wire of shared memory: frames between threads, sleep, taking over, and a peer that writes what it likes.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use proptest::prelude::*;
use snap_dataplane::error::Fault;
use snap_dataplane::pony::port::wire::{self, Shape, Side, Wire};
use snap_dataplane::pony::port::{Port, PortError};

use super::common::memfd;
use super::{collect, is_packet, peer, push, readable, Cable, PATIENCE};

/// A size for packet `number`, from 8 to `mtu`.
fn size_of_packet(number: u64, mtu: u64) -> usize {
    (8 + number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (mtu - 7)) as usize
}

/// Sleep on a port until it may have something, at most for a moment.
fn rest(port: &mut Wire) {
    if port.arm() {
        readable(port.fd(), Duration::from_secs(10));
    }
    port.disarm();
}

#[test]
fn millions_of_frames_cross_a_wire_between_threads() {
    const COUNT: u64 = 2_000_000;
    const MTU: u64 = 300;
    let cable = Cable::new(256, MTU as u32);
    let (mut a, mut b) = cable.ends();
    let sender = std::thread::spawn(move || {
        let mut number = 0;
        while number < COUNT {
            let burst = number + 1 + number % 40;
            while number < burst.min(COUNT) && push(&mut a, number, size_of_packet(number, MTU), peer(), 0) {
                number += 1;
            }
            a.flush().expect("flush");
            if a.frame().is_none() {
                rest(&mut a);
            }
        }
        a.statistics()
    });
    let mut next = 0;
    while next < COUNT {
        let burst = b.receive().expect("receive");
        for index in 0..burst {
            let (bytes, from) = b.packet(index);
            assert_eq!(from, peer());
            assert!(is_packet(bytes, next, size_of_packet(next, MTU)), "packet {next}");
            next += 1;
        }
        if burst == 0 {
            rest(&mut b);
        }
    }
    let (sent, received) = (sender.join().expect("sender"), b.statistics());
    assert_eq!((sent.sent_packets, sent.sent_bytes), (received.received_packets, received.received_bytes));
    assert_eq!(b.receive().expect("receive"), 0);
}

#[test]
fn a_full_wire_has_no_room_until_the_other_side_took_something() {
    let cable = Cable::new(8, 100);
    let (mut a, mut b) = cable.ends();
    for number in 0..8 {
        assert!(push(&mut a, number, 100, peer(), 0));
    }
    assert!(a.frame().is_none());
    assert_eq!(b.receive().expect("receive"), 0, "nothing is there before it is flushed");
    a.flush().expect("flush");
    assert!(a.frame().is_none());
    assert!(a.arm(), "nothing to do yet");
    assert_eq!(b.receive().expect("receive"), 8);
    assert!(readable(a.fd(), PATIENCE), "room rings the bell");
    a.disarm();
    assert!(a.frame().is_some());
}

#[test]
fn an_armed_side_does_not_sleep_on_what_is_there() {
    let cable = Cable::new(8, 100);
    let (mut a, mut b) = cable.ends();
    assert!(b.arm());
    assert!(push(&mut a, 0, 10, peer(), 0));
    a.flush().expect("flush");
    assert!(readable(b.fd(), PATIENCE));
    b.disarm();
    assert!(!b.arm(), "a packet waits");
    assert_eq!(b.receive().expect("receive"), 1);
    assert!(b.arm());
    assert!(!readable(b.fd(), Duration::ZERO));
}

#[test]
fn another_engine_takes_over_an_end() {
    let cable = Cable::new(16, 100);
    let (mut a, mut b) = cable.ends();
    for round in 0..50 {
        for number in 0..7 {
            assert!(push(&mut a, round * 7 + number, 60, peer(), 0));
        }
        a.flush().expect("flush");
        // Written and not published: gone with whoever wrote it.
        assert!(push(&mut a, 999, 60, peer(), 0));
        drop((a, b));
        (a, b) = cable.ends();
        for (number, (bytes, _)) in (0..).zip(collect(&mut b, 7)) {
            assert!(is_packet(&bytes, round * 7 + number, 60));
        }
    }
}

fn fault<T>(result: Result<T, PortError>) -> Option<Fault> {
    match result {
        Err(PortError::Faulted(fault)) => Some(fault),
        _ => None,
    }
}

#[test]
fn a_segment_of_another_shape_is_refused() {
    let cable = Cable::new(8, 100);
    for (offset, expected) in [(0, Fault::Magic), (8, Fault::Version), (12, Fault::Geometry), (16, Fault::Geometry)] {
        let word = cable.memory();
        let word = word.u32_at(offset);
        word.fetch_xor(1, Relaxed);
        assert_eq!(fault(cable.open(Side::A)), Some(expected));
        word.fetch_xor(1, Relaxed);
    }
    assert!(cable.open(Side::A).is_ok());
    let small = memfd(cable.shape.bytes() - 1);
    assert_eq!(fault(wire::format(small.as_fd(), cable.shape)), Some(Fault::Geometry));
    for (frames, mtu) in [(0, 100), (3, 100), (1 << 17, 100), (8, 0), (8, (1 << 16) + 1)] {
        assert_eq!(Shape::new(frames, mtu), None);
    }
}

#[test]
fn a_shrunk_segment_is_a_fault() {
    let cable = Cable::new(64, 1000);
    let (mut a, mut b) = cable.ends();
    assert!(push(&mut a, 0, 1000, peer(), 0));
    a.flush().expect("flush");
    rustix::fs::ftruncate(&cable.segment, 0).expect("ftruncate");
    let _ = b.receive();
    assert_eq!(fault(b.receive()), Some(Fault::Shrunk));
    let _ = push(&mut a, 1, 1000, peer(), 0);
    assert!(a.flush().is_err());
}

/// Offsets of the words that a peer can lie in: tail and head of direction 0, and the length of its first frames.
const TAIL: usize = 4096;
const HEAD: usize = 4096 + 64;
const FRAMES: usize = 8192;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn an_impossible_tail_is_a_fault(tail in prop_oneof![0u64..64, any::<u64>()], taken in 0u64..8) {
        let cable = Cable::new(8, 100);
        let (mut a, mut b) = cable.ends();
        for number in 0..taken {
            prop_assert!(push(&mut a, number, 50, peer(), 0));
        }
        a.flush().expect("flush");
        prop_assert_eq!(b.receive().expect("receive") as u64, taken);
        let memory = cable.memory();
        for slot in 0..8 {
            memory.u32_at(FRAMES + slot * 192).store(50, Relaxed);
        }
        memory.u64_at(TAIL).store(tail, Relaxed);
        match b.receive() {
            Ok(count) => prop_assert_eq!(count as u64, tail - taken),
            Err(error) => {
                prop_assert!(tail.wrapping_sub(taken) > 8);
                prop_assert_eq!(fault::<()>(Err(error)), Some(Fault::Index));
                prop_assert!(b.frame().is_none(), "a broken wire carries nothing");
                prop_assert!(b.flush().is_err() && b.receive().is_err());
                prop_assert!(!b.arm(), "and nobody sleeps on it");
            }
        }
    }

    #[test]
    fn an_impossible_head_is_a_fault(head in prop_oneof![0u64..64, any::<u64>()]) {
        let cable = Cable::new(8, 100);
        let (mut a, _b) = cable.ends();
        for number in 0..8 {
            prop_assert!(push(&mut a, number, 50, peer(), 0));
        }
        a.flush().expect("flush");
        cable.memory().u64_at(HEAD).store(head, Relaxed);
        let room = (0..20).take_while(|number| push(&mut a, *number, 50, peer(), 0)).count() as u64;
        if head <= 8 {
            prop_assert_eq!(room, head);
            prop_assert!(a.flush().is_ok());
        } else {
            prop_assert_eq!(room, 0);
            prop_assert_eq!(fault(a.flush()), Some(Fault::Index));
        }
    }

    #[test]
    fn a_length_beyond_the_mtu_is_a_fault(len in prop_oneof![0u32..128, any::<u32>()], slot in 0usize..4) {
        let cable = Cable::new(8, 100);
        let (mut a, mut b) = cable.ends();
        for number in 0..4 {
            prop_assert!(push(&mut a, number, 100, peer(), 0));
        }
        a.flush().expect("flush");
        cable.memory().u32_at(FRAMES + slot * 192).store(len, Relaxed);
        match b.receive() {
            Ok(count) => {
                prop_assert!(count == 4 && (1..=100).contains(&len));
                prop_assert_eq!(b.packet(slot).0.len(), len as usize);
            }
            Err(error) => {
                prop_assert!(len == 0 || len > 100);
                prop_assert_eq!(fault::<()>(Err(error)), Some(Fault::Length));
            }
        }
    }

    #[test]
    fn any_page_of_control_words_is_survived(words in proptest::collection::vec((0usize..128, any::<u64>()), 1..20)) {
        let cable = Cable::new(8, 100);
        let (mut a, mut b) = cable.ends();
        let memory = cable.memory();
        for (word, value) in words {
            memory.u64_at(4096 + word * 8).store(value, Relaxed);
            for end in [&mut a, &mut b] {
                let _ = push(end, 1, 100, peer(), 0);
                let _ = end.flush();
                let count = end.receive().unwrap_or(0);
                prop_assert!(count <= 64 && (0..count).all(|index| end.packet(index).0.len() <= 100));
                end.arm();
                end.disarm();
            }
            let _ = cable.open(Side::A);
        }
    }
}
