//! Round trips: smoothed, their variation, the timeout that follows (RFC 6298), and what they take without a queue.
//!
//! The smallest round trip is not enough for the latter: who begins while a queue is there takes it for a part of the way,
//! and so does everybody when a queue stands for long. Flows that measure from there keep the queue, and starve those that
//! know better. Therefore a flow sends almost nothing for two round trips now and then, and believes what it sees then. That
//! helps only when all that fill the queue do so at once. Queues are where flows come together, at the host that they go to
//! or come from, and they know the clocks of both: these say when, without a word between them.

use super::Nanos;

const CLOCK: Nanos = 1_000;
/// A look without a queue is taken when one of the clocks begins a period of 2^27 ns, 134 ms: 32 of them until it wraps.
const PERIOD: u32 = 27;
/// Round trips that a look takes, from the beginning of the period. The queue is empty after the first.
const LOOK: f64 = 3.0;
/// The best of so many looks counts: each sees few packets, and ways are restless.
const LOOKS: usize = 4;
/// Round trips between looks, at least, as a number of periods: for long ways.
const APART: f64 = 128.0;

#[derive(Clone, Copy, Debug, Default)]
pub struct Rtt {
    pub smooth: f64,
    variation: f64,
    /// What the looks of this side's clock say, and those of the peer's.
    looks: [Looks; 2],
}

/// Looks at the times of one clock.
#[derive(Clone, Copy, Debug)]
struct Looks {
    /// The smallest round trip of each of the last looks and of the time since, the newest first.
    least: [Nanos; LOOKS],
    /// The present period of the clock.
    period: u32,
    /// The present look. Packets that are sent between the first two count; the smallest round trip of these.
    now: Option<(Nanos, Nanos, Option<Nanos>)>,
}

impl Default for Looks {
    fn default() -> Self {
        Looks { least: [Nanos::MAX; LOOKS], period: 0, now: None }
    }
}

impl Looks {
    fn sample(&mut self, now: Nanos, clock: u32, rtt: Nanos, smooth: f64) {
        self.least[0] = self.least[0].min(rtt);
        let left = self.begins(clock, smooth);
        match &mut self.now {
            Some((from, end, smallest)) => {
                let sent = now.saturating_sub(rtt);
                if sent >= *from && sent < *end {
                    *smallest = Some(smallest.map_or(rtt, |smallest| smallest.min(rtt)));
                }
                if now >= *end {
                    if let Some(smallest) = *smallest {
                        self.least.rotate_right(1);
                        self.least[0] = smallest;
                    }
                    self.now = None;
                }
            }
            None => {
                let counts = ((LOOK - 1.0) * smooth) as Nanos;
                self.now = left.map(|left| ((now + left).saturating_sub(counts), now + left, None));
            }
        }
    }

    /// What is left of a look, if one began by that clock.
    fn begins(&mut self, clock: u32, smooth: f64) -> Option<Nanos> {
        // A power of two, so that flows with different round trips meet.
        let every = ((smooth * APART) as Nanos >> PERIOD).clamp(1, 32).next_power_of_two() as u32;
        let length = (LOOK * smooth) as Nanos;
        let (period, phase) = (clock >> PERIOD, Nanos::from(clock & ((1 << PERIOD) - 1)));
        let is_new = std::mem::replace(&mut self.period, period) != period;
        (is_new && period % every == 0 && phase < length).then(|| length - phase)
    }
}

impl Rtt {
    pub fn known(&self) -> bool {
        self.smooth > 0.0
    }

    /// A packet and its acknowledgement took `rtt`. The latter was sent at `peer_now` of the other clock.
    pub fn sample(&mut self, now: Nanos, peer_now: u32, rtt: Nanos) {
        let rtt = rtt.max(1);
        let sample = rtt as f64;
        if self.known() {
            self.variation += ((self.smooth - sample).abs() - self.variation) / 4.0;
            self.smooth += (sample - self.smooth) / 8.0;
        } else {
            (self.smooth, self.variation) = (sample, sample / 2.0);
        }
        for (looks, clock) in self.looks.iter_mut().zip([now as u32, peer_now]) {
            looks.sample(now, clock, rtt, self.smooth);
        }
    }

    /// Whether to send almost nothing, for the sake of a look.
    pub fn looking(&self) -> bool {
        self.looks.iter().any(|looks| looks.now.is_some())
    }

    /// What a round trip takes without a queue (the smaller view: the queue is where only one of the clocks rules), as far as is known; 0 when nothing is.
    pub fn least(&self) -> Nanos {
        if self.known() {
            self.looks.iter().flat_map(|looks| looks.least).fold(Nanos::MAX, Nanos::min)
        } else {
            0
        }
    }

    /// When to give up waiting for an acknowledgement; `initial` before the first sample.
    pub fn timeout(&self, initial: Nanos, least: Nanos) -> Nanos {
        if !self.known() {
            return initial;
        }
        ((self.smooth + (4.0 * self.variation).max(CLOCK as f64)) as Nanos).max(least)
    }
}
