//! A wire between two engines of one host: a segment of shared memory with a ring of frames each way.
//!
//! One of the few files with `unsafe`: the sender's engine writes its packets straight into the ring. The receiver copies
//! each out once, as the other side may write at any time, what it likes; indexes and lengths are read once and checked
//! before use. Each side keeps its own index in private memory; the shared one it only writes, except when it takes over
//! the wire from another engine. What that one had not yet published, or had copied and not kept, is a lost packet.
//!
//! Bytes, little endian. Page 0: magic u64, version u32, frames of a ring u32, MTU u32. Page 1: for each direction 512
//! bytes: tail u64, head u64, data-armed u32, room-armed u32, each on a cache line of its own. From page 2: the frames of
//! direction 0, then those of direction 1. A frame is its packet's length u32, four bytes of nothing, and the packet; an odd
//! number of lines apart, so that frames do not meet in the same lines of a cache.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Address, Port, PortError, Result, Statistics};
use crate::bell::{self, Bell};
use crate::error::{Error, Fault};
use crate::ring::{take_down, ARMED_EVENT, DISARMED};
use crate::segment::Mapping;
use crate::sync::full_fence;

const MAGIC: u64 = u64::from_le_bytes(*b"SNAPWIRE");
const VERSION: u32 = 1;
const OFF_VERSION: usize = 8;
const OFF_FRAMES: usize = 12;
const OFF_MTU: usize = 16;

const OFF_DIRECTION: usize = 4096;
const DIRECTION: usize = 512;
const TAIL: usize = 0;
const HEAD: usize = 64;
const DATA_ARMED: usize = 128;
const ROOM_ARMED: usize = 192;

const OFF_RINGS: usize = 8192;
const PREFIX: usize = 8;
const LINE: usize = 64;

const MAX_FRAMES: u32 = 1 << 16;
const MAX_MTU: u32 = 1 << 16;
/// Packets, and bytes, that one burst takes at most: what a core keeps near while it works through them.
const BURST: u64 = 64;
const BURST_BYTES: usize = 128 << 10;

/// How a wire is laid out. Told to both sides by those who made it; never taken from the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    frames: u32,
    mtu: u32,
}

impl Shape {
    /// Rings of `frames` frames (a power of two up to 65,536) of up to `mtu` bytes (up to 65,536); otherwise None.
    pub fn new(frames: u32, mtu: u32) -> Option<Shape> {
        let valid = frames.is_power_of_two() && frames <= MAX_FRAMES && (1..=MAX_MTU).contains(&mtu);
        valid.then_some(Shape { frames, mtu })
    }

    /// Size of the segment in bytes.
    pub fn bytes(self) -> usize {
        OFF_RINGS + 2 * self.ring()
    }

    fn stride(self) -> usize {
        ((PREFIX + self.mtu as usize).div_ceil(LINE) | 1) * LINE
    }

    fn ring(self) -> usize {
        (self.frames as usize * self.stride()).next_multiple_of(4096)
    }

    fn frame(self, direction: usize, index: u64) -> usize {
        let slot = (index & u64::from(self.frames - 1)) as usize;
        OFF_RINGS + direction * self.ring() + slot * self.stride()
    }
}

/// Which end of a wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

/// A descriptor of this process, by a number that somebody told. Fails when it is none.
pub fn duplicate(number: i32) -> rustix::io::Result<OwnedFd> {
    if number < 0 {
        return Err(rustix::io::Errno::BADF);
    }
    // SAFETY: not -1, by the check above; borrowed for one system call, which fails for a number that is not open.
    rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(number) }, 0)
}

/// A formatted segment that neither side can change the size of.
pub fn make(shape: Shape) -> Result<OwnedFd> {
    use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags, SealFlags};
    let os = |errno: rustix::io::Errno| PortError::Os { what: "making a wire", source: errno.into() };
    let fd = memfd_create("snap-wire", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(os)?;
    ftruncate(&fd, shape.bytes() as u64).map_err(os)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(os)?;
    format(fd.as_fd(), shape)?;
    Ok(fd)
}

/// Write the header of a fresh, zeroed segment.
pub fn format(segment: BorrowedFd<'_>, shape: Shape) -> Result<()> {
    let map = Mapping::new(segment, shape.bytes(), true).map_err(PortError::from)?;
    map.u32_at(OFF_VERSION).store(VERSION.to_le(), Ordering::Relaxed);
    map.u32_at(OFF_FRAMES).store(shape.frames.to_le(), Ordering::Relaxed);
    map.u32_at(OFF_MTU).store(shape.mtu.to_le(), Ordering::Relaxed);
    map.u64_at(0).store(MAGIC.to_le(), Ordering::Release);
    Ok(())
}

pub struct Wire {
    map: Mapping,
    shape: Shape,
    out: Sender,
    inward: Receiver,
    mine: Bell,
    theirs: Bell,
    peer: Address,
    fault: Option<Fault>,
    statistics: Statistics,
}

struct Sender {
    direction: usize,
    tail: u64,
    published: u64,
    head: u64,
    /// `frame` found no room, and nothing was tried since.
    starved: bool,
}

struct Receiver {
    direction: usize,
    head: u64,
    tail: u64,
    buffer: Box<[u8]>,
    /// Start and length of each packet of the burst in `buffer`.
    pieces: Vec<(usize, usize)>,
}

impl Wire {
    /// One side of a formatted wire, which may be under way. `mine` is rung by the other side, `theirs` by this one; `peer`
    /// is what packets are said to come from.
    ///
    /// Fails with a fault when the segment is not of this shape, or its indexes are impossible.
    pub fn open(
        segment: BorrowedFd<'_>,
        shape: Shape,
        side: Side,
        (mine, theirs): (Bell, Bell),
        peer: Address,
    ) -> Result<Wire> {
        let map = Mapping::new(segment, shape.bytes(), true).map_err(PortError::from)?;
        check_header(&map, shape)?;
        let (out, inward) = match side {
            Side::A => (0, 1),
            Side::B => (1, 0),
        };
        let (tail, head) = cursors(&map, shape, out)?;
        let out = Sender { direction: out, tail, published: tail, head, starved: false };
        let (tail, head) = cursors(&map, shape, inward)?;
        let buffer = vec![0; BURST_BYTES.max(shape.mtu as usize)].into();
        let pieces = Vec::with_capacity(BURST as usize);
        let inward = Receiver { direction: inward, head, tail, buffer, pieces };
        let statistics = Statistics::default();
        Ok(Wire { map, shape, out, inward, mine, theirs, peer, fault: None, statistics })
    }

    /// Whether the next frame is ours to write.
    fn room(&mut self) -> std::result::Result<bool, Fault> {
        let frames = u64::from(self.shape.frames);
        if self.out.tail - self.out.head < frames {
            return Ok(true);
        }
        let head = index(&self.map, self.out.direction, HEAD).load(Ordering::Acquire);
        // Between our old view and what we published: anything else was never a state of this ring.
        if head.wrapping_sub(self.out.head) > self.out.published - self.out.head {
            return Err(Fault::Index);
        }
        self.out.head = head;
        Ok(self.out.tail - head < frames)
    }

    /// Copy the next burst out of the ring.
    fn take(&mut self) -> std::result::Result<(), Fault> {
        let inward = &mut self.inward;
        if inward.head == inward.tail {
            let tail = index(&self.map, inward.direction, TAIL).load(Ordering::Acquire);
            if tail.wrapping_sub(inward.head) > u64::from(self.shape.frames) {
                return Err(Fault::Index);
            }
            inward.tail = tail;
        }
        let count = inward.tail.wrapping_sub(inward.head).min(BURST);
        let mut end = 0;
        for _ in 0..count {
            let frame = self.shape.frame(inward.direction, inward.head);
            let len = u32::from_le(self.map.u32_at(frame).load(Ordering::Relaxed));
            if len == 0 || len > self.shape.mtu {
                return Err(Fault::Length);
            }
            let Some(room) = inward.buffer.get_mut(end..end + len as usize) else {
                break;
            };
            self.map.read(frame + PREFIX, room);
            inward.pieces.push((end, len as usize));
            end = (end + len as usize).next_multiple_of(LINE);
            inward.head = inward.head.wrapping_add(1);
            self.statistics.received_bytes += u64::from(len);
        }
        if count > 0 {
            self.statistics.received_packets += inward.pieces.len() as u64;
            index(&self.map, inward.direction, HEAD).store(inward.head, Ordering::Release);
            let armed = armed(&self.map, inward.direction, ROOM_ARMED);
            bell::wake(armed, take_down(armed, true), &self.theirs);
        }
        Ok(())
    }

    /// Whether there is something to do without sleeping. What a broken index means is found by the next use.
    fn ready(&self) -> bool {
        let tail = index(&self.map, self.inward.direction, TAIL).load(Ordering::Acquire);
        let head = index(&self.map, self.out.direction, HEAD).load(Ordering::Acquire);
        self.fault.is_some() || tail != self.inward.head || (self.out.starved && head != self.out.head)
    }

    fn stand(&self) -> Result<()> {
        match self.fault {
            Some(fault) => Err(fault.into()),
            None if self.map.shrunk() => Err(Fault::Shrunk.into()),
            None => Ok(()),
        }
    }

    /// The words that this side arms: its wait for packets, and its wait for room.
    fn own_words(&self) -> [&AtomicU32; 2] {
        [armed(&self.map, self.inward.direction, DATA_ARMED), armed(&self.map, self.out.direction, ROOM_ARMED)]
    }
}

impl Port for Wire {
    fn mtu(&self) -> usize {
        self.shape.mtu as usize
    }

    fn frame(&mut self) -> Option<&mut [u8]> {
        if self.fault.is_some() {
            return None;
        }
        match self.room() {
            Ok(true) => self.out.starved = false,
            Ok(false) => {
                self.out.starved = true;
                self.statistics.send_waits += 1;
                return None;
            }
            Err(fault) => {
                self.fault = Some(fault);
                return None;
            }
        }
        let start = self.shape.frame(self.out.direction, self.out.tail) + PREFIX;
        let len = self.shape.mtu as usize;
        assert!(start + len <= self.map.len());
        // SAFETY: in bounds by the assertion; the mapping is writable and lives as long as `self`, which is borrowed, so that
        // no other reference to these bytes exists in this process (the frame is ours: its index is not published). A
        // hostile peer may write them all the same: any bits are valid, and what was written here is only ever sent to it.
        Some(unsafe { std::slice::from_raw_parts_mut(self.map.base().add(start), len) })
    }

    fn push(&mut self, len: usize, _to: Address, _path: u8) {
        let room = self.out.tail - self.out.head < u64::from(self.shape.frames);
        assert!(room && len > 0 && len <= self.shape.mtu as usize);
        let frame = self.shape.frame(self.out.direction, self.out.tail);
        self.map.u32_at(frame).store((len as u32).to_le(), Ordering::Relaxed);
        self.out.tail += 1;
        self.statistics.sent_packets += 1;
        self.statistics.sent_bytes += len as u64;
    }

    fn flush(&mut self) -> Result<()> {
        self.stand()?;
        if self.out.tail == self.out.published {
            return Ok(());
        }
        self.statistics.sent_calls += 1;
        index(&self.map, self.out.direction, TAIL).store(self.out.tail, Ordering::Release);
        self.out.published = self.out.tail;
        let armed = armed(&self.map, self.out.direction, DATA_ARMED);
        bell::wake(armed, take_down(armed, true), &self.theirs);
        Ok(())
    }

    fn receive(&mut self) -> Result<usize> {
        self.inward.pieces.clear();
        self.stand()?;
        self.statistics.received_calls += 1;
        self.take().inspect_err(|fault| self.fault = Some(*fault))?;
        Ok(self.inward.pieces.len())
    }

    fn packet(&self, index: usize) -> (&[u8], Address) {
        let (start, len) = self.inward.pieces[index];
        (&self.inward.buffer[start..start + len], self.peer)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.mine.as_fd()
    }

    fn arm(&mut self) -> bool {
        let [data, room] = self.own_words();
        data.swap(ARMED_EVENT, Ordering::AcqRel);
        if self.out.starved {
            room.swap(ARMED_EVENT, Ordering::AcqRel);
        }
        full_fence();
        let ready = self.ready();
        if ready {
            self.disarm();
        }
        !ready
    }

    fn disarm(&mut self) {
        for word in self.own_words() {
            if word.load(Ordering::Relaxed) != DISARMED {
                word.swap(DISARMED, Ordering::AcqRel);
            }
        }
        self.mine.drain();
    }

    fn statistics(&self) -> Statistics {
        self.statistics
    }
}

fn index(map: &Mapping, direction: usize, which: usize) -> &AtomicU64 {
    map.u64_at(OFF_DIRECTION + direction * DIRECTION + which)
}

fn armed(map: &Mapping, direction: usize, which: usize) -> &AtomicU32 {
    map.u32_at(OFF_DIRECTION + direction * DIRECTION + which)
}

fn check_header(map: &Mapping, shape: Shape) -> Result<()> {
    if u64::from_le(map.u64_at(0).load(Ordering::Acquire)) != MAGIC {
        return Err(Fault::Magic.into());
    }
    if u32::from_le(map.u32_at(OFF_VERSION).load(Ordering::Relaxed)) != VERSION {
        return Err(Fault::Version.into());
    }
    let told = [OFF_FRAMES, OFF_MTU].map(|offset| u32::from_le(map.u32_at(offset).load(Ordering::Relaxed)));
    if told != [shape.frames, shape.mtu] {
        return Err(Fault::Geometry.into());
    }
    Ok(())
}

/// Tail and head of a ring, as the engine before this one left them.
fn cursors(map: &Mapping, shape: Shape, direction: usize) -> Result<(u64, u64)> {
    let [tail, head] = [TAIL, HEAD].map(|which| index(map, direction, which).load(Ordering::Acquire));
    // A ring of packets never gets to half of what an index can count, so both can be compared plainly.
    if tail > u64::MAX / 2 || head > tail || tail - head > u64::from(shape.frames) {
        return Err(Fault::Index.into());
    }
    Ok((tail, head))
}

impl From<Error> for PortError {
    fn from(error: Error) -> PortError {
        match error {
            Error::Faulted(fault) => PortError::Faulted(fault),
            Error::Os { what, source } => PortError::Os { what, source },
            other => PortError::Os { what: "a segment", source: std::io::Error::other(other) },
        }
    }
}
