//! A peer that sends what no correct one does, and the mistakes that others made.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::link::{Faults, Link};
use super::{World, SETTINGS};
use snap_dataplane::pony::flow::wire::{ACK_NOW, PAYLOAD};
use snap_dataplane::pony::flow::{Flow, Header, Nanos, PeerError, Receipt, Send, Settings, Version};
use snap_dataplane::pony::flow::{MICROSECOND, MILLISECOND};

const EMPTY: Header = Header {
    version: Version::Two,
    flags: 0,
    len: 0,
    flow: 0,
    number: 0,
    epoch: 1,
    seq: 1,
    floor: 1,
    ack: 0,
    sent_at: 1,
    echo: 0,
    hold: 0,
    queued: 0,
    sack: [0; 4],
};

/// Near everything at which counting goes wrong.
fn wild() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..600,
        1 => (0u64..600).prop_map(|below| u64::MAX - below),
        1 => (0u64..600).prop_map(|above| (1 << 62) - 300 + above),
        1 => (0u64..600).prop_map(|above| (1 << 32) - 300 + above),
        1 => any::<u64>(),
    ]
}

fn wild_half() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..1_000_000, any::<u32>(), (0u32..10).prop_map(|below| u32::MAX - below)]
}

prop_compose! {
    fn header()(
        two in prop::bool::weighted(0.95), flags in 0u8..4, number in wild(), epoch in prop_oneof![4 => 0u32..3, 1 => any::<u32>()],
        (seq, floor, ack) in (wild(), wild(), wild()),
        (sent_at, echo, hold, queued) in (wild_half(), wild_half(), wild_half(), wild_half()),
        sack in prop_oneof![2 => Just([0; 4]), 1 => any::<[u64; 4]>(), 1 => (0u32..64).prop_map(|bit| [1 << bit, 0, 0, 0])],
    ) -> Header {
        let version = if two { Version::Two } else { Version::One };
        Header { version, flags, number, epoch, seq, floor, ack, sent_at, echo, hold, queued, sack, ..EMPTY }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Hostile(Header),
    Send(u8),
    Wait(Nanos),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => header().prop_map(Step::Hostile),
        1 => (1u8..40).prop_map(Step::Send),
        1 => prop_oneof![0..200 * MICROSECOND, 0..2_000 * MILLISECOND].prop_map(Step::Wait),
    ]
}

/// What an engine does with a flow that may send; the tokens that were acknowledged are taken from `open`.
fn pump(flow: &mut Flow, now: Nanos, most: u8, next: &mut u64, open: &mut BTreeSet<u64>) -> Vec<Header> {
    let mut out = Vec::new();
    for token in flow.acked() {
        assert!(open.remove(&token), "{token} is acknowledged, but is not under way");
    }
    for _ in 0..most {
        match flow.poll(now) {
            Send::Again(token) => {
                assert!(open.contains(&token));
                out.push(flow.header(now, token, 8));
            }
            Send::New => {
                open.insert(*next);
                out.push(flow.header(now, *next, 8));
                *next += 1;
            }
            Send::Nothing => break,
        }
    }
    if flow.ack_due(now) {
        out.push(flow.ack(now));
    }
    assert!(open.len() as u64 <= flow.settings.version.window());
    assert!(u64::from(flow.flying()) <= flow.settings.version.window());
    assert_eq!(flow.idle(), open.is_empty());
    assert!(flow.congestion_window().is_finite() && flow.congestion_window() > 0.0);
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Nothing breaks; and as long as the peer told no lie about what it received, what it does then right works.
    #[test]
    fn whatever_a_peer_sends(steps in prop::collection::vec(step(), 1..60)) {
        let mut flow = Flow::new(SETTINGS);
        let (mut now, mut next, mut open) = (MILLISECOND, 0, BTreeSet::new());
        let (mut number, mut epoch, mut seq) = (0u64, 0u32, 0u64);
        for step in steps {
            match step {
                Step::Wait(time) => now += time,
                Step::Send(most) => drop(pump(&mut flow, now, most, &mut next, &mut open)),
                Step::Hostile(header) => {
                    let before = flow.peer_epoch;
                    if flow.receive(now, &header, header.queued.into()).is_err() {
                        // The engine ends such a flow, but until then it must stay whole.
                        for token in flow.acked() {
                            open.remove(&token);
                        }
                    }
                    if flow.peer_epoch != before {
                        seq = 0;
                    }
                    epoch = flow.peer_epoch.unwrap_or(0);
                    number = number.max(header.number);
                    seq = seq.max(header.seq.max(header.floor).min(1 << 62));
                }
            }
            pump(&mut flow, now, 1, &mut next, &mut open);
            if let Some(deadline) = flow.deadline() {
                prop_assert!(deadline <= now + 200_000 * MILLISECOND, "it sleeps for {} ms", (deadline - now) / MILLISECOND);
            }
        }
        if seq > (1 << 62) - 3 || number > u64::MAX - 1_000_000 {
            return Ok(());
        }
        // The peer comes to its senses: it says where it is, takes everything, and sends a packet.
        let good = Header { epoch, seq: seq + 1, floor: seq + 1, number: number + 1, flags: PAYLOAD | ACK_NOW, ..EMPTY };
        prop_assert_eq!(flow.receive(now, &good, 0), Ok(Receipt::Deliver));
        let mut number = good.number;
        for _ in 0..5_000 {
            let sent = pump(&mut flow, now, 40, &mut next, &mut open);
            if next > 400 {
                break;
            }
            now += 20 * MICROSECOND;
            if sent.is_empty() {
                now = now.max(flow.paced_until()).max(flow.deadline().unwrap_or(now));
            }
            for header in sent {
                number += 1;
                // The ring is at most a window ahead of the floor, so this acknowledges all up to it and nothing that was not sent.
                let (ack, echo) = (header.floor.max(header.seq + u64::from(header.carries())), header.sent_at);
                let ack = Header { flags: 0, number, ack: ack.min(flow.used()), echo, seq: seq + 2, floor: seq + 2, ..good };
                let receipt = flow.receive(now, &ack, 0);
                prop_assert!(receipt.is_ok(), "{:?}", receipt);
            }
        }
        prop_assert!(next > 100, "only {} packets went out", next);
    }
}

fn flow() -> Flow {
    Flow::new(SETTINGS)
}

#[test]
fn a_lie_about_what_was_received_is_an_error_and_counts_for_nothing() {
    let mut flow = flow();
    for token in 0..3 {
        assert_eq!(flow.poll(0), Send::New);
        flow.header(0, token, 0);
    }
    for (ack, sack) in [(5, 0), (u64::MAX, 0), (1, 1 << 2), (2, 1 << 1), (4, 1), (0, 1 << 3), (u64::MAX, u64::MAX)] {
        let header = Header { ack, sack: [sack, 0, 0, 0], ..EMPTY };
        assert_eq!(flow.receive(1, &header, 0), Err(PeerError::AckOfNothing), "{ack} {sack}");
        assert_eq!(flow.acked().count(), 0);
    }
    let header = Header { ack: 2, sack: [1, 0, 0, 0], ..EMPTY };
    assert_eq!(flow.receive(2, &header, 0), Ok(Receipt::Nothing));
    assert_eq!(flow.acked().collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn nobody_counts_to_the_end() {
    for (seq, floor) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        let header = Header { seq, floor, flags: PAYLOAD, ..EMPTY };
        assert_eq!(flow().receive(0, &header, 0), Err(PeerError::Number));
    }
    let mut flow = flow();
    let last = Header { seq: 1 << 62, floor: 1 << 62, flags: PAYLOAD, number: u64::MAX, ..EMPTY };
    assert_eq!(flow.receive(0, &last, 0), Ok(Receipt::Deliver));
    assert_eq!(flow.receive(0, &last, 0), Ok(Receipt::Nothing));
    assert_eq!(flow.ack(0).ack, (1 << 62) + 1);
}

/// Machnet's first and second defect: the bitmap told of 64 packets where it had room for 256.
#[test]
fn every_packet_of_a_window_may_come_before_the_first() {
    for version in [Version::One, Version::Two] {
        let mut flow = Flow::new(Settings { version, ..SETTINGS });
        let window = version.window();
        let arrives = |seq| Header { version, seq, number: seq, flags: PAYLOAD, ..EMPTY };
        for seq in (2..=window).rev() {
            assert_eq!(flow.receive(0, &arrives(seq), 0), Ok(Receipt::Deliver), "{seq}");
        }
        let ack = flow.ack(0);
        assert_eq!(ack.ack, 1);
        assert!((2..=window).all(|seq| ack.sacks(seq)) && !ack.sacks(1) && !ack.sacks(window + 1));
        assert_eq!(flow.receive(0, &arrives(window + 2), 0), Err(PeerError::BeyondWindow));
        assert_eq!(flow.receive(0, &arrives(1), 0), Ok(Receipt::Deliver));
        assert_eq!(flow.ack(0).ack, window + 1);
    }
}

/// The same at the sender: once the path is known to bear it, a whole window is under way, and all of it but the first
/// packet can be acknowledged.
#[test]
fn the_whole_window_is_used() {
    for version in [Version::One, Version::Two] {
        let mut flow = Flow::new(Settings { version, ..SETTINGS });
        let (window, mut next, mut now) = (version.window(), 1, MILLISECOND);
        let ack = |number, now: Nanos, ack, sack| {
            let echo = now as u32 - 10_000;
            Header { version, number, ack, echo, sent_at: now as u32, sack, ..EMPTY }
        };
        while flow.congestion_window() < window as f64 {
            while flow.poll(now) == Send::New {
                flow.header(now, next, 0);
                next += 1;
            }
            now += 10_000;
            assert_eq!(flow.receive(now, &ack(next, now, next, [0; 4]), 0), Ok(Receipt::Nothing));
        }
        assert_eq!(flow.acked().count() as u64, next - 1);
        let first = next;
        while flow.poll(now) == Send::New {
            flow.header(now, next, 0);
            next += 1;
        }
        assert_eq!((next - first, u64::from(flow.flying())), (window, window));
        now += 10_000;
        let mut sack = [u64::MAX; 4];
        sack[window as usize / 64 - 1] >>= 1;
        sack[window as usize / 64..].fill(0);
        assert_eq!(flow.receive(now, &ack(next, now, first, sack), 0), Ok(Receipt::Nothing));
        assert_eq!((flow.acked().count() as u64, flow.flying()), (window - 1, 1));
        // Until the first is there, there is no room.
        assert_eq!(flow.poll(now), Send::Nothing);
    }
}

/// Machnet's third: what is lost is sent again after milliseconds, not seconds.
#[test]
fn a_lost_packet_costs_milliseconds() {
    let mut world = World::new(3, vec![Link::new(100.0, 20_000, MILLISECOND), Link::new(100.0, 20_000, MILLISECOND)]);
    let me = world.flow(SETTINGS, (1, 0), (0, 1), 0) as usize;
    // The very first packet, when nothing is known of the path.
    world.links[0].faults = Faults { loss: 1.0, ..Faults::default() };
    world.run_until(world.now + MILLISECOND);
    world.links[0].faults = Faults::default();
    world.finish(100 * MILLISECOND);
    let time = world.books[me].finished_at - world.ends[me].started_at;
    assert!(time < 25 * MILLISECOND, "{time}");
}

/// Machnet's fifth: a flow whose peer is silent goes on, says for how long, and recovers soon after the peer does.
#[test]
fn a_silent_peer_is_reported_and_waited_for() {
    let mut world = World::new(4, vec![Link::new(100.0, 20_000, MILLISECOND), Link::new(100.0, 20_000, MILLISECOND)]);
    let me = world.flow(SETTINGS, (200_000, 0), (0, 1), 0) as usize;
    world.run_until(world.now + 5 * MILLISECOND);
    world.links[1].faults = Faults { loss: 1.0, ..Faults::default() };
    let (began, sent) = (world.now, world.ends[me].flow.counts.sent);
    world.run_until(world.now + 30_000 * MILLISECOND);
    let end = &world.ends[me];
    let silence = end.flow.silence(world.now + end.ahead);
    assert!(silence > 29_990 * MILLISECOND && silence <= 30_001 * MILLISECOND, "{silence}");
    assert!(end.flow.counts.timeouts > 10);
    // A window, and then little: nobody floods who does not answer.
    let sent = end.flow.counts.sent - sent;
    assert!(sent < 256 + 100, "{sent}");
    world.links[1].faults = Faults::default();
    world.finish(2_000 * MILLISECOND);
    assert!(world.books[me].finished_at - began < 31_000 * MILLISECOND);
    assert_eq!(world.ends[me].flow.silence(world.now), 0);
}

/// Nothing but acknowledgements is lost, a half of them: nothing is sent again for it but the last ones.
#[test]
fn a_lost_acknowledgement_heals() {
    let back = Link::new(100.0, 20_000, MILLISECOND).with(Faults { loss: 0.5, ..Faults::default() });
    let mut world = World::new(5, vec![Link::new(100.0, 20_000, MILLISECOND), back]);
    let me = world.flow(SETTINGS, (100_000, 0), (0, 1), 0) as usize;
    world.finish(2_000 * MILLISECOND);
    world.report("half of the acknowledgements");
    let counts = world.ends[me].flow.counts;
    assert!(counts.again * 100 < counts.sent, "{counts:?}");
    // One for eight packets or fewer, and none for another acknowledgement.
    assert!(world.ends[me + 1].flow.counts.acks * 4 < counts.sent);
}
