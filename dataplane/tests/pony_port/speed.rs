//! How fast ports are: `cargo test --release --test pony_port -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use snap_dataplane::pony::port::{Address, Port};

use super::{peer, udp, Cable};

/// Packets per second and Gbps of one port to another, each on a thread of its own.
fn race(mut from: impl Port + Send + 'static, mut to: impl Port, target: Address, size: usize) -> (f64, f64) {
    use std::sync::atomic::{AtomicBool, Ordering};
    static STOP: AtomicBool = AtomicBool::new(false);
    STOP.store(false, Ordering::Relaxed);
    let sender = std::thread::spawn(move || {
        while !STOP.load(Ordering::Relaxed) {
            for _ in 0..32 {
                let Some(frame) = from.frame() else {
                    break;
                };
                frame[..size].fill(1);
                from.push(size, target, 0);
            }
            from.flush().expect("flush");
        }
    });
    let start = Instant::now();
    let (mut packets, mut sum) = (0u64, 0u64);
    while start.elapsed() < Duration::from_secs(2) {
        let burst = to.receive().expect("receive");
        sum += (0..burst).map(|index| u64::from(to.packet(index).0[0])).sum::<u64>();
        packets += burst as u64;
    }
    let rate = packets as f64 / start.elapsed().as_secs_f64();
    STOP.store(true, Ordering::Relaxed);
    sender.join().expect("sender");
    assert_eq!(sum, packets);
    (rate, rate * size as f64 * 8e-9)
}

#[test]
#[ignore = "measures"]
fn speed() {
    for size in [64, 1472, 5000, 8972] {
        let (mpps, gbps) = {
            let (a, b) = Cable::new(512, size as u32).ends();
            race(a, b, peer(), size)
        };
        println!("wire          {size:5} B: {:6.2} Mpps {gbps:6.1} Gbps", mpps / 1e6);
        for merge in [true, false] {
            let (mut a, mut b) = (udp(size), udp(size));
            if !merge {
                a.merge_nothing();
                b.merge_nothing();
            }
            let target = b.local().expect("local");
            let (mpps, gbps) = race(a, b, target, size);
            let name = if merge { "UDP merged" } else { "UDP single" };
            println!("{name}    {size:5} B: {:6.2} Mpps {gbps:6.1} Gbps", mpps / 1e6);
        }
    }
}
