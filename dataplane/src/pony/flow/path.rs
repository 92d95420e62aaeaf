//! Which of several paths a flow takes: another one when it is congested for rounds (PLB, Qureshi et al., SIGCOMM 2022) or
//! when nothing gets through (PRR, Wetherall et al., SIGCOMM 2023). A path is a number; the port knows what it means.

/// Congested rounds in a row after which the path changes while little is under way, and in any case.
const IDLE_ROUNDS: u32 = 3;
const ROUNDS: u32 = 12;

#[derive(Clone, Copy, Debug, Default)]
pub struct Path {
    pub number: u8,
    /// Of the present round.
    acked: u32,
    congested: u32,
    round: u32,
    /// Congested ones in a row.
    rounds: u32,
    pub changes: u64,
}

impl Path {
    fn change(&mut self) {
        self.number = self.number.wrapping_add(1);
        self.changes += 1;
        (self.acked, self.congested, self.rounds) = (0, 0, 0);
    }

    /// An acknowledgement of `acked` packets; `flying` are under way. A round has as many as were under way at its beginning.
    pub fn on_ack(&mut self, acked: u32, congested: bool, flying: u32) {
        self.acked += acked;
        self.congested += if congested { acked } else { 0 };
        if self.acked <= self.round {
            return;
        }
        self.rounds = if self.congested * 2 >= self.acked { self.rounds + 1 } else { 0 };
        (self.acked, self.congested, self.round) = (0, 0, flying);
        if self.rounds >= ROUNDS || (self.rounds >= IDLE_ROUNDS && flying == 0) {
            self.change();
        }
    }

    pub fn on_timeout(&mut self) {
        self.change();
    }
}
