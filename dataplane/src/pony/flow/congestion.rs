//! How much may be under way.

use super::rtt::Rtt;
use super::swift::Swift;
use super::timely::Timely;
use super::Nanos;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Swift,
    Timely,
}

/// What an acknowledgement tells.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Without the time that the receiver took to acknowledge.
    pub rtt: Nanos,
    /// The part of it that the packet waited at the receiver, and its acknowledgement here.
    pub queued: Nanos,
    /// Packets acknowledged for the first time.
    pub acked: u32,
}

/// One of the algorithms. Windows are in packets, and may be below one: then `gap` says how far packets are apart.
#[derive(Clone, Debug)]
pub enum Congestion {
    Swift(Swift),
    Timely(Timely),
}

impl Congestion {
    /// `most`: the widest window, in packets.
    pub fn new(algorithm: Algorithm, most: f64) -> Congestion {
        match algorithm {
            Algorithm::Swift => Congestion::Swift(Swift::new(most)),
            Algorithm::Timely => Congestion::Timely(Timely::new(most)),
        }
    }

    pub fn on_ack(&mut self, now: Nanos, rtt: &Rtt, sample: Sample) {
        match self {
            Congestion::Swift(swift) => swift.on_ack(now, rtt, sample),
            Congestion::Timely(timely) => timely.on_ack(now, rtt, sample),
        }
    }

    /// A packet was found to be lost, by what came after it.
    pub fn on_loss(&mut self, now: Nanos, rtt: &Rtt) {
        match self {
            Congestion::Swift(swift) => swift.on_loss(now, rtt),
            Congestion::Timely(timely) => timely.on_loss(now, rtt),
        }
    }

    /// Nothing was heard for so long that everything counts as lost.
    pub fn on_timeout(&mut self, now: Nanos, rtt: &Rtt) {
        match self {
            Congestion::Swift(swift) => swift.on_timeout(now, rtt),
            Congestion::Timely(timely) => timely.on_timeout(now, rtt),
        }
    }

    pub fn window(&self) -> f64 {
        match self {
            Congestion::Swift(swift) => swift.window(),
            Congestion::Timely(timely) => timely.window(),
        }
    }

    /// Time between two packets; 0 when the window alone holds them back.
    pub fn gap(&self, rtt: &Rtt) -> Nanos {
        match self {
            Congestion::Swift(_) if self.window() >= 1.0 => 0,
            _ => (rtt.smooth / self.window()) as Nanos,
        }
    }

    /// Whether that round trip was longer than is wanted: for the choice of paths.
    pub fn congested(&self, rtt: &Rtt, sample: Sample) -> bool {
        match self {
            Congestion::Swift(swift) => swift.congested(rtt, sample),
            Congestion::Timely(timely) => timely.congested(rtt, sample),
        }
    }
}
