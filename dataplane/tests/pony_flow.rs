//! Flows over a virtual network: everything arrives, once, whatever the network does; and as fast as it may.
#![cfg(not(loom))]

mod pony_sim;

use pony_sim::link::{Faults, Link};
use pony_sim::{World, SETTINGS};
use snap_dataplane::pony::flow::{Algorithm, Nanos, Settings, Version, MICROSECOND, MILLISECOND};

const SECOND: Nanos = 1_000 * MILLISECOND;

/// 100 Gbit/s and 20 us, with room for a millisecond: two links with the same faults.
fn links(faults: Faults) -> Vec<Link> {
    let link = Link::new(100.0, 20 * MICROSECOND, MILLISECOND).with(faults);
    vec![link.clone(), link]
}

fn run(what: &str, seed: u64, settings: Settings, tokens: (usize, usize), faults: Faults) -> World {
    let mut world = World::new(seed, links(faults));
    world.flow(settings, tokens, (0, 1), 0);
    world.finish(600 * SECOND);
    world.report(what);
    world
}

/// Both versions and algorithms, one direction and both. At most the share `again` is sent again, and `needless` of all
/// packets without need.
fn everywhere(what: &str, tokens: usize, faults: Faults, again: f64, needless: f64) {
    let mut seed = 1;
    for version in [Version::One, Version::Two] {
        for algorithm in [Algorithm::Swift, Algorithm::Timely] {
            for back in [0, tokens] {
                let settings = Settings { version, algorithm, ..SETTINGS };
                let what = format!("{what}, {version:?}, {algorithm:?}");
                let world = run(&what, seed, settings, (tokens, back), faults);
                let flow = &world.ends[0].flow;
                assert!(flow.counts.again as f64 <= flow.counts.sent as f64 * again, "{:?}", flow.counts);
                assert!(flow.spurious() as f64 <= flow.counts.sent as f64 * needless, "{}", flow.spurious());
                seed += 1;
            }
        }
    }
}

#[test]
fn a_good_network() {
    everywhere("good", 200_000, Faults::default(), 0.0, 0.0);
}

#[test]
fn loss() {
    for loss in [0.001, 0.01, 0.1] {
        everywhere(&format!("loss {loss}"), 100_000, Faults { loss, ..Faults::default() }, loss * 1.3, loss / 50.0);
    }
}

#[test]
fn reordering() {
    let extra = 30 * MICROSECOND;
    everywhere("reordering", 100_000, Faults { reorder: 0.05, extra, ..Faults::default() }, 0.001, 0.001);
}

#[test]
fn duplication() {
    everywhere("duplication", 100_000, Faults { duplicate: 0.1, ..Faults::default() }, 0.0, 0.0);
}

#[test]
fn corruption() {
    everywhere("corruption", 40_000, Faults { corrupt: 0.01, ..Faults::default() }, 0.013, 0.0002);
}

#[test]
fn stalls() {
    let stall = (20 * MILLISECOND, 6 * MILLISECOND);
    everywhere("stalls", 200_000, Faults { stall, ..Faults::default() }, 0.01, 0.005);
}

const EVERYTHING: Faults = Faults {
    loss: 0.01,
    reorder: 0.02,
    extra: 100 * MICROSECOND,
    duplicate: 0.02,
    corrupt: 0.01,
    stall: (50 * MILLISECOND, 5 * MILLISECOND),
    host: 10 * MICROSECOND,
};

#[test]
fn everything_at_once() {
    everywhere("everything", 100_000, EVERYTHING, 0.04, 0.01);
}

#[test]
fn more_reordering_than_a_round_trip_is_learnt() {
    for reorder in [0.02, 0.3] {
        for extra in [100, 400] {
            let faults = Faults { reorder, extra: extra * MICROSECOND, ..Faults::default() };
            let world = run(&format!("{reorder} late by {extra} us"), extra, SETTINGS, (200_000, 0), faults);
            let flow = &world.ends[0].flow;
            assert!(flow.counts.again * 200 < flow.counts.sent, "{:?}", flow.counts);
        }
    }
}

/// Tokens that come one at a time, each after the one before was acknowledged: every loss is one of a tail.
#[test]
fn a_lost_tail_is_probed() {
    let mut world = World::new(1, links(Faults { loss: 0.05, ..Faults::default() }));
    let me = world.flow(SETTINGS, (5_000, 0), (0, 1), 0) as usize;
    world.ends[me].one_by_one = true;
    world.finish(600 * SECOND);
    world.report("one by one");
    let counts = world.ends[me].flow.counts;
    // What remains are probes that were lost as well.
    assert!(counts.probes > 8 * counts.timeouts, "{counts:?}");
}

#[test]
fn either_side_dies_and_comes_back() {
    for seed in 1..=20 {
        for faults in [Faults::default(), EVERYTHING] {
            let mut world = World::new(seed, links(faults));
            let version = if seed % 2 == 0 { Version::One } else { Version::Two };
            let me = world.flow(Settings { version, ..SETTINGS }, (20_000, 20_000), (0, 1), 0);
            for _ in 0..10 {
                let pause = world.rng.below(3 * MILLISECOND);
                world.run_until(world.now + pause);
                let who = me + world.rng.below(2) as u32;
                world.restart(who);
            }
            world.finish(600 * SECOND);
        }
    }
}
