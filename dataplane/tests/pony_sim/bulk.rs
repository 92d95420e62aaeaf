//! How fast, how fair, and how much is queued meanwhile.

use super::link::{Faults, Link};
use super::{World, SETTINGS};
use snap_dataplane::pony::flow::{Algorithm, Nanos, Settings, MICROSECOND, MILLISECOND};

/// More tokens than anybody sends here.
const PLENTY: usize = 3_000_000;

/// The share of its link that one flow got in the second half of `time`, and the mean wait there.
fn alone(algorithm: Algorithm, rate: f64, delay: Nanos, time: Nanos) -> (f64, Nanos) {
    let link = Link::new(rate, delay, 2 * MILLISECOND);
    let mut world = World::new(1, vec![link.clone(), link]);
    world.flow(Settings { algorithm, ..SETTINGS }, (PLENTY, 0), (0, 1), 0);
    world.run_until(world.now + time / 2);
    let before = world.links[0].counts;
    world.run_until(world.now + time / 2);
    let after = world.links[0].counts;
    let share = (after.busy - before.busy) as f64 / (time / 2) as f64;
    let wait = (after.waited - before.waited) / (after.packets - before.packets).max(1);
    println!("alone, {algorithm:?}, {rate} Gbit/s, {delay} ns: {share:.3} of the link, {wait} ns queued, {after:?}");
    assert_eq!(after.dropped, 0);
    (share, wait)
}

#[test]
fn one_flow_fills_a_link() {
    // Full packets are 4 KiB, and 256 of them 84 us of 100 Gbit/s.
    for (rate, delay) in [(100.0, 5), (100.0, 30), (40.0, 20), (10.0, 10), (10.0, 250), (1.0, 50)] {
        let (share, wait) = alone(Algorithm::Swift, rate, delay * MICROSECOND, 200 * MILLISECOND);
        assert!(share >= 0.9, "{share}");
        assert!(wait < 100 * MICROSECOND, "{wait}");
        let (share, _) = alone(Algorithm::Timely, rate, delay * MICROSECOND, 200 * MILLISECOND);
        assert!(share >= 0.8, "{share}");
    }
}

struct Crowd {
    senders: usize,
    /// Each begins so long after the one before.
    apart: Nanos,
    /// They are on one host and send to many, rather than on many and send to one.
    out: bool,
    faults: Faults,
    time: Nanos,
}

const CROWD: Crowd = Crowd { senders: 100, apart: 0, out: false, faults: QUIET, time: 800 * MILLISECOND };

const QUIET: Faults =
    Faults { loss: 0.0, reorder: 0.0, extra: 0, duplicate: 0.0, corrupt: 0.0, stall: (0, 0), host: 0 };

/// Many flows over one link: Jain's index of the second half, the mean wait, and the share of packets that were dropped.
fn crowd(Crowd { senders, apart, out, faults, time }: Crowd) -> (f64, Nanos, f64) {
    let link = Link::new(100.0, 10 * MICROSECOND, MILLISECOND).with(faults);
    let mut world = World::new(7, vec![link.clone(), link]);
    for sender in 0..senders {
        // What they have to send is only counted.
        let from = world.flow(SETTINGS, (PLENTY / 4, 0), (0, 1), sender as Nanos * apart) as usize;
        if out {
            let ahead = std::mem::take(&mut world.ends[from].ahead);
            world.ends[from + 1].ahead = ahead;
        }
    }
    world.run_until(world.now + time / 2);
    world.books.iter_mut().for_each(|books| books.recent = 0);
    let before = world.links[0].counts;
    world.run_until(world.now + time / 2);
    let after = world.links[0].counts;
    let got: Vec<f64> = world.books.iter().step_by(2).map(|books| books.recent as f64).collect();
    let sum: f64 = got.iter().sum();
    let jain = sum * sum / (got.len() as f64 * got.iter().map(|got| got * got).sum::<f64>());
    let packets = (after.packets - before.packets).max(1);
    let wait = (after.waited - before.waited) / packets;
    let share = (after.busy - before.busy) as f64 / (time / 2) as f64;
    let dropped = (after.dropped - before.dropped) as f64 / packets as f64;
    let again: u64 = world.ends.iter().map(|end| end.flow.counts.again).sum();
    let timeouts: u64 = world.ends.iter().map(|end| end.flow.counts.timeouts).sum();
    println!(
        "{senders} senders, {apart} ns apart, out {out}: Jain {jain:.4}, {share:.3} of the link, {wait} ns queued, \
         {dropped:.5} dropped, in all {} dropped, {again} again, {timeouts} timeouts",
        after.dropped
    );
    assert!(share >= 0.9, "{share}");
    (jain, wait, dropped)
}

fn check(crowd_is: Crowd, even: f64, queue: Nanos) {
    let (jain, wait, dropped) = crowd(crowd_is);
    assert!(jain >= even, "{jain}");
    assert!(wait < queue, "{wait}");
    assert!(dropped < 0.0001, "{dropped}");
}

// The target is 50 us above the way, and up to 37 more for windows of one packet or more.

#[test]
fn a_hundred_senders_share_a_link() {
    check(CROWD, 0.99, 150 * MICROSECOND);
}

#[test]
fn who_comes_later_gets_as_much() {
    for (senders, out) in [(4, false), (32, false), (32, true)] {
        check(Crowd { senders, out, apart: MILLISECOND, ..CROWD }, 0.99, 120 * MICROSECOND);
    }
}

#[test]
fn a_restless_network_is_shared_as_well() {
    // It takes some looks until all of them know the way.
    let time = 1_600 * MILLISECOND;
    let faults = Faults { reorder: 1.0, extra: 10 * MICROSECOND, host: 10 * MICROSECOND, ..QUIET };
    check(Crowd { senders: 32, apart: 3 * MILLISECOND, faults, time, ..CROWD }, 0.9, 150 * MICROSECOND);
}
