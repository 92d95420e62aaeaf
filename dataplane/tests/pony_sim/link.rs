//! A link of the virtual network: a queue with a rate behind it, a delay, and everything that goes wrong on real ones.

use snap_dataplane::pony::flow::Nanos;

/// Splitmix64: the same numbers for the same seed, everywhere.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn chance(&mut self, share: f64) -> bool {
        share > 0.0 && (self.next() >> 11) as f64 / ((1u64 << 53) as f64) < share
    }
}

/// What goes wrong, as shares of the packets.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    pub loss: f64,
    pub reorder: f64,
    /// How much later a reordered packet comes, at most.
    pub extra: Nanos,
    pub duplicate: f64,
    pub corrupt: f64,
    /// The link stands still for `stall.1` of every `stall.0` ns.
    pub stall: (Nanos, Nanos),
    /// How long packets wait at their receiver, at most.
    pub host: Nanos,
}

#[derive(Clone)]
pub struct Link {
    /// Bits per ns, which is Gbit/s.
    pub rate: f64,
    pub delay: Nanos,
    /// A packet that would wait for longer is dropped.
    pub limit: Nanos,
    pub faults: Faults,
    busy_until: Nanos,
    pub counts: Counts,
}

#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    pub packets: u64,
    pub dropped: u64,
    pub lost: u64,
    /// The sum of all waits, and of the times that the link was busy.
    pub waited: Nanos,
    pub busy: Nanos,
}

/// When copies of a packet arrive, and how long each waits at the receiver.
pub type Arrivals = [Option<(Nanos, Nanos)>; 2];

impl Link {
    pub fn new(rate: f64, delay: Nanos, limit: Nanos) -> Link {
        Link { rate, delay, limit, faults: Faults::default(), busy_until: 0, counts: Counts::default() }
    }

    pub fn with(self, faults: Faults) -> Link {
        Link { faults, ..self }
    }

    /// `size` bytes of `packet` set out at `now`; the packet may be changed on the way.
    pub fn send(&mut self, now: Nanos, size: usize, packet: &mut [u8], rng: &mut Rng) -> Arrivals {
        let Faults { loss, reorder, extra, duplicate, corrupt, stall, host } = self.faults;
        self.counts.packets += 1;
        let mut start = now.max(self.busy_until);
        if start - now > self.limit {
            self.counts.dropped += 1;
            return [None; 2];
        }
        if stall.0 > 0 && start % stall.0 < stall.1 {
            start += stall.1 - start % stall.0;
        }
        let time = (size as f64 * 8.0 / self.rate) as Nanos;
        self.counts.waited += start - now;
        self.counts.busy += time;
        self.busy_until = start + time;
        if rng.chance(loss) {
            self.counts.lost += 1;
            return [None; 2];
        }
        if rng.chance(corrupt) {
            for _ in 0..=rng.below(3) {
                let bit = rng.below(packet.len() as u64 * 8) as usize;
                packet[bit / 8] ^= 1 << (bit % 8);
            }
        }
        let mut arrival = || {
            let late = if rng.chance(reorder) { rng.below(extra) } else { 0 };
            let waits = if host > 0 { rng.below(host) } else { 0 };
            (self.busy_until + self.delay + late + waits, waits)
        };
        let first = arrival();
        let second = arrival();
        [Some(first), rng.chance(duplicate).then_some(second)]
    }
}
