//! How fast ports are: `cargo test --release --test pony_port -- --ignored --nocapture`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{clock_gettime, ClockId};
use snap_dataplane::pony::port::{Address, Port};

use super::{peer, udp, Cable};

/// Packets that a sender writes before it flushes.
const BURST: usize = 32;
const LONG_ENOUGH: Duration = Duration::from_secs(1);

/// Write a burst of packets and send them.
fn send(port: &mut impl Port, target: Address, size: usize) {
    for _ in 0..BURST {
        let Some(frame) = port.frame() else {
            break;
        };
        frame[..size].fill(1);
        port.push(size, target, 0);
    }
    port.flush().expect("flush");
}

/// Packets per second of one port to another, each on a thread of its own.
fn race(mut from: impl Port + Send, mut to: impl Port, target: Address, size: usize) -> f64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                send(&mut from, target, size);
            }
        });
        let start = Instant::now();
        let mut packets = 0;
        while start.elapsed() < LONG_ENOUGH {
            packets += to.receive().expect("receive");
        }
        stop.store(true, Ordering::Relaxed);
        packets as f64 / start.elapsed().as_secs_f64()
    })
}

/// Packets per second of processor time that both ports take, in turns on one thread.
fn turns(mut from: impl Port, mut to: impl Port, target: Address, size: usize) -> f64 {
    let used = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let start = used();
    let mut packets = 0;
    while used() - start < LONG_ENOUGH {
        for _ in 0..4 {
            send(&mut from, target, size);
            packets += to.receive().expect("receive");
        }
    }
    packets as f64 / (used() - start).as_secs_f64()
}

fn print(name: &str, size: usize, rates: [f64; 2]) {
    let [turns, race] = rates.map(|rate| format!("{:6.2} Mpps {:6.1} Gbps", rate / 1e6, rate * size as f64 * 8e-9));
    println!("{name:11} {size:5} B: one thread {turns}, two threads {race}");
}

#[test]
#[ignore = "measures"]
fn speed() {
    for size in [64, 1472, 5000, 8972] {
        let cable = || Cable::new(256, size as u32).ends();
        let ((a, b), (c, d)) = (cable(), cable());
        print("wire", size, [turns(a, b, peer(), size), race(c, d, peer(), size)]);
        for merge in [true, false] {
            let pair = || {
                let (mut a, mut b) = (udp(size), udp(size));
                if !merge {
                    a.merge_nothing();
                    b.merge_nothing();
                }
                let target = b.local().expect("local");
                (a, b, target)
            };
            let ((a, b, to), (c, d, too)) = (pair(), pair());
            let name = if merge { "UDP merged" } else { "UDP single" };
            print(name, size, [turns(a, b, to, size), race(c, d, too, size)]);
        }
    }
}
