//! Arbitrary writes to a state segment between the calls of its writer, of a successor and of whoever verifies it.
//!
//! The input is a program of 6-byte steps: where to write (a region and a place in it), what, and which call follows.
//! Every access of the crate is bounds-checked, so a way out of the mapping shows as a panic; a loop as a timeout.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};

use libfuzzer_sys::fuzz_target;
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use snap_dataplane::state::{
    copy_to, save, saved, verify, Array, Frame, Kind, ObjectSpec, Schema, Segment, Slab, Table, MIN_BYTES,
};

const SIZE: usize = MIN_BYTES + (64 << 10);
const LOG: usize = 4096;

fn memfd() -> OwnedFd {
    let fd = memfd_create("snap-fuzz", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, SIZE as u64).expect("ftruncate");
    fd
}

fn formatted() -> OwnedFd {
    let object = |kind, name: &str, key, item, count| ObjectSpec {
        kind,
        name: name.into(),
        key,
        item,
        count,
        fields: "{}".into(),
    };
    let objects = vec![
        object(Kind::Table, "rows", 3, 9, 20),
        object(Kind::Slab, "items", 0, 24, 70),
        object(Kind::Array, "cells", 0, 8, 600),
    ];
    let schema = Schema { engine: "fuzz".into(), name: "fuzz".into(), version: 1, oldest: 1, objects };
    let fd = memfd();
    Frame::format(fd.as_fd(), &schema, LOG).expect("format");
    fd
}

/// What somebody writes, mostly where it matters: header, log, counters and links; small numbers as often as wild ones.
fn scribble(fd: &OwnedFd, regions: &[(usize, usize)], step: &[u8]) {
    let (start, words) = regions[usize::from(step[0]) % regions.len()];
    let place = start + usize::from(step[1]) % words * 8;
    let value = match step[2] % 4 {
        0 => u64::from(step[3]),
        1 => u64::from(step[3]) << 32 | u64::from(step[4]),
        2 => u64::MAX - u64::from(step[3]),
        _ => return,
    };
    rustix::io::pwrite(fd, &value.to_le_bytes(), place as u64).expect("pwrite");
}

fn call(segment: &mut Segment, which: u8, with: u8) {
    let (Ok(table), Ok(slab), Ok(array)) =
        (Table::of(segment, "rows"), Slab::of(segment, "items"), Array::of(segment, "cells"))
    else {
        return;
    };
    let key = [with % 30, 0, 1];
    let _ = match which % 14 {
        0 | 1 => table.put(segment, &key, &[with; 9]),
        2 => table.delete(segment, &key).map(drop),
        3 => table.get(segment, &key, &mut [0; 9]).map(drop),
        4 => slab.allocate(segment).map(drop),
        5 => slab.free(segment, usize::from(with)),
        6 => slab.put_at(segment, usize::from(with), &[with; 24]),
        7 => array.write(segment, usize::from(with), &[with; 32]),
        8 => save(segment, &[with; 40]).and_then(|()| saved(segment).map(drop)),
        9 => segment.recover().map(drop),
        10 => verify(segment).map(drop),
        11 => segment.track(with % 2 == 0).map(|()| {
            segment.acknowledge();
            segment.take_dirty(table.object());
        }),
        12 => copy_to(segment, memfd().as_fd()).map(drop),
        _ => {
            segment.commit();
            Ok(())
        }
    };
}

fuzz_target!(|program: &[u8]| {
    let fd = formatted();
    let mut segment = Segment::open(fd.as_fd(), true).expect("a formatted segment opens");
    let mut regions = vec![(0, 96), (135_168, 16), (200_704, 4), (335_872, LOG / 8)];
    for object in segment.objects() {
        regions.push((object.meta, (object.data - object.meta) / 8));
        regions.push((object.data, object.data_len / 8));
    }
    for step in program.chunks_exact(6) {
        call(&mut segment, step[5], step[4]);
        scribble(&fd, &regions, step);
        if step[5] >= 224 {
            match Segment::open(fd.as_fd(), true) {
                Ok(successor) => segment = successor,
                Err(_) => return,
            }
        }
    }
    let _ = verify(&segment).expect("only the machine can fail here");
});
