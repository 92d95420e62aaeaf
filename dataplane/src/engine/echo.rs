//! Sends every message back to where it came from: the example, and the yardstick of the engine runtime.

use super::{Channel, Channels, Engine};
use crate::error::{Error, Result};
use crate::layout::{self, INLINE_MAX};
use crate::state::{self, Segment};

/// Holds only scratch memory; a message that does not fit into the way back stays in the ring of its sender, who thereby
/// feels the back-pressure.
pub struct Echo {
    scratch: Vec<u8>,
}

impl Default for Echo {
    fn default() -> Self {
        Echo { scratch: vec![0; INLINE_MAX] }
    }
}

impl Engine for Echo {
    fn poll(&mut self, channels: &mut Channels, _state: &mut Segment, budget: usize) -> state::Result<usize> {
        Ok(channels.each(budget, |channel, budget| self.serve(channel, budget)))
    }
}

impl Echo {
    fn serve(&mut self, channel: &mut Channel, budget: usize) -> Result<usize> {
        channel.rx.check()?;
        channel.tx.check()?;
        let mut done = 0;
        while done < budget {
            let Some(header) = channel.rx.peek()? else { break };
            let sent = if header.pooled {
                echo_pooled(channel, header)
            } else {
                echo_inline(channel, header, &mut self.scratch[..header.len])
            };
            match sent {
                Ok(()) => done += 1,
                Err(Error::Full) => break,
                Err(error) => return Err(error),
            }
        }
        channel.tx.publish();
        Ok(done)
    }
}

/// Through private memory: the ring's bytes may change under us.
fn echo_inline(channel: &mut Channel, header: layout::Header, scratch: &mut [u8]) -> Result<()> {
    channel.tx.reserve(layout::inline_slots(header.len))?;
    channel.rx.take_into(header, scratch)?;
    channel.tx.put_reserved(header.tag, scratch);
    Ok(())
}

/// From the client's pool into ours with one copy.
fn echo_pooled(channel: &mut Channel, header: layout::Header) -> Result<()> {
    channel.tx.reserve(1)?;
    let loan = channel.tx.loan(header.len)?;
    let place = match channel.rx.take_pooled(header) {
        Ok(place) => place,
        Err(error) => {
            channel.tx.core().cancel_loan(loan.place.token);
            return Err(error);
        }
    };
    let core = channel.tx.core().clone();
    if let (Some(from), Some(to)) = (core.peer_pool(), core.own_pool()) {
        to.copy_from(loan.place.offset as usize, from, place.offset as usize, header.len);
    }
    core.give_back(place.token);
    channel.tx.put_loan_reserved(header.tag, loan);
    Ok(())
}
