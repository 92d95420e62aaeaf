//! Ports on real sockets and real shared memory: packets arrive whole or not at all, and nothing that the outside does
//! breaks one.
#![cfg(not(loom))]

#[path = "../common/mod.rs"]
mod common;
mod faulty;
mod speed;
mod udp;
mod wire;

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use common::memfd;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use snap_dataplane::bell::Bell;
use snap_dataplane::pony::port::udp::Udp;
use snap_dataplane::pony::port::wire::{format, Shape, Side, Wire};
use snap_dataplane::pony::port::{Address, Port, PortError};
use snap_dataplane::segment::Mapping;

/// Longer than anything takes here; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn udp(mtu: usize) -> Udp {
    Udp::bind(loopback(), 1, mtu).expect("bind")
}

/// Packet `number`: its number as far as that goes, then bytes that depend on it and on their place.
fn fill(frame: &mut [u8], number: u64) {
    for (place, byte) in frame.iter_mut().enumerate() {
        *byte = number.wrapping_mul(31).wrapping_add(place as u64 * 7) as u8;
    }
    if let Some(start) = frame.first_chunk_mut() {
        *start = number.to_le_bytes();
    }
}

fn is_packet(bytes: &[u8], number: u64, len: usize) -> bool {
    let mut expected = vec![0; len];
    fill(&mut expected, number);
    bytes == expected
}

/// Push a packet; false when there is no room.
fn push(port: &mut impl Port, number: u64, len: usize, to: Address, path: u8) -> bool {
    let Some(frame) = port.frame() else {
        return false;
    };
    fill(&mut frame[..len], number);
    port.push(len, to, path);
    true
}

fn readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).expect("poll") == 1
}

/// Receive until `count` packets are there.
fn collect(port: &mut impl Port, count: usize) -> Vec<(Vec<u8>, Address)> {
    let mut packets = Vec::new();
    let limit = Instant::now() + PATIENCE;
    while packets.len() < count {
        let burst = port.receive().expect("receive");
        packets.extend((0..burst).map(|index| port.packet(index)).map(|(bytes, from)| (bytes.to_vec(), from)));
        assert!(Instant::now() < limit, "{} packets of {count} came", packets.len());
        if burst == 0 && port.arm() {
            readable(port.fd(), Duration::from_millis(100));
            port.disarm();
        }
    }
    packets
}

/// A formatted wire and what both sides need for it.
struct Cable {
    segment: OwnedFd,
    shape: Shape,
    bells: [Bell; 2],
}

impl Cable {
    fn new(frames: u32, mtu: u32) -> Cable {
        let shape = Shape::new(frames, mtu).expect("shape");
        let segment = memfd(shape.bytes());
        format(segment.as_fd(), shape).expect("format");
        Cable { segment, shape, bells: [(); 2].map(|()| Bell::new().expect("eventfd")) }
    }

    fn open(&self, side: Side) -> Result<Wire, PortError> {
        let [a, b] = [0, 1].map(|end| Bell::duplicate(self.bells[end].as_fd()).expect("dup"));
        let bells = if side == Side::A { (a, b) } else { (b, a) };
        Wire::open(self.segment.as_fd(), self.shape, side, bells, peer())
    }

    fn ends(&self) -> (Wire, Wire) {
        (self.open(Side::A).expect("open"), self.open(Side::B).expect("open"))
    }

    /// The segment as a hostile peer sees it.
    fn memory(&self) -> Mapping {
        Mapping::new(self.segment.as_fd(), self.shape.bytes(), true).expect("map")
    }
}

fn peer() -> Address {
    ([127, 0, 0, 1], 1).into()
}
