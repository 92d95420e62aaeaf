//! Arbitrary bytes in a channel's segment, and arbitrary writes between the calls of both ends.
//!
//! The input is a program of 4-byte steps: where to write (a region and a place in it), what, and which call follows.
//! Every access of the crate is bounds-checked, so a way out of a mapping shows as a panic.
#![no_main]

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use snap_dataplane::bell::Bell;
use snap_dataplane::channel::{self, Rx, Tx};
use snap_dataplane::core::{self, Grant, Role};
use snap_dataplane::error::Error;
use snap_dataplane::layout::{self, PoolRef};
use snap_dataplane::ring::ARMED_EVENT;
use snap_dataplane::segment::Mapping;

const SLOTS: u32 = 64;
const POOL: usize = 16 * 1024;

struct Segments {
    ring: OwnedFd,
    pools: [OwnedFd; 2],
    bells: [Bell; 2],
    map: Mapping,
}

fn memfd(bytes: usize) -> OwnedFd {
    let fd = memfd_create("snap-fuzz", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, bytes as u64).expect("ftruncate");
    fd
}

thread_local! {
    static SEGMENTS: RefCell<Segments> = RefCell::new({
        let ring = memfd(layout::ring_bytes(SLOTS));
        let map = Mapping::new(ring.as_fd(), layout::ring_bytes(SLOTS), true).expect("mapping");
        Segments { ring, pools: [memfd(POOL), memfd(POOL)], bells: [Bell::new().expect("bell"), Bell::new().expect("bell")], map }
    });
}

fn open(segments: &Segments, role: Role) -> (Tx, Rx) {
    let grant = Grant {
        role,
        ring: segments.ring.as_fd(),
        pools: [(Some(segments.pools[0].as_fd()), POOL), (Some(segments.pools[1].as_fd()), POOL)],
        slots: SLOTS,
        bells: [segments.bells[0].as_fd(), segments.bells[1].as_fd()],
        generation: 1,
        rights: 3,
        gate: None,
        arena: None,
    };
    let (_, tx, rx) = channel::open(&grant).expect("a fresh header");
    (tx, rx)
}

fn place(region: u8, at: u8) -> usize {
    let at = usize::from(at);
    match region % 8 {
        0 | 1 => layout::OFF_DIRECTION[usize::from(region & 1)] + at % 6 * 64,
        2 | 3 => layout::slots_offset(SLOTS, usize::from(region & 1)) + at * 16,
        4 | 5 => layout::returns_offset(SLOTS, usize::from(region & 1)) + at % 64 * 8,
        6 => layout::OFF_STATE,
        _ => layout::OFF_SLOTS_AREA + at * 8,
    }
}

fn word(what: u8, region: u8) -> u64 {
    let small = u64::from(what);
    match region >> 5 {
        0 | 1 => small,
        2 => layout::emit(usize::from(what) * 5, 0, false)[0],
        3 => layout::emit(usize::from(what) * 65, 0, true)[0],
        4 => small << 32 | small & 63,
        5 => u64::MAX - small,
        6 => POOL as u64 - small,
        _ => small << (small & 63),
    }
}

fn receive(rx: &mut Rx, held: &mut Vec<PoolRef>, keep: bool) {
    for messages in 0.. {
        assert!(messages <= SLOTS, "a burst is at most a ring");
        if rx.check().is_err() {
            return;
        }
        let Ok(Some(header)) = rx.peek() else { return };
        if header.pooled && keep {
            let Ok(place) = rx.take_pooled(header) else { return };
            rx.core().peer_pool().expect("a pool").read(place.offset as usize, &mut vec![0; header.len]);
            held.push(place);
        } else {
            let _ = rx.take_into(header, &mut vec![0; header.len]);
        }
    }
}

fn call(tx: &mut Tx, rx: &mut Rx, held: &mut Vec<PoolRef>, which: u8) {
    match which % 8 {
        0 | 1 => receive(rx, held, which % 8 == 1),
        2 => {
            let _ = tx.put(1, &[7; 1008][..usize::from(which) * 3]);
            tx.publish();
        }
        3 => {
            let _ = tx.put(2, &[8; 4096][..1009 + usize::from(which)]);
            tx.publish();
        }
        4 => {
            if let Some(place) = held.pop() {
                rx.core().give_back(place.token);
            }
        }
        5 => {
            let _ = (rx.arm(ARMED_EVENT), tx.arm_stalled(ARMED_EVENT), rx.idle());
        }
        6 => {
            if let Ok(loan) = tx.loan(usize::from(which) * 64) {
                tx.core().cancel_loan(loan.place.token);
            }
        }
        _ => {
            let _ = (tx.core().loans_out(), tx.room(), tx.core().state_name());
        }
    }
}

fuzz_target!(|program: &[u8]| {
    SEGMENTS.with_borrow_mut(|segments| {
        for at in (0..segments.map.len()).step_by(8) {
            segments.map.u64_at(at).store(0, Ordering::Relaxed);
        }
        core::init_header(&segments.map, SLOTS, 1, 1);
        let (mut client, mut server) = (open(segments, Role::Client), open(segments, Role::Server));
        let mut held = [Vec::new(), Vec::new()];
        for step in program.chunks_exact(4) {
            segments.map.u64_at(place(step[0], step[1])).store(word(step[2], step[0]), Ordering::Relaxed);
            let faulted = [&client, &server].map(|end| matches!(end.0.core().check(), Err(Error::Faulted(_))));
            let (end, held) = if step[3] & 128 == 0 {
                (&mut client, &mut held[0])
            } else {
                (&mut server, &mut held[1])
            };
            call(&mut end.0, &mut end.1, held, step[3] & 127);
            // A fault that an end found itself outlives whatever the segment says later.
            let own = usize::from(step[3] & 128 != 0);
            if faulted[own] && step[0] % 8 != 6 {
                assert!(end.0.core().check().is_err());
            }
        }
    });
});
