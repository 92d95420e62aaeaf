//! Both ends of a channel on real shared memory: against a reference queue, and the rules of state, rights and room.
#![cfg(not(loom))]

mod common;

use std::collections::VecDeque;

use common::{channel, take, Segments};
use proptest::prelude::*;
use snap_dataplane::core::{Role, State, RIGHT_RECV, RIGHT_SEND};
use snap_dataplane::error::{Error, Fault};
use snap_dataplane::layout::{self, PoolRef, INLINE_MAX};
use snap_dataplane::ring::ARMED_EVENT;

const POOL: usize = 64 * 1024;

#[derive(Clone, Debug)]
enum Step {
    Put(usize),
    PutLarge(usize),
    Loan(usize),
    SendLoan(usize),
    CancelLoan(usize),
    Publish,
    Receive(usize),
    Keep,
    GiveBack(usize),
    Release,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..=INLINE_MAX).prop_map(Step::Put),
        1 => (INLINE_MAX + 1..6000).prop_map(Step::PutLarge),
        1 => (0usize..6000).prop_map(Step::Loan),
        1 => any::<usize>().prop_map(Step::SendLoan),
        1 => any::<usize>().prop_map(Step::CancelLoan),
        4 => Just(Step::Publish),
        4 => (1usize..8).prop_map(Step::Receive),
        2 => Just(Step::Keep),
        2 => any::<usize>().prop_map(Step::GiveBack),
        1 => Just(Step::Release),
    ];
    prop::collection::vec(step, 1..300)
}

fn fill(number: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| (number as usize).wrapping_mul(131).wrapping_add(at * 7) as u8).collect()
}

/// Full is an answer; everything else must not happen between sound ends.
fn went(result: Result<(), Error>) -> bool {
    match result {
        Ok(()) => true,
        Err(Error::Full) => false,
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_channel_is_a_queue(before in 0usize..200, up: bool, steps in steps()) {
        let (_segments, client, server) = channel(64, POOL, POOL);
        let (mut sender, mut receiver) = if up { (client, server) } else { (server, client) };
        // Start anywhere in the ring.
        for _ in 0..before {
            sender.tx.put(0, b"x").expect("room");
            sender.tx.publish();
            prop_assert!(take(&mut receiver.rx).expect("sound").is_some());
        }
        let mut number = 0;
        let mut unpublished: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
        let mut published: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
        let mut loans = Vec::new();
        let mut kept: Vec<(PoolRef, Vec<u8>)> = Vec::new();
        for step in steps {
            number += 1;
            match step {
                Step::Put(len) | Step::PutLarge(len) => {
                    let bytes = fill(number, len);
                    if went(sender.tx.put(number, &bytes)) {
                        unpublished.push_back((number, bytes));
                    }
                }
                Step::Loan(len) => {
                    if let Ok(loan) = sender.tx.loan(len) {
                        let pool = sender.core.own_pool().expect("a pool");
                        pool.write(loan.place.offset as usize, &fill(number, len));
                        loans.push((loan, fill(number, len)));
                    }
                }
                Step::SendLoan(which) if !loans.is_empty() => {
                    let (loan, bytes) = loans.swap_remove(which % loans.len());
                    if went(sender.tx.put_loan(number, loan)) {
                        unpublished.push_back((number, bytes));
                    } else {
                        loans.push((loan, bytes));
                    }
                }
                Step::CancelLoan(which) if !loans.is_empty() => {
                    let (loan, _) = loans.swap_remove(which % loans.len());
                    sender.core.cancel_loan(loan.place.token);
                }
                Step::Publish => {
                    sender.tx.publish();
                    published.append(&mut unpublished);
                }
                Step::Receive(limit) => {
                    for _ in 0..limit {
                        prop_assert_eq!(take(&mut receiver.rx).expect("sound"), published.pop_front());
                    }
                }
                Step::Keep => {
                    let Some(header) = receiver.rx.peek().expect("sound") else { continue };
                    let (tag, bytes) = published.pop_front().expect("the reference has it too");
                    prop_assert_eq!((header.tag, header.len), (tag, bytes.len()));
                    if header.pooled {
                        kept.push((receiver.rx.take_pooled(header).expect("sound"), bytes));
                    } else {
                        let mut out = vec![0; header.len];
                        receiver.rx.take_into(header, &mut out).expect("sound");
                        prop_assert_eq!(out, bytes);
                    }
                }
                Step::GiveBack(which) if !kept.is_empty() => {
                    let (place, _) = kept.swap_remove(which % kept.len());
                    receiver.core.give_back(place.token);
                }
                Step::Release => receiver.rx.release(),
                _ => {}
            }
            // What the receiver keeps stays what it was, whatever the sender does meanwhile.
            for (place, bytes) in &kept {
                let mut out = vec![0; bytes.len()];
                receiver.core.peer_pool().expect("a pool").read(place.offset as usize, &mut out);
                prop_assert_eq!(&out, bytes);
            }
        }
        sender.tx.publish();
        published.append(&mut unpublished);
        while let Some(expected) = published.pop_front() {
            prop_assert_eq!(take(&mut receiver.rx).expect("sound"), Some(expected));
        }
        prop_assert_eq!(take(&mut receiver.rx).expect("sound"), None);
        kept.iter().for_each(|(place, _)| receiver.core.give_back(place.token));
        loans.iter().for_each(|(loan, _)| sender.core.cancel_loan(loan.place.token));
        prop_assert_eq!(sender.core.loans_out(), 0);
        prop_assert_eq!(sender.tx.slots_free().expect("sound"), 64);
    }

    #[test]
    fn a_pool_lends_all_that_it_promises(pages in 0usize..40, odd in 1usize..4096) {
        let (_segments, mut client, _server) = channel(64, pages * 4096 + odd, 0);
        let len = client.core.max_message();
        match client.tx.loan(len) {
            Ok(loan) => client.core.cancel_loan(loan.place.token),
            // Inline messages may be larger than a tiny pool.
            Err(error) => prop_assert!(matches!(error, Error::Size { .. }) && len == INLINE_MAX, "{}: {}", len, error),
        }
        let refused = client.tx.loan(len + 1);
        prop_assert!(matches!(refused, Err(Error::Size { .. })), "{:?}", refused.map(|loan| loan.len));
    }
}

#[test]
fn a_channel_without_a_pool_refuses_to_lend_instead_of_being_full() {
    let (_segments, mut client, _server) = channel(64, 0, 0);
    assert!(matches!(client.tx.loan(0), Err(Error::Size { .. })));
    assert!(matches!(client.tx.put(0, &[0; INLINE_MAX + 1]), Err(Error::Size { .. })));
    client.tx.put(0, &[0; INLINE_MAX]).expect("inline");
}

#[test]
fn a_shut_gate_outranks_every_state_that_a_client_can_write() {
    let (segments, mut client, mut server) = channel(64, POOL, POOL);
    client.tx.put(0, b"still in the ring").expect("room");
    client.tx.publish();
    segments.shut_gate();
    for word in 0..=256 {
        segments.word(layout::OFF_STATE, word);
        // "Gone" keeps its name, as the kernel shuts the gate of a dead client too, but is no way in.
        let gone = word & 0xff == State::Gone as u64;
        for outcome in [server.rx.check(), server.tx.check()] {
            assert!(matches!(outcome, Err(Error::Revoked)) || gone && matches!(outcome, Err(Error::Gone)), "{word}");
        }
    }
}

#[test]
fn what_was_sent_before_a_peer_left_can_still_be_received() {
    let (_segments, mut client, mut server) = channel(64, POOL, POOL);
    client.tx.put(3, b"last words").expect("room");
    client.tx.publish();
    client.core.close();
    assert_eq!(take(&mut server.rx).expect("pending"), Some((3, b"last words".to_vec())));
    assert!(matches!(take(&mut server.rx), Err(Error::Gone)));
    assert!(matches!(server.tx.check(), Err(Error::Gone)));
    assert!(matches!(client.rx.check(), Err(Error::Closed)));
}

#[test]
fn a_pause_between_reservation_and_answer_loses_nothing() {
    let (segments, _client, mut server) = channel(64, POOL, POOL);
    server.tx.reserve(1).expect("room");
    let loan = server.tx.loan(100).expect("a pool");
    segments.set_state(State::Paused);
    assert!(matches!(server.tx.put(0, b"new"), Err(Error::Full)), "a pause holds new messages");
    server.tx.put_reserved(1, b"answer");
    server.tx.put_loan_reserved(2, loan);
    server.tx.publish();
    assert_eq!(server.tx.slots_free().expect("sound"), 62);
}

#[test]
fn room_that_somebody_else_collected_ends_a_stall() {
    let (_segments, mut client, mut server) = channel(64, 4096, 0);
    client.tx.put(0, &[1; 4096]).expect("room");
    client.tx.publish();
    let header = server.rx.peek().expect("sound").expect("a message");
    let place = server.rx.take_pooled(header).expect("sound");
    server.rx.release();
    assert!(matches!(client.tx.loan(4096), Err(Error::Full)));
    server.core.give_back(place.token);
    // Statistics take returned payloads in as well.
    assert_eq!(client.core.loans_out(), 0);
    assert!(!client.tx.arm_stalled(ARMED_EVENT).expect("sound"), "there is room: nobody would ring");
}

#[test]
fn an_own_loan_taken_back_wakes_whoever_waits_for_room() {
    let (_segments, mut client, _server) = channel(64, 4096, 0);
    let loan = client.tx.loan(4096).expect("a pool");
    assert!(matches!(client.tx.loan(64), Err(Error::Full)));
    assert!(client.tx.arm_stalled(ARMED_EVENT).expect("sound"));
    client.core.cancel_loan(loan.place.token);
    let mut fds = [rustix::event::PollFd::new(client.core.own_bell(), rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&now)), Ok(1), "the own bell was not rung");
    assert!(!client.tx.arm_stalled(ARMED_EVENT).expect("sound"));
}

#[test]
fn a_ring_without_room_stalls_and_recovers() {
    let (_segments, mut client, mut server) = channel(64, 0, 0);
    let mut sent = 0;
    while went(client.tx.put(sent, &[0; 48])) {
        sent += 1;
    }
    client.tx.publish();
    assert_eq!(sent, 64);
    assert!(client.tx.stalled() && client.tx.arm_stalled(ARMED_EVENT).expect("sound"));
    for tag in 0..sent {
        assert_eq!(take(&mut server.rx).expect("sound").map(|(tag, _)| tag), Some(tag));
    }
    server.rx.release();
    assert!(!client.tx.arm_stalled(ARMED_EVENT).expect("sound"));
    client.tx.put(0, &[0; INLINE_MAX]).expect("room");
}

#[test]
fn each_end_holds_the_other_to_its_rights() {
    let segments = Segments::new(64, POOL, POOL);
    let mut client = segments.open(Role::Client, RIGHT_SEND).expect("client");
    let mut server = segments.open(Role::Server, RIGHT_SEND).expect("server");
    assert!(matches!(server.tx.check(), Err(Error::Denied("recv"))));
    client.tx.check().expect("may send");

    let segments = Segments::new(64, POOL, POOL);
    client = segments.open(Role::Client, 3).expect("a client that ignores its rights");
    server = segments.open(Role::Server, RIGHT_RECV).expect("server");
    client.tx.put(0, b"not allowed").expect("room");
    client.tx.publish();
    assert!(matches!(take(&mut server.rx), Err(Error::Faulted(Fault::Right))));

    let segments = Segments::new(64, POOL, POOL);
    client = segments.open(Role::Client, RIGHT_RECV).expect("client");
    assert!(matches!(client.tx.check(), Err(Error::Denied("send"))));
}

#[test]
fn each_wrong_field_of_a_header_is_named() {
    let wrong = [
        (layout::OFF_MAGIC, 0, Fault::Magic),
        (layout::OFF_VERSION, 1 | 64 << 32, Fault::Version),
        (layout::OFF_VERSION, 2 | 128 << 32, Fault::Geometry),
        (layout::OFF_GENERATION, 8, Fault::Generation),
    ];
    for (offset, value, expected) in wrong {
        let segments = Segments::new(64, POOL, POOL);
        segments.word(offset, value);
        for role in [Role::Client, Role::Server] {
            assert!(matches!(segments.open(role, 3), Err(Error::Faulted(fault)) if fault == expected));
        }
    }
    let mut small = Segments::new(64, POOL, POOL);
    small.slots = 128;
    assert!(matches!(small.open(Role::Client, 3), Err(Error::Faulted(Fault::Geometry))));
    small.slots = 63;
    assert!(matches!(small.open(Role::Client, 3), Err(Error::Faulted(Fault::Geometry))));
}

#[test]
fn a_pause_puts_the_receiver_to_sleep_whatever_is_in_the_ring() {
    let (segments, mut client, mut server) = channel(64, 0, 0);
    client.tx.put(0, b"before the pause").expect("room");
    client.tx.publish();
    segments.set_state(State::Paused);
    assert!(server.rx.arm(ARMED_EVENT).expect("sound") && server.rx.idle());
    segments.set_state(State::Open);
    assert!(!server.rx.arm(ARMED_EVENT).expect("sound") && !server.rx.idle());
}
