//! A peer that writes whatever it likes, wherever it can, whenever it likes: every call answers, in bounded work.
//!
//! Every bound is an assertion in the crate, so that an access outside a mapping shows here as a panic.
//! `SNAP_SEED=N cargo test --no-default-features --test hostile` repeats a run.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use common::{open_state, state, take, End, Random, Segments};
use proptest::prelude::*;
use snap_dataplane::core::{Role, State};
use snap_dataplane::engine::{self, Channel, Channels};
use snap_dataplane::error::{Error, Fault};
use snap_dataplane::layout::{self, PoolRef};
use snap_dataplane::ledger;
use snap_dataplane::ring::ARMED_EVENT;
use snap_dataplane::segment::Mapping;

const SLOTS: u32 = 64;
const POOL: usize = 16 * 1024;

fn seed() -> u64 {
    let seed = match std::env::var("SNAP_SEED") {
        Ok(seed) => seed.parse().expect("SNAP_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64,
    };
    println!("SNAP_SEED={seed}");
    seed
}

/// Random words, mostly where they matter: control lines, first slots, return rings; small numbers as often as wild ones.
fn scribble(map: &Mapping, random: &mut Random, spare_state: bool) {
    let offset = match random.below(5) {
        0 => layout::OFF_DIRECTION[random.below(2)] + random.below(6) * 64,
        1 => layout::OFF_SLOTS_AREA + random.below(8) * 64 + random.below(4) * 8,
        2 => layout::returns_offset(SLOTS, random.below(2)) + random.below(8) * 8,
        3 => layout::loans_offset(SLOTS) + random.below(2 * SLOTS as usize) * layout::RECORD + random.below(3) * 8,
        _ => random.below(map.len() / 8) * 8,
    };
    if spare_state && offset == layout::OFF_STATE {
        return;
    }
    let word = match random.below(4) {
        0 => random.below(80) as u64,
        1 => layout::emit(random.below(2 * POOL), random.next(), random.below(2) == 0)[0],
        2 => map.u64_at(offset & !7).load(Ordering::Relaxed).wrapping_add(random.below(5) as u64),
        _ => random.next(),
    };
    map.u64_at(offset & !7).store(word, Ordering::Relaxed);
}

/// One call of each kind; what it says does not matter, but that it says it. At most a ring's messages a burst.
fn exercise(end: &mut End, random: &mut Random, held: &mut Vec<PoolRef>) {
    let _ = end.tx.check();
    let len = random.below(2000);
    let _ = end.tx.put(random.next(), &vec![1; len]);
    if let Ok(loan) = end.tx.loan(random.below(POOL + 100)) {
        if random.below(2) == 0 || end.tx.put_loan(1, loan).is_err() {
            end.core.cancel_loan(loan.place.token);
        }
    }
    end.tx.publish();
    let _ = (end.tx.room(), end.tx.arm_stalled(ARMED_EVENT), end.tx.still_stalled());
    for _ in 0..2 * SLOTS {
        if end.rx.check().is_err() {
            break;
        }
        let Ok(Some(header)) = end.rx.peek() else { break };
        assert!(header.len <= layout::INLINE_MAX.max(POOL));
        if header.pooled && random.below(2) == 0 {
            if let Ok(place) = end.rx.take_pooled(header) {
                end.core.peer_pool().expect("a pool").read(place.offset as usize, &mut vec![0; header.len]);
                held.push(place);
            }
        } else {
            let _ = end.rx.take_into(header, &mut vec![0; header.len]);
        }
    }
    if held.len() > 4 {
        end.core.give_back(held.swap_remove(random.below(held.len())).token);
    }
    let _ = (end.rx.arm(ARMED_EVENT), end.rx.idle(), end.core.loans_out(), end.core.state_name());
}

fn fault_of(end: &End) -> Option<Fault> {
    match end.core.check() {
        Err(Error::Faulted(fault)) => Some(fault),
        _ => None,
    }
}

#[test]
fn a_scribbling_peer_is_survived_in_every_call() {
    let seed = seed();
    let mut random = Random::new(seed);
    for round in 0..60u64 {
        let segments = Segments::new(SLOTS, POOL, POOL);
        let mut ends = [segments.client(), segments.server()];
        let stop = AtomicBool::new(false);
        let wild = Random::new(seed ^ (round << 32));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut wild = wild;
                let mut map = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    // Mostly the state word is left alone, or everything would end at once.
                    scribble(&segments.map, &mut wild, map % 5000 != 4999);
                    map += 1;
                    if map % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let mut held = [Vec::new(), Vec::new()];
            for turn in 0..200 {
                for (end, held) in ends.iter_mut().zip(&mut held) {
                    exercise(end, &mut random, held);
                }
                if turn % 10 == 0 {
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn a_fault_is_for_good_whatever_is_written_afterwards() {
    let mut random = Random::new(seed());
    for _ in 0..200 {
        let segments = Segments::new(SLOTS, POOL, POOL);
        let (mut client, mut server) = (segments.client(), segments.server());
        client.tx.put(0, b"sound").expect("room");
        client.tx.publish();
        segments.word(layout::OFF_SLOTS_AREA, random.next() | 0xff00);
        let Err(Error::Faulted(fault)) = take(&mut server.rx) else { panic!("a wrong opcode was taken") };
        assert_eq!(fault, Fault::Opcode);
        segments.word(layout::OFF_SLOTS_AREA, layout::emit(5, 0, false)[0]);
        for _ in 0..20 {
            scribble(&segments.map, &mut random, false);
            segments.set_state(State::Open);
            assert_eq!(fault_of(&server), Some(Fault::Opcode));
            assert!(matches!(take(&mut server.rx), Err(Error::Faulted(Fault::Opcode))));
            assert!(matches!(server.tx.check(), Err(Error::Faulted(Fault::Opcode))));
        }
        // The state word told the client, until it was overwritten; its own memory is unharmed either way.
        let _ = client.tx.check();
    }
}

#[test]
fn an_engine_drops_scribbled_channels_and_serves_the_others() {
    let mut random = Random::new(seed());
    let mut echo = engine::make("echo").expect("shipped");
    for _ in 0..30 {
        let (bad, good) = (Segments::new(SLOTS, POOL, POOL), Segments::new(SLOTS, POOL, POOL));
        let mut client = good.client();
        let mut channels = Channels::default();
        for (id, segments) in [(1, &bad), (2, &good)] {
            let end = segments.server();
            channels.attach(Channel::new(id, end.tx, end.rx, id as usize).expect("a line"));
        }
        let mut state = open_state(&state(Vec::new()));
        ledger::take(&mut state, None, 1).expect("blank");
        ledger::take_channels(&mut state, channels.served());
        for number in 0..200u64 {
            (0..20).for_each(|_| scribble(&bad.map, &mut random, true));
            let body = vec![number as u8; random.below(3000)];
            client.tx.put(number, &body).expect("room: every message is answered");
            client.tx.publish();
            let mut answer = None;
            for _ in 0..4 {
                echo.poll(&mut channels, &mut state, 64).expect("sound");
                ledger::commit(&mut state, channels.served());
                answer = answer.or(take(&mut client.rx).expect("sound"));
            }
            assert_eq!(answer, Some((number, body)));
        }
        assert!(channels
            .take_dropped()
            .iter()
            .all(|(channel, error)| channel.id == 1 && !error.to_string().is_empty()));
        assert!(channels.iter_mut().any(|channel| channel.id == 2));
    }
}

#[test]
fn whatever_a_client_wrote_a_successor_takes_over_or_faults_that_channel_alone() {
    let mut random = Random::new(seed());
    let mut echo = engine::make("echo").expect("shipped");
    for _ in 0..150 {
        let fd = state(Vec::new());
        let (bad, good) = (Segments::new(SLOTS, POOL, POOL), Segments::new(SLOTS, POOL, POOL));
        let (mut client, mut liar) = (good.client(), bad.client());
        let (mut number, mut answered) = (0, 0);
        for generation in 0..6 {
            let mut channels = Channels::default();
            for (id, segments) in [(1, &bad), (2, &good)] {
                // One that is faulted is not offered again.
                if let Ok(end) = segments.open(Role::Server, 3) {
                    channels.attach(Channel::new(id, end.tx, end.rx, id as usize).expect("a line"));
                }
            }
            let mut state = open_state(&fd);
            ledger::take(&mut state, None, generation).expect("the state is nobody else's");
            assert!(ledger::take_channels(&mut state, channels.served()).len() <= 1);
            for turn in 0..4 {
                let _ = liar.tx.put(number, &vec![1; random.below(3000)]);
                liar.tx.publish();
                client.tx.put(number, &vec![number as u8; 100 + 40 * number as usize]).expect("room");
                client.tx.publish();
                number += 1;
                (0..random.below(12)).for_each(|_| scribble(&bad.map, &mut random, true));
                echo.poll(&mut channels, &mut state, 64).expect("sound");
                // The last poll dies before its commit.
                if turn < 3 {
                    ledger::commit(&mut state, channels.served());
                }
            }
            while let Some((tag, body)) = take(&mut client.rx).expect("sound") {
                assert_eq!((tag, body), (answered, vec![answered as u8; 100 + 40 * answered as usize]));
                answered += 1;
            }
            assert!(channels.iter_mut().any(|channel| channel.id == 2), "the sound channel was dropped");
        }
        assert!(answered >= number - 1);
    }
}

#[test]
fn each_lie_to_a_successor_has_its_name() {
    let (up, down) = (layout::OFF_DIRECTION[0], layout::OFF_DIRECTION[1]);
    let (loan, claim) = (layout::loans_offset(SLOTS), layout::claims_offset(SLOTS));
    let lies: [(&[(usize, u64)], Fault); 9] = [
        (&[(up + layout::DIR_TAIL, 1 << 40)], Fault::Index),
        (&[(down + layout::DIR_HEAD, 2)], Fault::Index),
        // More than the pool, at no multiple of 64, nothing at all, over another one.
        (&[(loan, 1 << 32 | 257)], Fault::Record),
        (&[(loan + 8, 1)], Fault::Record),
        (&[(loan + 8, u64::MAX - 63)], Fault::Record),
        (&[(loan, 1 << 32)], Fault::Record),
        (&[(loan + layout::RECORD, 1 << 32 | 2), (loan + layout::RECORD + 16, 1)], Fault::Record),
        (&[(claim, 7), (claim + 8, 1), (claim + 16, 0)], Fault::Record),
        (&[(claim, u64::MAX), (claim + 8, 1), (claim + 16, u64::MAX)], Fault::Record),
    ];
    for (words, expected) in lies {
        let (fd, segments) = (state(Vec::new()), Segments::new(SLOTS, POOL, POOL));
        let mut client = segments.client();
        client.tx.put(0, &[1; 4000]).expect("room");
        client.tx.publish();
        let serve = |generation| {
            let (mut state, mut channels, end) = (open_state(&fd), Channels::default(), segments.server());
            channels.attach(Channel::new(1, end.tx, end.rx, 1).expect("a line"));
            ledger::take(&mut state, None, generation).expect("sound");
            let faults = ledger::take_channels(&mut state, channels.served());
            engine::make("echo").expect("shipped").poll(&mut channels, &mut state, 64).expect("sound");
            ledger::commit(&mut state, channels.served());
            faults
        };
        assert!(serve(1).is_empty());
        words.iter().for_each(|(offset, word)| segments.word(*offset, *word));
        let faults = serve(2);
        assert!(matches!(faults[..], [Error::Faulted(fault)] if fault == expected), "{expected:?}: {faults:?}");
    }
}

#[test]
fn a_token_that_no_sound_client_makes_is_a_fault_of_its_channel() {
    let (fd, segments) = (state(Vec::new()), Segments::new(SLOTS, POOL, POOL));
    let (mut client, end) = (segments.client(), segments.server());
    client.tx.put(0, &[1; 4000]).expect("room");
    client.tx.publish();
    segments.word(layout::OFF_SLOTS_AREA + 24, u64::from(SLOTS));
    let mut channel = [Channel::new(1, end.tx, end.rx, 1).expect("a line")];
    assert!(ledger::take_channels(&mut open_state(&fd), &mut channel).is_empty());
    assert!(matches!(take(&mut channel[0].rx), Err(Error::Faulted(Fault::Record))));
}

#[derive(Clone, Copy, Debug)]
struct Write {
    offset: usize,
    word: u64,
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let small = prop_oneof![0u64..70, any::<u64>()];
    let control = (0usize..2, 0usize..6, small.clone())
        .prop_map(|(direction, line, word)| Write { offset: layout::OFF_DIRECTION[direction] + line * 64, word });
    let slot = (0usize..128, 0usize..4, small.clone(), any::<bool>(), 0usize..2000).prop_map(
        |(slot, word, value, sound, len)| Write {
            offset: layout::OFF_SLOTS_AREA + slot * 64 + word * 8,
            word: if sound { layout::emit(len, 0, value & 1 == 1)[0] } else { value },
        },
    );
    let anywhere = (0..layout::ring_bytes(SLOTS) / 8, small).prop_map(|(at, word)| Write { offset: at * 8, word });
    prop::collection::vec(prop_oneof![3 => control, 3 => slot, 1 => anywhere], 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_bytes_in_the_segment_are_refused_or_received_but_never_followed_outside(writes in writes(), seed: u64) {
        let segments = Segments::new(SLOTS, POOL, POOL);
        let mut ends = [segments.client(), segments.server()];
        let mut held = [Vec::new(), Vec::new()];
        let mut random = Random::new(seed);
        for write in writes {
            segments.word(write.offset, write.word);
            for (end, held) in ends.iter_mut().zip(&mut held) {
                let before = fault_of(end);
                exercise(end, &mut random, held);
                if before.is_some() && end.core.state_name() == "faulted" {
                    prop_assert!(fault_of(end).is_some());
                }
            }
        }
    }

    #[test]
    fn any_header_is_accepted_only_when_it_is_the_granted_one(words: [u64; 4]) {
        let segments = Segments::new(SLOTS, POOL, POOL);
        for (at, word) in words.iter().enumerate() {
            segments.word(at * 8, *word);
        }
        let refused = segments.open(Role::Client, 3);
        prop_assert!(matches!(refused, Err(Error::Faulted(_))));
    }
}

#[test]
fn each_lie_has_its_name() {
    let slot = layout::OFF_SLOTS_AREA;
    let tail = layout::OFF_DIRECTION[0] + layout::DIR_TAIL;
    let lies: [(&[(usize, u64)], Fault); 9] = [
        (&[(tail, 65)], Fault::Index),
        (&[(tail, u64::MAX)], Fault::Index),
        (&[(slot, 2), (tail, 1)], Fault::Opcode),
        (&[(slot, 1 | 2 << 16), (tail, 1)], Fault::Flags),
        (&[(slot, 1 | 49 << 32), (tail, 1)], Fault::Length),
        (&[(slot, 1 | 1009 << 32), (tail, 64)], Fault::Length),
        (&[(slot, 1 | 1 << 16 | (POOL as u64 + 1) << 32), (tail, 1)], Fault::Length),
        (&[(slot, 1 | 1 << 16 | 64 << 32), (slot + 16, POOL as u64 - 63), (tail, 1)], Fault::Offset),
        (&[(slot, 1 | 1 << 16 | 64 << 32), (slot + 16, u64::MAX), (tail, 1)], Fault::Offset),
    ];
    for (words, expected) in lies {
        let segments = Segments::new(SLOTS, POOL, POOL);
        let mut server = segments.server();
        words.iter().for_each(|(offset, word)| segments.word(*offset, *word));
        match take(&mut server.rx) {
            Err(Error::Faulted(fault)) => assert_eq!(fault, expected),
            other => panic!("{expected:?} was not noticed: {other:?}"),
        }
    }

    let control = layout::OFF_DIRECTION[0];
    let lies: [(&[(usize, u64)], Fault); 5] = [
        (&[(control + layout::DIR_HEAD, 2)], Fault::Index),
        (&[(control + layout::DIR_RETURN_TAIL, 65)], Fault::Index),
        (&[(control + layout::DIR_RETURN_TAIL, 1)], Fault::Return),
        (&[(layout::returns_offset(SLOTS, 0), 1 << 40), (control + layout::DIR_RETURN_TAIL, 1)], Fault::Return),
        (&[(layout::OFF_STATE, 77)], Fault::State),
    ];
    for (words, expected) in lies {
        let segments = Segments::new(SLOTS, POOL, POOL);
        let mut client = segments.client();
        client.tx.put(0, b"one slot").expect("room");
        client.tx.publish();
        words.iter().for_each(|(offset, word)| segments.word(*offset, *word));
        // Tokens that came back are looked at when the pool has nothing left to lend.
        let outcome = client
            .tx
            .slots_free()
            .and_then(|_| client.tx.check())
            .and_then(|()| (0..=SLOTS).try_for_each(|_| client.tx.loan(1).map(drop)));
        assert!(matches!(outcome, Err(Error::Faulted(fault)) if fault == expected), "{expected:?}: {outcome:?}");
    }
}

#[test]
fn a_shrunk_segment_faults_its_channel_and_no_other() {
    use rustix::fs::ftruncate;
    let (shrunk, other) = (Segments::new(SLOTS, POOL, POOL), Segments::new(SLOTS, POOL, POOL));
    let (mut client, mut server) = (shrunk.client(), shrunk.server());
    let mut bystander = other.client();
    client.tx.put(0, &[1; 4000]).expect("room");
    client.tx.publish();
    ftruncate(&shrunk.pools[0].0, 0).expect("a memfd without seals");
    let _ = take(&mut server.rx);
    assert!(matches!(server.rx.check(), Err(Error::Faulted(Fault::Shrunk))));
    ftruncate(&shrunk.ring, 4096).expect("a memfd without seals");
    let _ = client.tx.put(0, b"into a ring that is not there");
    assert!(matches!(client.tx.check(), Err(Error::Faulted(_))));
    bystander.tx.check().expect("another channel");
    bystander.tx.put(0, b"as before").expect("another channel");
}
