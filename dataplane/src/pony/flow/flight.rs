//! The sending side: which packets are under way, which of them are lost (RACK, RFC 8985), and which are to be sent again.

use std::collections::VecDeque;

use super::rtt::Rtt;
use super::wire::Header;
use super::{Nanos, PeerError, MILLISECOND};

/// Slots of the ring: the widest window, and a power of two.
const SLOTS: usize = 256;
/// How late a packet may come at most, and still be waited for: probes and timeouts come soon after.
const MOST_LATE: Nanos = MILLISECOND;
/// Losses without a needless retransmission after which packets are waited for less.
const CALM: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Flying,
    Lost,
    Done,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    state: State,
    token: u64,
    /// When it was sent last, and the time before that.
    at: Nanos,
    before: Nanos,
    number: u64,
    times: u32,
    /// It is or was taken for lost because one that was sent later had come.
    overtaken: bool,
}

const NOTHING: Sent = Sent { state: State::Done, token: 0, at: 0, before: 0, number: 0, times: 0, overtaken: false };

pub struct Flight {
    ring: Vec<Sent>,
    /// The lowest that is not known to be received, and the next new one.
    pub floor: u64,
    pub next: u64,
    pub flying: u32,
    /// Transmissions in their order: packet, number.
    order: VecDeque<(u64, u64)>,
    lost: VecDeque<u64>,
    /// Of the packet that was transmitted last among those that were received: when, which, its round trip.
    newest: (Nanos, u64),
    newest_rtt: Nanos,
    /// How much later than those sent after them packets have come of late; losses since one was late.
    late: Nanos,
    calm: u32,
    pub spurious: u64,
}

/// What an acknowledgement brought.
#[derive(Clone, Copy, Debug, Default)]
pub struct Acked {
    pub packets: u32,
}

impl Flight {
    pub fn new(next: u64) -> Flight {
        Flight {
            ring: vec![NOTHING; SLOTS],
            floor: next,
            next,
            flying: 0,
            order: VecDeque::with_capacity(SLOTS * 2),
            lost: VecDeque::with_capacity(SLOTS),
            newest: (0, 0),
            newest_rtt: 0,
            late: 0,
            calm: 0,
            spurious: 0,
        }
    }

    fn at(&mut self, seq: u64) -> &mut Sent {
        &mut self.ring[seq as usize % SLOTS]
    }

    /// A new packet goes out: its sequence number.
    pub fn launch(&mut self, now: Nanos, token: u64, number: u64) -> u64 {
        let seq = self.next;
        self.next += 1;
        *self.at(seq) = Sent { state: State::Flying, token, at: now, before: now, number, times: 1, overtaken: false };
        self.flying += 1;
        self.order.push_back((seq, number));
        seq
    }

    /// Packet `seq` goes out once more.
    pub fn relaunch(&mut self, now: Nanos, seq: u64, number: u64) {
        let sent = self.at(seq);
        let was = sent.state;
        let overtaken = sent.overtaken && was == State::Lost;
        *sent =
            Sent { state: State::Flying, at: now, before: sent.at, number, times: sent.times + 1, overtaken, ..*sent };
        if was == State::Lost {
            self.flying += 1;
        }
        self.order.push_back((seq, number));
    }

    pub fn token(&self, seq: u64) -> u64 {
        self.ring[seq as usize % SLOTS].token
    }

    /// The next lost packet.
    pub fn first_lost(&mut self) -> Option<u64> {
        while let Some(seq) = self.lost.front().copied() {
            if seq >= self.floor && self.at(seq).state == State::Lost {
                return Some(seq);
            }
            self.lost.pop_front();
        }
        None
    }

    /// The newest packet that is under way: to find out whether the others arrived.
    pub fn last_flying(&mut self) -> Option<u64> {
        (self.floor..self.next).rev().find(|seq| self.at(*seq).state == State::Flying)
    }

    /// Take in what a header acknowledges. Tokens of what was received for the first time are added to `tokens`.
    pub fn on_ack(
        &mut self,
        now: Nanos,
        header: &Header,
        rtt: &Rtt,
        tokens: &mut Vec<u64>,
    ) -> Result<Acked, PeerError> {
        // All of it is checked before any of it counts.
        let top = header.sack.iter().rposition(|bits| *bits != 0);
        let top = top.map_or(0, |word| 64 * (word as u64 + 1) - u64::from(header.sack[word].leading_zeros()));
        if header.ack > self.next || (top > 0 && top >= self.next - header.ack) {
            return Err(PeerError::AckOfNothing);
        }
        let mut acked = Acked::default();
        for seq in self.floor..header.ack {
            self.arrived(now, seq, header, rtt, tokens, &mut acked);
        }
        for (word, bits) in header.sack.iter().enumerate() {
            let mut bits = *bits;
            while bits != 0 {
                let seq = header.ack + 1 + word as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if seq >= self.floor {
                    self.arrived(now, seq, header, rtt, tokens, &mut acked);
                }
            }
        }
        while self.floor < self.next && self.at(self.floor).state == State::Done {
            self.floor += 1;
        }
        Ok(acked)
    }

    fn arrived(&mut self, now: Nanos, seq: u64, header: &Header, rtt: &Rtt, tokens: &mut Vec<u64>, acked: &mut Acked) {
        let sent = *self.at(seq);
        match sent.state {
            State::Done => return,
            State::Flying => self.flying -= 1,
            State::Lost => {}
        }
        self.at(seq).state = State::Done;
        tokens.push(sent.token);
        acked.packets += 1;
        // Received before the last transmission can have been: that one was needless, and tells no round trip (RFC 3522).
        let early = sent.times > 1 && (header.echo.wrapping_sub(sent.at as u32) as i32) < 0;
        if early || sent.state == State::Lost {
            self.spurious += 1;
            if sent.overtaken {
                // Unlike TCP we know how late it was, and need not feel our way (RFC 8985, 6.2).
                let trip = now.saturating_sub(if early { sent.before } else { sent.at });
                let late = trip.saturating_sub(self.newest_rtt.max(rtt.smooth as Nanos)).min(MOST_LATE);
                self.late = self.late.max(late);
                self.calm = 0;
            }
        } else if (sent.at, seq) > self.newest {
            let trip = now.saturating_sub(sent.at);
            if sent.times == 1 || trip >= rtt.least() {
                self.newest = (sent.at, seq);
                self.newest_rtt = trip;
            }
        }
    }

    /// Mark what is lost by now: how many, and when the next would be.
    pub fn detect(&mut self, now: Nanos, rtt: &Rtt) -> (u32, Option<Nanos>) {
        let patience = (rtt.least() / 4 + self.late).max(1_000);
        let mut found = 0;
        let mut next = None;
        while let Some((seq, number)) = self.order.front().copied() {
            let sent = if seq < self.floor { NOTHING } else { *self.at(seq) };
            if sent.state != State::Flying || sent.number != number {
                self.order.pop_front();
                continue;
            }
            if (sent.at, seq) >= self.newest {
                break;
            }
            let due = sent.at + self.newest_rtt.max(rtt.smooth as Nanos) + patience;
            if due > now {
                next = Some(due);
                break;
            }
            self.order.pop_front();
            self.lose(seq, true);
            found += 1;
        }
        if found > 0 {
            self.calm += found;
            if self.calm >= CALM {
                (self.late, self.calm) = (self.late / 2, 0);
            }
        }
        (found, next)
    }

    fn lose(&mut self, seq: u64, overtaken: bool) {
        let sent = self.at(seq);
        (sent.state, sent.overtaken) = (State::Lost, overtaken);
        self.flying -= 1;
        self.lost.push_back(seq);
    }

    /// Everything that is under way is lost.
    pub fn lose_all(&mut self) {
        self.order.clear();
        for seq in self.floor..self.next {
            if self.at(seq).state == State::Flying {
                self.lose(seq, false);
            }
        }
    }

    pub fn idle(&self) -> bool {
        self.floor == self.next
    }
}
