//! A channel on real shared memory, with both ends in this process.
#![allow(dead_code)] // Each test binary uses its part.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use snap_dataplane::bell::Bell;
use snap_dataplane::channel::{self, Rx, Tx};
use snap_dataplane::core::{self, Core, Grant, Role, State};
use snap_dataplane::error::Result;
use snap_dataplane::gate::{self, Gate};
use snap_dataplane::layout;
use snap_dataplane::segment::Mapping;
use snap_dataplane::state::{self, Frame, ObjectSpec, Schema, Segment};

pub const GENERATION: u32 = 7;

pub fn memfd(bytes: usize) -> OwnedFd {
    let fd = memfd_create("snap-test", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, bytes as u64).expect("ftruncate");
    fd
}

/// A blank state segment with these objects.
pub fn state(objects: Vec<ObjectSpec>) -> OwnedFd {
    let fd = memfd(state::MIN_BYTES + (1 << 20));
    let schema = Schema { engine: "test".into(), name: "test".into(), version: 1, oldest: 1, objects };
    Frame::format(fd.as_fd(), &schema, 1 << 16).expect("format");
    fd
}

pub fn open_state(fd: &OwnedFd) -> Segment {
    Segment::open(fd.as_fd(), true).expect("open")
}

pub struct End {
    pub core: Arc<Core>,
    pub tx: Tx,
    pub rx: Rx,
}

/// What the kernel makes of a channel.
pub struct Segments {
    pub slots: u32,
    pub ring: OwnedFd,
    pub pools: [(OwnedFd, usize); 2],
    pub gate: OwnedFd,
    pub bells: [Bell; 2],
    pub arena: Option<(OwnedFd, usize)>,
    /// The kernel's own mapping, which is as good as a hostile client's.
    pub map: Mapping,
}

impl Segments {
    pub fn new(slots: u32, up: usize, down: usize) -> Segments {
        let ring = memfd(layout::ring_bytes(slots));
        let map = Mapping::new(ring.as_fd(), layout::ring_bytes(slots), true).expect("mapping");
        core::init_header(&map, slots, 1, GENERATION);
        let gate = memfd(gate::BYTES);
        Gate::new(gate.as_fd()).expect("gate").open(0, GENERATION);
        Segments {
            slots,
            ring,
            pools: [(memfd(up.max(1)), up), (memfd(down.max(1)), down)],
            gate,
            bells: [Bell::new().expect("eventfd"), Bell::new().expect("eventfd")],
            arena: None,
            map,
        }
    }

    pub fn with_arena(self, bytes: usize) -> Segments {
        Segments { arena: Some((memfd(bytes), bytes)), ..self }
    }

    pub fn open(&self, role: Role, rights: u8) -> Result<End> {
        let grant = Grant {
            role,
            ring: self.ring.as_fd(),
            pools: [(Some(self.pools[0].0.as_fd()), self.pools[0].1), (Some(self.pools[1].0.as_fd()), self.pools[1].1)],
            slots: self.slots,
            bells: [self.bells[0].as_fd(), self.bells[1].as_fd()],
            generation: GENERATION,
            rights,
            gate: (role == Role::Server).then(|| (self.gate.as_fd(), 0)),
            arena: self.arena.as_ref().map(|(fd, bytes)| (fd.as_fd(), *bytes)),
        };
        let (core, tx, rx) = channel::open(&grant)?;
        Ok(End { core, tx, rx })
    }

    pub fn client(&self) -> End {
        self.open(Role::Client, 3).expect("client")
    }

    pub fn server(&self) -> End {
        self.open(Role::Server, 3).expect("server")
    }

    pub fn shut_gate(&self) {
        Gate::new(self.gate.as_fd()).expect("gate").shut(0);
    }

    pub fn set_state(&self, state: State) {
        core::set_state(&self.map, &self.bells, state, None);
    }

    pub fn word(&self, offset: usize, value: u64) {
        self.map.u64_at(offset).store(value, std::sync::atomic::Ordering::SeqCst);
    }
}

pub fn channel(slots: u32, up: usize, down: usize) -> (Segments, End, End) {
    let segments = Segments::new(slots, up, down);
    let (client, server) = (segments.client(), segments.server());
    (segments, client, server)
}

/// The next message, copied.
pub fn take(rx: &mut Rx) -> Result<Option<(u64, Vec<u8>)>> {
    rx.check()?;
    let Some(header) = rx.peek()? else { return Ok(None) };
    let mut out = vec![0; header.len];
    rx.take_into(header, &mut out)?;
    Ok(Some((header.tag, out)))
}

/// Numbers that look random, and are the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
