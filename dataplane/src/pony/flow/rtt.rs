//! Round trips: smoothed, their variation, the timeout that follows (RFC 6298), and the smallest of late.

use super::{Nanos, MILLISECOND};

/// The smallest of this long counts.
const LATE: Nanos = 10_000 * MILLISECOND;
const CLOCK: Nanos = 1_000;

#[derive(Clone, Copy, Debug)]
pub struct Rtt {
    pub smooth: f64,
    variation: f64,
    /// The smallest of this period and of the one before.
    least: [Nanos; 2],
    period: Nanos,
}

impl Default for Rtt {
    fn default() -> Self {
        Rtt { smooth: 0.0, variation: 0.0, least: [Nanos::MAX; 2], period: 0 }
    }
}

impl Rtt {
    pub fn known(&self) -> bool {
        self.smooth > 0.0
    }

    pub fn sample(&mut self, now: Nanos, rtt: Nanos) {
        let sample = rtt.max(1) as f64;
        if self.known() {
            self.variation += ((self.smooth - sample).abs() - self.variation) / 4.0;
            self.smooth += (sample - self.smooth) / 8.0;
        } else {
            (self.smooth, self.variation) = (sample, sample / 2.0);
        }
        if now.saturating_sub(self.period) > LATE {
            self.period = now;
            self.least = [Nanos::MAX, self.least[0]];
        }
        self.least[0] = self.least[0].min(rtt.max(1));
    }

    /// The smallest of the last ten to twenty seconds; what is smoothed when there is none.
    pub fn least(&self) -> Nanos {
        match self.least[0].min(self.least[1]) {
            Nanos::MAX => self.smooth as Nanos,
            least => least,
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
