//! Swift (Kumar et al., SIGCOMM 2020): two windows, for the fabric and for the receiving end, each led by its own delay and
//! target; the smaller one counts.
//!
//! The paper's base target follows from the topology, which we do not know: the smallest round trip of late takes the place
//! of propagation and hops, and `BASE` is what may be queued on top of it.

use super::congestion::Sample;
use super::rtt::Rtt;
use super::{Nanos, MICROSECOND};

const BASE: Nanos = 50 * MICROSECOND;
const ENDPOINT: Nanos = 100 * MICROSECOND;
/// Added to the target of small windows, so that many flows share a link fairly and stay stable.
const SCALING: f64 = 5.0 * 25_000.0;
const SCALING_FROM: f64 = 0.1;
const SCALING_TO: f64 = 100.0;
/// Packets more per round trip.
const INCREASE: f64 = 1.0;
const DECREASE: f64 = 0.8;
const MOST_DECREASE: f64 = 0.5;
const LEAST: f64 = 0.001;
const INITIAL: f64 = 16.0;
/// Timeouts in a row after which the window is the smallest.
const RESET: u32 = 5;

#[derive(Clone, Copy, Debug)]
struct Led {
    window: f64,
    decreased_at: Nanos,
}

impl Led {
    /// Whether there was a round trip since the last decrease: the effect of that one is seen before there is another.
    fn may_decrease(&self, now: Nanos, rtt: &Rtt) -> bool {
        self.decreased_at == 0 || now.saturating_sub(self.decreased_at) as f64 >= rtt.smooth
    }

    fn decrease(&mut self, now: Nanos, factor: f64) {
        self.window *= factor;
        self.decreased_at = now;
    }

    fn follow(&mut self, now: Nanos, rtt: &Rtt, acked: f64, delay: f64, target: f64, most: f64) {
        if delay < target {
            self.window += if self.window >= 1.0 { INCREASE * acked / self.window } else { INCREASE * acked };
        } else if self.may_decrease(now, rtt) {
            self.decrease(now, (1.0 - DECREASE * (delay - target) / delay).max(1.0 - MOST_DECREASE));
        }
        self.window = self.window.clamp(LEAST, most);
    }
}

#[derive(Clone, Debug)]
pub struct Swift {
    fabric: Led,
    endpoint: Led,
    most: f64,
    timeouts: u32,
}

impl Swift {
    pub fn new(most: f64) -> Swift {
        let led = Led { window: INITIAL.min(most), decreased_at: 0 };
        Swift { fabric: led, endpoint: Led { window: most, ..led }, most, timeouts: 0 }
    }

    pub fn window(&self) -> f64 {
        self.fabric.window.min(self.endpoint.window)
    }

    /// What the fabric may take, of a flow with the present window.
    fn target(&self, rtt: &Rtt) -> f64 {
        let alpha = SCALING / (1.0 / SCALING_FROM.sqrt() - 1.0 / SCALING_TO.sqrt());
        let beta = -alpha / SCALING_TO.sqrt();
        let scaled = (alpha / self.fabric.window.sqrt() + beta).clamp(0.0, SCALING);
        rtt.least() as f64 + BASE as f64 + scaled
    }

    pub fn congested(&self, rtt: &Rtt, sample: Sample) -> bool {
        sample.rtt.saturating_sub(sample.queued) as f64 > self.target(rtt)
    }

    pub fn on_ack(&mut self, now: Nanos, rtt: &Rtt, sample: Sample) {
        self.timeouts = 0;
        let (acked, fabric) = (f64::from(sample.acked), sample.rtt.saturating_sub(sample.queued) as f64);
        let target = self.target(rtt);
        self.fabric.follow(now, rtt, acked, fabric, target, self.most);
        self.endpoint.follow(now, rtt, acked, sample.queued as f64, ENDPOINT as f64, self.most);
    }

    pub fn on_loss(&mut self, now: Nanos, rtt: &Rtt) {
        if self.fabric.may_decrease(now, rtt) {
            self.fabric.decrease(now, 1.0 - MOST_DECREASE);
            self.fabric.window = self.fabric.window.max(LEAST);
        }
    }

    pub fn on_timeout(&mut self, now: Nanos, rtt: &Rtt) {
        self.timeouts += 1;
        if self.timeouts >= RESET {
            self.fabric.window = LEAST;
            self.fabric.decreased_at = now;
        } else {
            self.on_loss(now, rtt);
        }
    }
}
