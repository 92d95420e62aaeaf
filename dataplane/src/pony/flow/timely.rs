//! Timely (Mittal et al., SIGCOMM 2015), in the form of Zhu et al. (CoNEXT 2016) that has one fixed point: the rate follows
//! the gradient of round trips. Rates are kept in packets per second.

use super::congestion::Sample;
use super::rtt::Rtt;
use super::{Nanos, MICROSECOND};

/// Queued, that is above the smallest round trip: the paper's thresholds are for round trips, and those of one building.
const LOW: f64 = 50.0 * MICROSECOND as f64;
const HIGH: f64 = 500.0 * MICROSECOND as f64;
const LEAST_RTT: f64 = 2.0 * MICROSECOND as f64;
/// Weight of the newest difference.
const ALPHA: f64 = 0.46;
const BETA: f64 = 0.26;
/// Packets per second.
const STEP: f64 = 5_000.0;
const LEAST: f64 = 100.0;
const INITIAL: f64 = 200_000.0;
/// Rounds of falling round trips after which the rate grows faster, and how much.
const HYPER_AFTER: u32 = 5;
const HYPER: f64 = 5.0;

#[derive(Clone, Debug)]
pub struct Timely {
    rate: f64,
    most: f64,
    smooth: f64,
    last_rtt: f64,
    difference: f64,
    falling: u32,
    updated_at: Nanos,
}

impl Timely {
    pub fn new(most: f64) -> Timely {
        Timely { rate: INITIAL, most, smooth: 0.0, last_rtt: 0.0, difference: 0.0, falling: 0, updated_at: 0 }
    }

    /// The packets of a round trip at the present rate.
    pub fn window(&self) -> f64 {
        (self.rate * self.smooth.max(LEAST_RTT) / 1e9).clamp(0.01, self.most)
    }

    pub fn congested(&self, rtt: &Rtt, sample: Sample) -> bool {
        sample.rtt as f64 > rtt.least() as f64 + HIGH
    }

    pub fn on_ack(&mut self, now: Nanos, rtt: &Rtt, sample: Sample) {
        let new = sample.rtt as f64;
        self.smooth = rtt.smooth;
        if self.last_rtt == 0.0 {
            (self.last_rtt, self.updated_at) = (new, now);
            return;
        }
        self.difference += ALPHA * (new - self.last_rtt - self.difference);
        self.last_rtt = new;
        let least = (rtt.least() as f64).max(LEAST_RTT);
        // Acknowledgements that come faster than round trips count for less.
        let weight = (now.saturating_sub(self.updated_at) as f64 / least).min(1.0);
        self.updated_at = now;
        let gradient = self.difference / least;
        let (low, high) = (least + LOW, least + HIGH);
        let rate = if new < low {
            self.rate + self.step(gradient) * weight
        } else if new > high {
            self.rate * (1.0 - weight * BETA * (1.0 - high / new))
        } else {
            let share = (2.0 * gradient + 0.5).clamp(0.0, 1.0);
            let error = (new - low) / low;
            self.rate * (1.0 - weight * BETA * share * error) + weight * self.step(gradient) * (1.0 - share)
        };
        self.rate = rate.max(self.rate / 2.0).clamp(LEAST, self.most / LEAST_RTT * 1e9);
    }

    fn step(&mut self, gradient: f64) -> f64 {
        self.falling = if gradient <= 0.0 { self.falling + 1 } else { 0 };
        if self.falling >= HYPER_AFTER {
            STEP * HYPER
        } else {
            STEP
        }
    }

    pub fn on_loss(&mut self, now: Nanos, rtt: &Rtt) {
        if now.saturating_sub(self.updated_at) as f64 >= rtt.smooth {
            self.updated_at = now;
        }
        self.rate = (self.rate * (1.0 - BETA / 2.0)).max(LEAST);
    }

    pub fn on_timeout(&mut self, _now: Nanos, _rtt: &Rtt) {
        self.rate = (self.rate / 2.0).max(LEAST);
    }
}
