//! A flow: one direction of packets to a peer's engine and the acknowledgements of the other direction.
//!
//! The caller asks `poll` what may go out, writes it (again, when `Again`), and takes the header from `header`. What a
//! packet carries is the caller's: the flow knows a `token`, and gives it back when the packet was received.

use super::congestion::{Algorithm, Congestion, Sample};
use super::flight::Flight;
use super::path::Path;
use super::rtt::Rtt;
use super::window::{Place, Window};
use super::wire::{Header, Version, ACK_NOW, PAYLOAD};
use super::{Nanos, MICROSECOND, MILLISECOND};

const INITIAL_TIMEOUT: Nanos = 20 * MILLISECOND;
const LEAST_TIMEOUT: Nanos = 4 * MILLISECOND;
/// A dead peer costs little when it is asked this often, and is soon noticed when it is back.
const MOST_TIMEOUT: Nanos = 500 * MILLISECOND;
const LEAST_PROBE: Nanos = 500 * MICROSECOND;
/// Probes before everything counts as lost, each after twice the time of the one before.
const PROBES: u32 = 2;
/// Slower than this no flow is made: who has long round trips would take minutes to find out that all is well again.
const MOST_GAP: Nanos = 20 * MILLISECOND;
const MOST_BACKOFF: u32 = 7;
/// Acknowledgements wait for this long, or this many packets, whichever comes first.
pub const ACK_DELAY: Nanos = 100 * MICROSECOND;
const ACK_EVERY: u32 = 8;
/// Acknowledgements that a window of packets should bring, so that the next ones do not go out in one burst. The sender
/// asks for them when its window is so small that the receiver would not send as many of its own accord.
const ACKS_PER_WINDOW: f64 = 4.0;
/// No sequence number is above: a flow does not get there in a thousand years, and nothing overflows.
const LAST: u64 = 1 << 62;

/// What a peer did that no correct one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerError {
    /// It acknowledges what was never sent.
    AckOfNothing,
    /// It sends what cannot be acknowledged, for it is beyond the window.
    BeyondWindow,
    OtherVersion,
    /// It counts further than anybody can.
    Number,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// The payload is new.
    Deliver,
    /// There is no payload, or it came before.
    Nothing,
    /// The packet is of an epoch that is over.
    Stale,
}

/// What may go out now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Send {
    /// The packet with that token, once more.
    Again(u64),
    /// A new one.
    New,
    /// Nothing but an acknowledgement.
    Nothing,
}

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub version: Version,
    pub algorithm: Algorithm,
    /// The flow's number at the peer.
    pub remote: u32,
    /// How often this side has lost what it knew.
    pub epoch: u32,
    /// First sequence number and number: above all that an earlier epoch may have used.
    pub first: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub sent: u64,
    pub again: u64,
    pub probes: u64,
    pub timeouts: u64,
    pub received: u64,
    pub duplicates: u64,
    pub acks: u64,
}

pub struct Flow {
    pub settings: Settings,
    flight: Flight,
    came: Window,
    congestion: Congestion,
    pub rtt: Rtt,
    pub path: Path,
    pub counts: Counts,
    pub peer_epoch: Option<u32>,
    number: u64,
    acked: Vec<u64>,
    /// What `poll` proposed to send again.
    again: Option<u64>,
    /// Timers run from here: the last progress, the last timer, or the first packet after silence.
    timer_at: Nanos,
    /// The last progress, or the first packet after none was under way.
    progress_at: Nanos,
    backoff: u32,
    probed: u32,
    probe_due: bool,
    loss_due: Option<Nanos>,
    next_send: Nanos,
    /// Packets sent since one asked for its acknowledgement.
    unasked: u32,
    /// Packets received since the last acknowledgement, the first of them when; whether one asked for it at once.
    unacked: u32,
    unacked_since: Nanos,
    ack_now: bool,
    /// The time of sending of the newest packet, when it came, how long it had waited.
    echo: u32,
    echo_at: Nanos,
    echo_queued: u32,
    echo_number: u64,
}

fn new_congestion(settings: &Settings) -> Congestion {
    Congestion::new(settings.algorithm, settings.version.window() as f64)
}

impl Flow {
    pub fn new(settings: Settings) -> Flow {
        Flow {
            settings,
            flight: Flight::new(settings.first),
            came: Window::default(),
            congestion: new_congestion(&settings),
            rtt: Rtt::default(),
            path: Path::default(),
            counts: Counts::default(),
            peer_epoch: None,
            number: settings.first,
            acked: Vec::with_capacity(settings.version.window() as usize),
            again: None,
            timer_at: 0,
            progress_at: 0,
            backoff: 0,
            probed: 0,
            probe_due: false,
            loss_due: None,
            next_send: 0,
            unasked: 0,
            unacked: 0,
            unacked_since: 0,
            ack_now: false,
            echo: 0,
            echo_at: 0,
            echo_queued: 0,
            echo_number: 0,
        }
    }

    // -- what comes in ----------------------------------------------------------------------------------------

    /// A packet of this flow came, and had waited `queued` ns. When it is of another epoch than the ones before, `peer_epoch`
    /// changes: the peer has lost what it knew.
    pub fn receive(&mut self, now: Nanos, header: &Header, queued: Nanos) -> Result<Receipt, PeerError> {
        if header.version != self.settings.version {
            return Err(PeerError::OtherVersion);
        }
        if header.seq.max(header.floor) > LAST {
            return Err(PeerError::Number);
        }
        match self.peer_epoch {
            Some(epoch) if header.epoch.wrapping_sub(epoch) as i32 > 0 => {
                self.begin_epoch(header);
                // What was under way went to somebody who is no more, and there is nothing to wait for.
                self.flight.lose_all();
                (self.backoff, self.loss_due) = (0, None);
                // That nobody answered meanwhile says nothing about the network.
                self.congestion = new_congestion(&self.settings);
                self.next_send = now;
            }
            Some(epoch) if header.epoch != epoch => return Ok(Receipt::Stale),
            Some(_) => {}
            None => self.begin_epoch(header),
        }
        self.counts.received += 1;
        self.take_ack(now, header, queued)?;
        if header.number >= self.echo_number {
            self.echo_number = header.number;
            (self.echo, self.echo_at) = (header.sent_at, now);
            self.echo_queued = queued.min(Nanos::from(u32::MAX)) as u32;
        }
        if !header.carries() {
            return Ok(Receipt::Nothing);
        }
        self.came.raise(header.floor.min(header.seq));
        let place = self.came.place(header.seq, self.settings.version);
        if place == Place::Beyond {
            return Err(PeerError::BeyondWindow);
        }
        if self.unacked == 0 {
            self.unacked_since = now;
        }
        self.unacked += 1;
        if place == Place::Old {
            self.counts.duplicates += 1;
            self.ack_now = true;
            return Ok(Receipt::Nothing);
        }
        // A new hole, or less of one, is worth telling; what follows a hole in order is not.
        let in_order = self.came.take(header.seq);
        self.ack_now |= header.flags & ACK_NOW != 0 || !in_order;
        Ok(Receipt::Deliver)
    }

    fn begin_epoch(&mut self, header: &Header) {
        self.peer_epoch = Some(header.epoch);
        self.came = Window::default();
        self.came.raise(header.floor);
        (self.echo, self.echo_number, self.echo_queued) = (0, 0, 0);
        (self.unacked, self.ack_now) = (0, false);
    }

    fn take_ack(&mut self, now: Nanos, header: &Header, queued: Nanos) -> Result<(), PeerError> {
        let acked = self.flight.on_ack(now, header, &self.rtt, &mut self.acked)?;
        if acked.packets == 0 {
            return Ok(());
        }
        (self.timer_at, self.progress_at) = (now, now);
        (self.backoff, self.probed, self.probe_due) = (0, 0, false);
        if header.echo != 0 {
            let trip = (now as u32).wrapping_sub(header.echo).wrapping_sub(header.hold);
            // More than two seconds is a clock that wrapped, or a lie.
            if trip < 1 << 31 {
                let queued = Nanos::from(header.queued) + queued;
                let sample = Sample { rtt: Nanos::from(trip), queued, acked: acked.packets };
                self.rtt.sample(now, header.sent_at, sample.rtt);
                // A look says nothing about the share of the path that this flow may have.
                if !self.rtt.looking() || self.congestion.window() < 1.0 {
                    self.congestion.on_ack(now, &self.rtt, sample);
                }
                // A distance that was kept from a window that was smaller is too long by now.
                self.next_send = self.next_send.min(now + self.gap());
                let congested = self.congestion.congested(&self.rtt, sample);
                self.path.on_ack(acked.packets, congested, self.flight.flying);
            }
        }
        self.detect(now);
        Ok(())
    }

    /// Tokens of packets that were received, each once.
    pub fn acked(&mut self) -> std::vec::Drain<'_, u64> {
        self.acked.drain(..)
    }

    // -- what goes out ----------------------------------------------------------------------------------------

    fn detect(&mut self, now: Nanos) {
        let (found, next) = self.flight.detect(now, &self.rtt);
        self.loss_due = next;
        if found > 0 {
            self.congestion.on_loss(now, &self.rtt);
        }
    }

    fn probe_timeout(&self) -> Nanos {
        ((2.0 * self.rtt.smooth) as Nanos + ACK_DELAY).max(LEAST_PROBE)
    }

    fn timeout(&self) -> Nanos {
        (self.rtt.timeout(INITIAL_TIMEOUT, LEAST_TIMEOUT) << self.backoff).min(MOST_TIMEOUT)
    }

    fn may_probe(&self) -> bool {
        self.rtt.known() && self.probed < PROBES
    }

    /// When there was no progress for too long: a probe first, then everything counts as lost.
    fn silence_due(&self) -> Option<Nanos> {
        let wait = if self.may_probe() { self.probe_timeout() << self.probed } else { self.timeout() };
        (self.flight.flying > 0).then_some(self.timer_at + wait)
    }

    /// When timers want `poll`, whatever there is to send.
    pub fn deadline(&self) -> Option<Nanos> {
        let ack = (self.unacked > 0).then_some(self.unacked_since + ACK_DELAY);
        // Of lost packets nobody else speaks when they are all that there is.
        let lost = (self.flight.flying == 0 && !self.flight.idle()).then_some(self.next_send);
        [self.silence_due(), ack, self.loss_due, lost].into_iter().flatten().min()
    }

    /// When a packet may go out, if one is held back by pacing.
    pub fn paced_until(&self) -> Nanos {
        self.next_send
    }

    fn timers(&mut self, now: Nanos) {
        if self.loss_due.is_some_and(|due| due <= now) {
            self.detect(now);
        }
        if self.silence_due().is_none_or(|due| due > now) {
            return;
        }
        self.timer_at = now;
        if self.may_probe() {
            (self.probed, self.probe_due) = (self.probed + 1, true);
            return;
        }
        self.counts.timeouts += 1;
        self.flight.lose_all();
        self.loss_due = None;
        self.congestion.on_timeout(now, &self.rtt);
        self.path.on_timeout();
        self.backoff = (self.backoff + 1).min(MOST_BACKOFF);
        // Nothing is under way: the packet that finds out need not keep its distance.
        self.next_send = now;
        (self.probed, self.probe_due) = (PROBES, false);
    }

    /// Time between two packets.
    fn gap(&self) -> Nanos {
        self.congestion.gap(&self.rtt).min(MOST_GAP)
    }

    fn window(&self) -> f64 {
        // After a timeout one packet at a time finds out whether the path works.
        if self.backoff > 0 || self.rtt.looking() {
            return self.congestion.window().min(1.0);
        }
        self.congestion.window()
    }

    /// What may go out at `now`; ask again after each packet.
    pub fn poll(&mut self, now: Nanos) -> Send {
        self.timers(now);
        self.again = None;
        if self.probe_due {
            if let Some(seq) = self.flight.last_flying() {
                self.again = Some(seq);
                return Send::Again(self.flight.token(seq));
            }
        }
        let room = f64::from(self.flight.flying) < self.window().max(1.0);
        if !room || now < self.next_send {
            return Send::Nothing;
        }
        if let Some(seq) = self.flight.first_lost() {
            self.again = Some(seq);
            return Send::Again(self.flight.token(seq));
        }
        if self.flight.next < self.flight.floor + self.settings.version.window() {
            return Send::New;
        }
        Send::Nothing
    }

    /// The header of the packet that `poll` called for, which carries `len` bytes; a new one is called `token`.
    pub fn header(&mut self, now: Nanos, token: u64, len: u16) -> Header {
        let number = self.take_number();
        self.counts.sent += 1;
        if self.flight.idle() {
            self.progress_at = now;
        }
        if self.flight.flying == 0 {
            self.timer_at = now;
        }
        let (seq, again) = match self.again.take() {
            Some(seq) => {
                self.flight.relaunch(now, seq, number);
                self.counts.again += 1;
                self.counts.probes += u64::from(std::mem::take(&mut self.probe_due));
                (seq, true)
            }
            None => (self.flight.launch(now, token, number), false),
        };
        let gap = self.gap();
        self.next_send = if gap == 0 { 0 } else { self.next_send.max(now.saturating_sub(gap)) + gap };
        self.unasked += 1;
        let every = (self.window() / ACKS_PER_WINDOW) as u32;
        let ask = again || (every < ACK_EVERY && self.unasked >= every);
        if ask {
            self.unasked = 0;
        }
        let ask = if ask { ACK_NOW } else { 0 };
        self.stamp(now, PAYLOAD | ask, number, seq, len)
    }

    /// Whether an acknowledgement is due, though there is nothing else to send.
    pub fn ack_due(&self, now: Nanos) -> bool {
        self.unacked > 0 && (self.ack_now || self.unacked >= ACK_EVERY || now >= self.unacked_since + ACK_DELAY)
    }

    /// The header of a packet without payload.
    pub fn ack(&mut self, now: Nanos) -> Header {
        let number = self.take_number();
        self.counts.acks += 1;
        self.stamp(now, 0, number, self.flight.next, 0)
    }

    fn take_number(&mut self) -> u64 {
        self.number += 1;
        self.number - 1
    }

    fn stamp(&mut self, now: Nanos, flags: u8, number: u64, seq: u64, len: u16) -> Header {
        (self.unacked, self.ack_now) = (0, false);
        let Settings { version, remote, epoch, .. } = self.settings;
        Header {
            version,
            flags,
            len,
            flow: remote,
            number,
            epoch,
            seq,
            floor: self.flight.floor,
            ack: self.came.ack,
            sent_at: (now as u32).max(1),
            echo: self.echo,
            hold: now.saturating_sub(self.echo_at).min(Nanos::from(u32::MAX)) as u32,
            queued: self.echo_queued,
            sack: self.came.sack(),
        }
    }

    // -- what is known ----------------------------------------------------------------------------------------

    pub fn congestion_window(&self) -> f64 {
        self.congestion.window()
    }

    pub fn flying(&self) -> u32 {
        self.flight.flying
    }

    /// Whether everything that was sent was received.
    pub fn idle(&self) -> bool {
        self.flight.idle()
    }

    /// Retransmissions that turned out to be needless.
    pub fn spurious(&self) -> u64 {
        self.flight.spurious
    }

    /// Above every number and sequence number that was used.
    pub fn used(&self) -> u64 {
        self.number.max(self.flight.next)
    }

    /// How long nothing was acknowledged though something is under way.
    pub fn silence(&self, now: Nanos) -> Nanos {
        if self.flight.idle() {
            return 0;
        }
        now.saturating_sub(self.progress_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_packet_that_must_keep_its_distance_is_not_forgotten() {
        let (version, algorithm) = (Version::Two, Algorithm::Swift);
        let mut flow = Flow::new(Settings { version, algorithm, remote: 1, epoch: 1, first: 1 << 36 });
        flow.header(MILLISECOND, 7, 1);
        // As when an acknowledgement tells of the loss, and packets are far apart.
        flow.flight.lose_all();
        flow.next_send = 9 * MILLISECOND;
        assert_eq!(flow.poll(2 * MILLISECOND), Send::Nothing);
        assert_eq!(flow.deadline(), Some(9 * MILLISECOND));
        assert_eq!(flow.poll(9 * MILLISECOND), Send::Again(7));
    }
}
