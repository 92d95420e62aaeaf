//! Ports: where packets leave an engine and come in. They carry single packets and promise nothing: one may be lost,
//! come twice or late; only what a receiver gets was sent by somebody as one packet.
//!
//! An engine asks for room before it decides what to send, and writes each packet where the port wants it:
//! `frame`, `push`, as often as there is room, then `flush`. What the outside has no room for now stays and goes with a
//! later `flush`; a port that is `blocked` says on which descriptor to wait for room.
//!
//! Reception is in bursts: `receive` forgets the burst before and tells how many packets there are, `packet` shows one.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use thiserror::Error;

use crate::error::Fault;

pub mod faulty;
mod sys;
pub mod udp;
pub mod wire;

/// Who a packet is for, or came from. A wire has one peer, whose address is a name and nothing else.
pub type Address = SocketAddr;

/// What ends a port. Everything else that goes wrong is the loss of a packet, and counted.
#[derive(Debug, Error)]
pub enum PortError {
    #[error("the other side of a wire broke it: {0}")]
    Faulted(#[from] Fault),
    #[error("{what}: {source}")]
    Os { what: &'static str, source: io::Error },
}

pub type Result<T> = std::result::Result<T, PortError>;

/// Totals since the port was made. Bytes are those of packets, without the headers below them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub sent_packets: u64,
    pub sent_bytes: u64,
    /// System calls, or publications on a wire, that carried them; a refused one counts.
    pub sent_calls: u64,
    /// Packets that the outside refused for good: no route, too long for the path, forbidden.
    pub send_drops: u64,
    /// Times that packets stayed because there was no room.
    pub send_waits: u64,
    pub received_packets: u64,
    pub received_bytes: u64,
    /// Receptions, those that found nothing included.
    pub received_calls: u64,
    /// Packets lost on this side of the network: no room in the socket, or longer than the port's buffers.
    pub receive_drops: u64,
    /// Messages of several packets that the operating system wanted one by one.
    pub unmerged: u64,
    /// Whether packets go and come several in one buffer (segmentation and receive offload).
    pub merges_sent: bool,
    pub merges_received: bool,
}

/// How many packets a burst has, how many of them were looked at, and when it was received (ns, CLOCK_MONOTONIC).
#[derive(Clone, Copy, Default)]
pub struct Burst {
    pub count: usize,
    pub looked: usize,
    pub at: u64,
}

impl Burst {
    pub fn left(self) -> bool {
        self.looked < self.count
    }
}

pub trait Port {
    /// The longest packet that can be sent, in bytes.
    fn mtu(&self) -> usize;

    /// Room for one packet of up to `mtu` bytes, with arbitrary bytes in it; None while there is none. The same room again
    /// until `push`.
    fn frame(&mut self) -> Option<&mut [u8]>;

    /// The first `len` bytes of the frame are a packet for `to`, by the path of that number (taken modulo the paths that
    /// there are). Panics without a frame, and on a length of 0 or above the MTU.
    fn push(&mut self, len: usize, to: Address, path: u8);

    /// Send what was pushed.
    fn flush(&mut self) -> Result<()>;

    /// Take the next burst; how many packets it has. 0: there are none now.
    fn receive(&mut self) -> Result<usize>;

    /// One packet of the burst, and who says to have sent it. Panics when `index` is not below what `receive` told.
    fn packet(&self, index: usize) -> (&[u8], Address);

    /// How long that packet had been at this host when it was received, in ns; 0 where nobody knows.
    fn waited(&self, _index: usize) -> u64 {
        0
    }

    /// Readable when packets may have come, once `arm` was called.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What to wait on until it is writable, while pushed packets wait for room. None: nothing waits, or `fd` tells.
    fn blocked(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Before sleeping on `fd`: false when there is something to do already.
    fn arm(&mut self) -> bool {
        true
    }

    /// After sleeping.
    fn disarm(&mut self) {}

    fn statistics(&self) -> Statistics;
}

impl<P: Port + ?Sized> Port for Box<P> {
    fn mtu(&self) -> usize {
        (**self).mtu()
    }
    fn frame(&mut self) -> Option<&mut [u8]> {
        (**self).frame()
    }
    fn push(&mut self, len: usize, to: Address, path: u8) {
        (**self).push(len, to, path);
    }
    fn flush(&mut self) -> Result<()> {
        (**self).flush()
    }
    fn receive(&mut self) -> Result<usize> {
        (**self).receive()
    }
    fn packet(&self, index: usize) -> (&[u8], Address) {
        (**self).packet(index)
    }
    fn waited(&self, index: usize) -> u64 {
        (**self).waited(index)
    }
    fn fd(&self) -> BorrowedFd<'_> {
        (**self).fd()
    }
    fn blocked(&self) -> Option<BorrowedFd<'_>> {
        (**self).blocked()
    }
    fn arm(&mut self) -> bool {
        (**self).arm()
    }
    fn disarm(&mut self) {
        (**self).disarm();
    }
    fn statistics(&self) -> Statistics {
        (**self).statistics()
    }
}
