//! The bad network does what it was told, and the same each time.

use std::cell::Cell;
use std::rc::Rc;

use snap_dataplane::pony::port::faulty::{Faults, Faulty, Toll};
use snap_dataplane::pony::port::Port;

use super::{is_packet, peer, push, Cable};

/// A clock that moves when it is told to.
#[derive(Clone, Default)]
struct Clock(Rc<Cell<u64>>);

impl Clock {
    fn reader(&self) -> impl Fn() -> u64 {
        let time = self.0.clone();
        move || time.get()
    }
}

/// Send `count` packets of 100 bytes, one each microsecond, through `faults`; what came and when, in microseconds.
fn travel(faults: Faults, seed: u64, count: u64) -> (Vec<(u64, Vec<u8>)>, Toll) {
    let cable = Cable::new(1024, 100);
    let (a, mut b) = cable.ends();
    let clock = Clock::default();
    let mut a = Faulty::new(a, faults, seed, clock.reader());
    let mut arrived = Vec::new();
    for number in 0.. {
        if number < count {
            assert!(push(&mut a, number, 100, peer(), 0));
        } else if a.due().is_none() {
            break;
        }
        a.flush().expect("flush");
        let burst = b.receive().expect("receive");
        arrived.extend((0..burst).map(|index| (number, b.packet(index).0.to_vec())));
        clock.0.set(clock.0.get() + 1000);
    }
    (arrived, a.toll())
}

const BAD: Faults = Faults {
    loss: 0.1,
    duplicate: 0.1,
    corrupt: 0.1,
    reorder: 0.2,
    lateness: 50_000,
    delay: 10_000,
    rate: 0,
    queue: 0,
    stall_every: 0,
    stall: 0,
};

#[test]
fn the_same_seed_gives_the_same_faults() {
    let first = travel(BAD, 1, 2000);
    assert_eq!(first, travel(BAD, 1, 2000));
    assert_ne!(first, travel(BAD, 2, 2000));
}

#[test]
fn each_fault_is_what_it_says() {
    let (arrived, toll) = travel(BAD, 3, 2000);
    let whole = |packet: &[u8]| (0..2000).any(|number| is_packet(packet, number, 100));
    let wrong = arrived.iter().filter(|(_, packet)| !whole(packet)).count() as u64;
    for (count, chance) in [(toll.lost, 0.1), (toll.duplicated, 0.1), (toll.corrupted, 0.1), (toll.reordered, 0.2)] {
        assert!((chance * 1500.0..chance * 2500.0).contains(&(count as f64)), "{toll:?}");
    }
    assert_eq!(arrived.len() as u64, 2000 - toll.lost + toll.duplicated);
    assert!((toll.corrupted..=2 * toll.corrupted).contains(&wrong));
}

#[test]
fn a_perfect_network_changes_nothing() {
    let (arrived, toll) = travel(Faults::default(), 5, 500);
    assert_eq!(toll, Toll::default());
    assert!(arrived.iter().zip(0..).all(|((time, packet), number)| *time == number && is_packet(packet, number, 100)));
    assert_eq!(arrived.len(), 500);
}

#[test]
fn one_fault_more_leaves_the_others() {
    let fewer = travel(Faults { corrupt: 0.0, ..BAD }, 9, 2000);
    let more = travel(BAD, 9, 2000);
    assert_eq!(Toll { corrupted: 0, ..more.1 }, fewer.1);
    assert_eq!(more.0.len(), fewer.0.len());
}

#[test]
fn a_slow_link_takes_its_time_and_has_a_queue() {
    // 100 bytes take two microseconds, and one comes each: half of them leave after the last has come.
    let slow = Faults { rate: 50_000_000, ..Faults::default() };
    let (arrived, toll) = travel(slow, 1, 100);
    assert_eq!(arrived.iter().map(|(time, _)| *time).collect::<Vec<_>>(), (1..=100).map(|n| 2 * n).collect::<Vec<_>>());
    assert_eq!(toll, Toll::default());
    let (arrived, toll) = travel(Faults { queue: 500, ..slow }, 1, 100);
    assert_eq!(arrived.len() as u64, 100 - toll.overflowed);
    assert!((40..=50).contains(&toll.overflowed), "{toll:?}");
}

#[test]
fn a_stalled_link_holds_everything_until_it_moves() {
    let (arrived, _) = travel(Faults { stall_every: 20_000, stall: 15_000, ..Faults::default() }, 1, 40);
    assert_eq!(arrived.len(), 40);
    assert!(arrived.iter().all(|(time, _)| time % 20 < 5));
    assert_eq!(arrived.iter().filter(|(time, _)| *time == 20).count(), 16);
}
