//! A port on UDP sockets: many packets with one system call, and packets of one size for one address as one buffer
//! through the network stack (UDP_SEGMENT, UDP_GRO).
//!
//! There is one socket for each path, so that the network, which spreads by source port, takes different ways. The first
//! one receives: it has the port number that peers know. Packets are written where they are sent from, one after the other;
//! a run of them for one address and path is one message.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use super::sys::{self, Incoming, Outgoing, BATCH};
use super::{Address, Port, PortError, Result, Statistics};

/// The longest packet of any UDP port: 65,535 bytes less the headers of IPv6 and UDP, which are the longer ones.
pub const MAX_MTU: usize = 65_535 - 48;
/// More are refused by some versions of Linux (UDP_MAX_SEGMENTS).
const MAX_SEGMENTS: usize = 64;
/// Bytes of packets that wait for `flush`: four messages of full length.
const ROOM: usize = 4 << 16;
/// Between the starts of received messages: the longest one, and a line, as starts a power of two apart would all meet in
/// the same few lines of a cache.
const STRIDE: usize = (1 << 16) + 64;
/// What a socket should hold, in bytes; the system may grant less.
const SOCKET_BUFFER: i32 = 4 << 20;
/// Refusals in a row after which packets are not merged any more.
const REFUSALS: u32 = 16;

/// Packets of `size` bytes (the last one may be shorter) that leave as one message.
struct Run {
    start: usize,
    len: usize,
    size: usize,
    to: Address,
}

impl Run {
    fn packets(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    /// Whether a packet of `len` bytes for `to`, written at `end`, can be one of this run.
    fn takes(&self, end: usize, len: usize, to: Address) -> bool {
        self.start + self.len == end
            && self.to == to
            && len <= self.size
            && self.len % self.size == 0
            && self.len / self.size < MAX_SEGMENTS
            && self.len + len <= MAX_MTU
    }
}

/// One source port, and what waits to leave by it.
struct Lane {
    socket: UdpSocket,
    runs: VecDeque<Run>,
}

/// One packet of the burst.
struct Piece {
    start: usize,
    len: usize,
    message: usize,
}

pub struct Udp {
    lanes: Vec<Lane>,
    v6: bool,
    mtu: usize,
    room: Box<[u8]>,
    end: usize,
    refusals: u32,
    buffer: Box<[u8]>,
    incoming: Vec<Incoming>,
    pieces: Vec<Piece>,
    /// When the burst was taken, in ns since 1970.
    received_at: u64,
    overflows_before: u32,
    statistics: Statistics,
}

impl Udp {
    /// A port on these bound sockets, the first of which receives. They may have been in use by another port, whose
    /// packets that wait in them come here. `mtu` is the longest packet in bytes, without the headers of UDP and IP.
    ///
    /// Fails without a socket, on what is no bound UDP socket, and on an MTU of 0 or above `MAX_MTU`.
    pub fn from_fds(sockets: Vec<OwnedFd>, mtu: usize) -> Result<Udp> {
        if mtu == 0 || mtu > MAX_MTU {
            return Err(os("the MTU of a UDP port", io::ErrorKind::InvalidInput.into()));
        }
        let lanes = sockets.into_iter().map(Lane::new).collect::<Result<Vec<_>>>()?;
        let Some(first) = lanes.first() else {
            return Err(os("a UDP port without a socket", io::ErrorKind::InvalidInput.into()));
        };
        let fd = first.socket.as_fd();
        let v6 = first.socket.local_addr().map_err(|error| os("the address of a UDP socket", error))?.is_ipv6();
        let statistics = Statistics {
            merges_sent: sys::option(fd, libc::SOL_UDP, libc::UDP_SEGMENT).is_ok(),
            merges_received: sys::set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok(),
            ..Statistics::default()
        };
        let _ = sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, SOCKET_BUFFER);
        let _ = sys::set_option(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1);
        for lane in &lanes[1..] {
            // Nobody reads there: let the system throw away what comes.
            let _ = sys::set_option(lane.socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 0);
        }
        let overflows_before = sys::overflows(fd).unwrap_or(0);
        Ok(Udp {
            lanes,
            v6,
            mtu,
            room: vec![0; ROOM].into(),
            end: 0,
            refusals: 0,
            buffer: vec![0; BATCH * STRIDE].into(),
            incoming: Vec::with_capacity(BATCH),
            pieces: Vec::with_capacity(BATCH * MAX_SEGMENTS),
            received_at: 0,
            overflows_before,
            statistics,
        })
    }

    /// A port on fresh sockets: the first one bound to `local`, the others to free ports of the same address.
    pub fn bind(local: SocketAddr, paths: usize, mtu: usize) -> Result<Udp> {
        let sockets = (0..paths)
            .map(|path| UdpSocket::bind(SocketAddr::new(local.ip(), if path == 0 { local.port() } else { 0 })))
            .map(|socket| socket.map(OwnedFd::from))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|error| os("bind of a UDP socket", error))?;
        Udp::from_fds(sockets, mtu)
    }

    /// The sockets, for whoever goes on; what was pushed and has not left is lost.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.lanes.into_iter().map(|lane| lane.socket.into()).collect()
    }

    /// Where peers send to.
    pub fn local(&self) -> Result<Address> {
        self.lanes[0].socket.local_addr().map_err(|error| os("the address of a UDP socket", error))
    }

    /// Packets as single messages from now on, as where the system refuses to merge them.
    pub fn merge_nothing(&mut self) {
        self.statistics.merges_sent = false;
        self.statistics.merges_received = false;
        let _ = sys::set_option(self.fd(), libc::SOL_UDP, libc::UDP_GRO, 0);
        for lane in &mut self.lanes {
            lane.runs = lane.runs.iter().flat_map(singles).collect();
        }
    }

    /// Send what waits in one lane, until its socket is full.
    fn flush_lane(&mut self, index: usize) -> Result<()> {
        let (lane, statistics) = (&mut self.lanes[index], &mut self.statistics);
        while !lane.runs.is_empty() {
            statistics.sent_calls += 1;
            let messages = lane.runs.iter().take(BATCH).map(|run| Outgoing {
                bytes: &self.room[run.start..run.start + run.len],
                // At most MAX_MTU, which a u16 holds.
                segment: (run.len > run.size).then_some(run.size as u16),
                to: if self.v6 { mapped(run.to) } else { run.to },
            });
            match sys::send(lane.socket.as_fd(), messages) {
                Ok(sent) => {
                    for run in lane.runs.drain(..sent) {
                        statistics.sent_packets += run.packets() as u64;
                        statistics.sent_bytes += run.len as u64;
                        if run.packets() > 1 {
                            self.refusals = 0;
                        }
                    }
                }
                Err(error) => match reaction(&error, lane.runs[0].packets()) {
                    Reaction::Again => {}
                    Reaction::Wait => {
                        statistics.send_waits += 1;
                        return Ok(());
                    }
                    Reaction::Unmerge { for_good } => {
                        statistics.unmerged += 1;
                        self.refusals += 1;
                        statistics.merges_sent &= !for_good && self.refusals < REFUSALS;
                        lane.unmerge_first();
                    }
                    Reaction::Drop => {
                        let dropped = lane.runs.pop_front().map_or(0, |run| run.packets());
                        statistics.send_drops += dropped as u64;
                    }
                    Reaction::Fail => return Err(os("sendmmsg", error)),
                },
            }
        }
        Ok(())
    }

    /// Find the packets in the messages that came.
    fn split(&mut self) {
        for (message, incoming) in self.incoming.iter().enumerate() {
            if incoming.cut {
                self.statistics.receive_drops += 1;
                continue;
            }
            let (start, end) = (message * STRIDE, message * STRIDE + incoming.len);
            let size = incoming.segment.unwrap_or(incoming.len).max(1);
            self.statistics.received_bytes += incoming.len as u64;
            self.pieces.extend((start..end).step_by(size).map(|start| Piece {
                start,
                len: size.min(end - start),
                message,
            }));
        }
        self.statistics.received_packets += self.pieces.len() as u64;
    }
}

impl Port for Udp {
    fn mtu(&self) -> usize {
        self.mtu
    }

    fn frame(&mut self) -> Option<&mut [u8]> {
        self.room.get_mut(self.end..self.end + self.mtu)
    }

    fn push(&mut self, len: usize, to: Address, path: u8) {
        assert!(len > 0 && len <= self.mtu && self.end + len <= self.room.len());
        let index = usize::from(path) % self.lanes.len();
        let runs = &mut self.lanes[index].runs;
        match runs.back_mut() {
            Some(run) if self.statistics.merges_sent && run.takes(self.end, len, to) => run.len += len,
            _ => runs.push_back(Run { start: self.end, len, size: len, to }),
        }
        self.end += len;
    }

    fn flush(&mut self) -> Result<()> {
        for index in 0..self.lanes.len() {
            self.flush_lane(index)?;
        }
        if self.lanes.iter().all(|lane| lane.runs.is_empty()) {
            self.end = 0;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<usize> {
        self.incoming.clear();
        self.pieces.clear();
        self.statistics.received_calls += 1;
        match sys::receive(self.lanes[0].socket.as_fd(), &mut self.buffer, STRIDE, &mut self.incoming) {
            Ok(()) => {
                self.received_at =
                    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
                self.split();
            }
            Err(error) => match reaction(&error, 1) {
                Reaction::Fail => return Err(os("recvmmsg", error)),
                // Nothing there, or news of a packet that some host refused.
                _ => return Ok(0),
            },
        }
        Ok(self.pieces.len())
    }

    fn packet(&self, index: usize) -> (&[u8], Address) {
        let piece = &self.pieces[index];
        (&self.buffer[piece.start..piece.start + piece.len], self.incoming[piece.message].from)
    }

    fn waited(&self, index: usize) -> u64 {
        let arrived = self.incoming[self.pieces[index].message].arrived;
        arrived.map_or(0, |arrived| self.received_at.saturating_sub(arrived))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.lanes[0].socket.as_fd()
    }

    fn blocked(&self) -> Option<BorrowedFd<'_>> {
        self.lanes.iter().find(|lane| !lane.runs.is_empty()).map(|lane| lane.socket.as_fd())
    }

    fn statistics(&self) -> Statistics {
        let overflows = sys::overflows(self.fd()).unwrap_or(self.overflows_before);
        let lost = overflows.wrapping_sub(self.overflows_before);
        Statistics { receive_drops: self.statistics.receive_drops + u64::from(lost), ..self.statistics }
    }
}

impl Lane {
    fn new(socket: OwnedFd) -> Result<Lane> {
        let socket = UdpSocket::from(socket);
        socket.set_nonblocking(true).map_err(|error| os("a UDP socket that does not block", error))?;
        do_not_fragment(&socket).map_err(|error| os("a UDP socket that does not fragment", error))?;
        let _ = sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, SOCKET_BUFFER);
        Ok(Lane { socket, runs: VecDeque::new() })
    }

    fn unmerge_first(&mut self) {
        if let Some(run) = self.runs.pop_front() {
            singles(&run).rev().for_each(|single| self.runs.push_front(single));
        }
    }
}

/// The packets of a run as runs of one packet.
fn singles(run: &Run) -> impl DoubleEndedIterator<Item = Run> {
    let (start, end, size, to) = (run.start, run.start + run.len, run.size, run.to);
    (0..run.packets()).map(move |packet| {
        let start = start + packet * size;
        let len = size.min(end - start);
        Run { start, len, size: len, to }
    })
}

enum Reaction {
    Again,
    Wait,
    Unmerge { for_good: bool },
    Drop,
    Fail,
}

/// What a failed call asks for; `packets` are in the message that it failed on.
fn reaction(error: &io::Error, packets: usize) -> Reaction {
    match error.raw_os_error() {
        Some(libc::EINTR) => Reaction::Again,
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Reaction::Wait,
        // EIO: the device cannot do the checksums. The others may as well be about a path with a smaller MTU, which then
        // refuses the single packets too.
        Some(libc::EIO) if packets > 1 => Reaction::Unmerge { for_good: true },
        Some(libc::EINVAL | libc::EMSGSIZE) if packets > 1 => Reaction::Unmerge { for_good: false },
        Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EOPNOTSUPP | libc::ENOSYS) | None => Reaction::Fail,
        _ => Reaction::Drop,
    }
}

/// The longest packet in bytes that the system now believes to reach `to` in one piece.
pub fn path_mtu(to: Address) -> io::Result<usize> {
    let (any, level, name, headers) = match to {
        SocketAddr::V4(_) => (SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), libc::IPPROTO_IP, libc::IP_MTU, 28),
        SocketAddr::V6(_) => (SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), libc::IPPROTO_IPV6, libc::IPV6_MTU, 48),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    let mtu = sys::option(socket.as_fd(), level, name)?;
    Ok(usize::try_from(mtu).unwrap_or(0).saturating_sub(headers).min(MAX_MTU))
}

fn do_not_fragment(socket: &UdpSocket) -> io::Result<()> {
    let fd = socket.as_fd();
    if socket.local_addr()?.is_ipv6() {
        sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
    }
    // On sockets of IPv6 for the mapped addresses.
    sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
}

/// The address as a socket of IPv6 wants it.
fn mapped(address: Address) -> Address {
    match address {
        SocketAddr::V4(v4) => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
        v6 => v6,
    }
}

fn os(what: &'static str, source: io::Error) -> PortError {
    PortError::Os { what, source }
}
