//! An end of a flow, which does what an engine does, and the books that say whether it was right.

use snap_dataplane::pony::flow::wire::SEALED;
use snap_dataplane::pony::flow::{Flow, Header, Nanos, Receipt, Send, Settings};

/// What one direction was to carry, and what became of it.
#[derive(Default)]
pub struct Books {
    pub delivered: Vec<u8>,
    pub acked: Vec<u8>,
    pub finished: usize,
    /// Tokens of which a restart may have made two.
    pub excused: Vec<bool>,
    pub finished_at: Nanos,
    /// Deliveries since somebody last looked.
    pub recent: u64,
}

impl Books {
    pub fn new(tokens: usize) -> Books {
        Books { delivered: vec![0; tokens], acked: vec![0; tokens], excused: vec![false; tokens], ..Books::default() }
    }

    fn deliver(&mut self, token: usize) {
        self.recent += 1;
        self.delivered[token] = self.delivered[token].saturating_add(1);
        assert!(self.delivered[token] == 1 || self.excused[token], "token {token} was delivered twice");
    }

    fn ack(&mut self, now: Nanos, token: usize) {
        assert!(self.delivered[token] > 0, "token {token} was acknowledged but not delivered");
        self.acked[token] += 1;
        assert_eq!(self.acked[token], 1, "token {token} was acknowledged twice");
        self.finished += 1;
        self.finished_at = now;
    }
}

pub struct End {
    pub flow: Flow,
    pub peer: u32,
    /// The link that it sends on.
    pub link: usize,
    pub started_at: Nanos,
    /// How far its clock is ahead of the world's.
    pub ahead: Nanos,
    next: u64,
    /// It has nothing new to send while something is under way.
    pub one_by_one: bool,
    /// After a restart: what the layer above gives the flow once more.
    again: Vec<u64>,
    /// When it is going to be looked at.
    pub wake_at: Nanos,
    pub refused: u64,
}

/// The payload of a token: itself, and bytes that follow from it, up to 48.
pub fn payload(token: u64, bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(&token.to_le_bytes());
    let mut pattern = token.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..token % 6 {
        bytes.extend_from_slice(&pattern.to_le_bytes());
        pattern = pattern.rotate_left(13).wrapping_mul(5);
    }
}

impl End {
    pub fn new(peer: u32, link: usize, mut settings: Settings, started_at: Nanos) -> End {
        settings.remote = peer;
        let flow = Flow::new(settings);
        End {
            flow,
            peer,
            link,
            started_at,
            ahead: 0,
            next: 0,
            one_by_one: false,
            again: Vec::new(),
            wake_at: Nanos::MAX,
            refused: 0,
        }
    }

    /// It dies and comes back: what was not acknowledged is sent again.
    pub fn restart(&mut self, now: Nanos, mine: &mut Books, theirs: &mut Books) {
        for token in self.flow.acked() {
            mine.ack(now, token as usize);
        }
        let mut settings = self.flow.settings;
        settings.epoch += 1;
        settings.first = self.flow.used() + 1;
        self.flow = Flow::new(settings);
        self.again = (0..self.next).filter(|token| mine.acked[*token as usize] == 0).collect();
        for books in [mine, theirs] {
            for (excused, acked) in books.excused.iter_mut().zip(&books.acked) {
                *excused |= *acked == 0;
            }
        }
    }

    fn supply(&mut self, now: Nanos, tokens: usize) -> Option<u64> {
        if let Some(token) = self.again.pop() {
            return Some(token);
        }
        if self.next == tokens as u64 || now < self.started_at || (self.one_by_one && !self.flow.idle()) {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    /// Take a packet in. `books` are those of the other direction.
    pub fn receive(&mut self, now: Nanos, packet: &[u8], waited: Nanos, books: &mut Books, scratch: &mut Vec<u8>) {
        // A sealed packet has no checksum, and there is no key here.
        let (header, bytes) = match Header::parse(packet) {
            Ok((header, bytes)) if header.flags & SEALED == 0 => (header, bytes),
            _ => {
                self.refused += 1;
                return;
            }
        };
        let receipt = self.flow.receive(now + self.ahead, &header, waited).expect("no peer lies here");
        if receipt == Receipt::Deliver {
            let token = u64::from_le_bytes(bytes[..8].try_into().expect("is 8 bytes"));
            scratch.clear();
            payload(token, scratch);
            assert_eq!(bytes, scratch, "wrong bytes");
            books.deliver(token as usize);
        }
    }

    /// Tell the books what was acknowledged, and find the next packet to send.
    pub fn next_packet(&mut self, now: Nanos, books: &mut Books, packet: &mut Vec<u8>) -> bool {
        for token in self.flow.acked() {
            books.ack(now, token as usize);
        }
        packet.clear();
        packet.resize(self.flow.settings.version.header(), 0);
        let start = packet.len();
        let token = match self.flow.poll(now + self.ahead) {
            Send::Again(token) => Some(token),
            Send::New => self.supply(now, books.acked.len()),
            Send::Nothing => None,
        };
        let header = match token {
            Some(token) => {
                payload(token, packet);
                self.flow.header(now + self.ahead, token, (packet.len() - start) as u16)
            }
            None if self.flow.ack_due(now + self.ahead) => self.flow.ack(now + self.ahead),
            None => return false,
        };
        header.write(packet);
        true
    }

    /// When it wants to be looked at next.
    pub fn wants(&self, now: Nanos) -> Option<Nanos> {
        let start = Some(self.started_at).filter(|at| *at > now);
        let paced = Some(self.flow.paced_until().saturating_sub(self.ahead)).filter(|at| *at > now);
        let deadline = self.flow.deadline().map(|at| at - self.ahead);
        [start, paced, deadline].into_iter().flatten().min()
    }
}
