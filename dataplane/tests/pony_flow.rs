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

/// Both versions and algorithms, one direction and both.
fn everywhere(what: &str, tokens: usize, faults: Faults) {
    let mut seed = 1;
    for version in [Version::One, Version::Two] {
        for algorithm in [Algorithm::Swift, Algorithm::Timely] {
            for back in [0, tokens] {
                let settings = Settings { version, algorithm, ..SETTINGS };
                let what = format!("{what}, {version:?}, {algorithm:?}");
                run(&what, seed, settings, (tokens, back), faults);
                seed += 1;
            }
        }
    }
}

#[test]
fn a_good_network() {
    everywhere("good", 100_000, Faults::default());
}

#[test]
fn loss() {
    for loss in [0.001, 0.01, 0.1] {
        everywhere(&format!("loss {loss}"), 40_000, Faults { loss, ..Faults::default() });
    }
}

#[test]
fn reordering() {
    let extra = 30 * MICROSECOND;
    everywhere("reordering", 100_000, Faults { reorder: 0.05, extra, ..Faults::default() });
}

#[test]
fn duplication() {
    everywhere("duplication", 100_000, Faults { duplicate: 0.1, ..Faults::default() });
}

#[test]
fn corruption() {
    everywhere("corruption", 40_000, Faults { corrupt: 0.01, ..Faults::default() });
}

#[test]
fn stalls() {
    everywhere("stalls", 60_000, Faults { stall: (20 * MILLISECOND, 6 * MILLISECOND), ..Faults::default() });
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
    everywhere("everything", 40_000, EVERYTHING);
}
