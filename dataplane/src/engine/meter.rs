//! What a worker publishes of itself, and how often.

use std::time::{Duration, Instant};

use super::worker::Settings;
use crate::stats;

/// Counts polls and work, and times what was busy between two publications.
pub(super) struct Meter {
    record: stats::Record,
    published: Instant,
    busy_from: Instant,
    polls_since: u32,
}

impl Default for Meter {
    fn default() -> Self {
        let now = Instant::now();
        Meter { record: stats::Record::default(), published: now, busy_from: now, polls_since: 0 }
    }
}

impl Meter {
    pub(super) fn poll(&mut self, done: usize) {
        self.record[0] += 1;
        self.record[1] += done as u64;
        self.polls_since += 1;
    }

    /// Sleeping is not busy.
    pub(super) fn wake(&mut self) {
        self.busy_from = Instant::now();
    }

    /// Alive, though somebody else serves.
    pub(super) fn beat(&mut self, settings: &Settings) {
        self.wake();
        self.published = self.busy_from;
        self.write(settings);
    }

    pub(super) fn publish(&mut self, settings: &Settings, channels: usize, every: Duration) {
        // The clock is read every 64th poll only.
        if !every.is_zero() && self.polls_since < 64 {
            return;
        }
        self.polls_since = 0;
        let now = Instant::now();
        if now - self.published < every {
            return;
        }
        self.published = now;
        self.record[2] += (now - self.busy_from).as_nanos() as u64;
        self.busy_from = now;
        self.record[4] = channels as u64;
        self.write(settings);
    }

    fn write(&mut self, settings: &Settings) {
        if let Some((page, index)) = &settings.stats {
            self.record[3] = stats::monotonic_ns();
            page.write(*index, &self.record);
        }
    }
}
