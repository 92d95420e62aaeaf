//! A writer in a process of its own, killed at random instants while this one verifies and copies its state live.
//!
//! `SNAP_SEED=N cargo test --release --no-default-features --test state` repeats the writes of a run (not the instants).
#![cfg(not(loom))]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{memfd, Random};
use snap_dataplane::state::{
    saved, verify, Array, Frame, Kind, ObjectSpec, Schema, Segment, Slab, Table, LOG_BYTES, MIN_BYTES,
};

const ROWS: usize = 3000;
const ROW: usize = 40;
const ITEMS: usize = 500;
const ITEM: usize = 100;
const CELLS: usize = 20_000;
const KILLS: usize = 40;

fn schema() -> Schema {
    let object = |kind, name: &str, key, item, count| ObjectSpec {
        kind,
        name: name.into(),
        key,
        item,
        count,
        fields: String::new(),
    };
    let objects = vec![
        object(Kind::Table, "rows", 8, ROW, ROWS),
        object(Kind::Slab, "items", 0, ITEM, ITEMS),
        object(Kind::Array, "cells", 0, 4, CELLS),
    ];
    Schema { engine: "test".into(), name: "killed".into(), version: 1, oldest: 1, objects }
}

fn seed() -> u64 {
    let seed = match std::env::var("SNAP_SEED") {
        Ok(seed) => seed.parse().expect("SNAP_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64,
    };
    println!("SNAP_SEED={seed}");
    seed
}

enum Change {
    Put(u64, [u8; ROW]),
    Delete(u64),
    PutAt(usize, [u8; ITEM]),
    Free(usize),
    Cells(usize, Vec<u8>),
}

/// What poll `poll` does, the same in the writer and in the model. Whether there is such a row or item is theirs to see.
fn changes(seed: u64, poll: u64) -> Vec<Change> {
    let mut random = Random::new(seed.wrapping_add(poll.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    // Neighbouring seeds begin alike.
    for _ in 0..4 {
        random.next();
    }
    let mut change = || {
        let byte = random.next() as u8;
        match random.below(8) {
            0..=2 => Change::Put(random.below(ROWS) as u64, [byte; ROW]),
            3 | 4 => Change::Delete(random.below(ROWS) as u64),
            5 => Change::PutAt(random.below(ITEMS), [byte; ITEM]),
            6 => Change::Free(random.below(ITEMS)),
            _ => {
                let start = random.below(CELLS - 2000);
                Change::Cells(start, vec![byte; 4 * (1 + random.below(2000))])
            }
        }
    };
    (0..6).map(|_| change()).collect()
}

#[test]
#[ignore = "runs in the process that the other test kills; its standard input is the state"]
fn writer_to_be_killed() {
    let seed = std::env::var("SNAP_SEED").expect("a seed").parse().expect("a number");
    let mut segment = Segment::open(std::io::stdin().as_fd(), true).expect("open");
    let (table, slab, array) = objects(&segment);
    segment.recover().expect("recover");
    loop {
        let poll = segment.epoch();
        for change in changes(seed, poll) {
            match change {
                Change::Put(key, row) => table.put(&mut segment, &key.to_le_bytes(), &row).expect("put"),
                Change::Delete(key) => drop(table.delete(&mut segment, &key.to_le_bytes()).is_ok()),
                Change::PutAt(index, item) => slab.put_at(&mut segment, index, &item).expect("put_at"),
                Change::Free(index) => drop(slab.free(&mut segment, index).is_ok()),
                Change::Cells(start, data) => array.write(&mut segment, start, &data).expect("write"),
            }
        }
        snap_dataplane::state::save(&mut segment, &poll.to_le_bytes()).expect("save");
        segment.commit();
        segment.acknowledge();
    }
}

fn objects(frame: &Frame) -> (Table, Slab, Array) {
    (
        Table::of(frame, "rows").expect("table"),
        Slab::of(frame, "items").expect("slab"),
        Array::of(frame, "cells").expect("array"),
    )
}

/// The state in ordinary memory; also what a follower makes of the dirty marks.
#[derive(PartialEq)]
struct Copy {
    rows: HashMap<u64, Vec<u8>>,
    items: BTreeMap<usize, Vec<u8>>,
    cells: Vec<u8>,
}

impl Copy {
    fn new() -> Copy {
        Copy { rows: HashMap::new(), items: BTreeMap::new(), cells: vec![0; CELLS * 4] }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Put(key, row) => drop(self.rows.insert(key, row.to_vec())),
            Change::Delete(key) => drop(self.rows.remove(&key)),
            Change::PutAt(index, item) => drop(self.items.insert(index, item.to_vec())),
            Change::Free(index) => drop(self.items.remove(&index)),
            Change::Cells(start, data) => self.cells[start * 4..start * 4 + data.len()].copy_from_slice(&data),
        }
    }

    fn read(frame: &Frame) -> Copy {
        let (table, slab, array) = objects(frame);
        let mut copy = Copy::new();
        for key in 0..ROWS as u64 {
            let mut row = vec![0; ROW];
            if table.get(frame, &key.to_le_bytes(), &mut row).expect("get") {
                copy.rows.insert(key, row);
            }
        }
        for index in slab.live(frame) {
            let mut item = vec![0; ITEM];
            slab.read(frame, index as usize, 0, &mut item).expect("read");
            copy.items.insert(index as usize, item);
        }
        array.read(frame, 0, &mut copy.cells).expect("read");
        copy
    }
}

/// Copies what is marked, while the writer goes on.
struct Follower {
    slots: Vec<Vec<u8>>,
    copy: Copy,
}

impl Follower {
    fn follow(&mut self, frame: &Frame) {
        let (table, slab, array) = objects(frame);
        for slot in frame.take_dirty(table.object()) {
            let place = &mut self.slots[slot as usize];
            table.gather(frame, [slot].into_iter(), place).expect("gather");
        }
        for index in frame.take_dirty(slab.object()).into_iter().map(|index| index as usize) {
            let mut item = vec![0; ITEM];
            match slab.read(frame, index, 0, &mut item) {
                Ok(()) => self.copy.items.insert(index, item),
                Err(_) => self.copy.items.remove(&index),
            };
        }
        let per_block = array.object().per_block();
        for first in frame.take_dirty(array.object()).into_iter().map(|block| block as usize * per_block) {
            let last = CELLS.min(first + per_block);
            array.read(frame, first, &mut self.copy.cells[first * 4..last * 4]).expect("read");
        }
    }

    fn finish(&mut self, frame: &Frame) -> &Copy {
        self.follow(frame);
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        let live = self.slots.iter().filter(|slot| slot[4..8] == 1u32.to_le_bytes());
        self.copy.rows = live.map(|slot| (word(&slot[8..16]), slot[16..16 + ROW].to_vec())).collect();
        &self.copy
    }
}

#[test]
fn a_killed_writer_leaves_its_last_commit_to_its_successor_and_to_whoever_follows_it() {
    let seed = seed();
    let mut random = Random::new(seed);
    let fd = memfd(MIN_BYTES + (1 << 20));
    Frame::format(fd.as_fd(), &schema(), LOG_BYTES).expect("format");
    let mut model = Copy::new();
    let mut follower = Follower { slots: vec![vec![0; 8 + 8 + ROW]; ROWS], copy: Copy::new() };
    let (mut done, mut undone, mut looks) = (0, 0, 0);
    Frame::open(fd.as_fd(), true).expect("open").track(true).expect("track");
    for _ in 0..KILLS {
        let frame = Frame::open(fd.as_fd(), true).expect("open");
        let before = frame.epoch();
        run_and_kill(seed, &fd, Duration::from_micros(random.below(8000) as u64), || {
            if frame.epoch() > before {
                assert_eq!(verify(&frame).expect("verify"), Vec::<String>::new(), "of a state in use");
                follower.follow(&frame);
                looks += 1;
            }
        });
        assert_eq!(verify(&frame).expect("verify"), Vec::<String>::new(), "of what the death left");
        let mut segment = Segment::open(fd.as_fd(), true).expect("open");
        undone += u64::from(segment.recover().expect("recover") > 0);
        let epoch = segment.epoch();
        for poll in done..epoch {
            changes(seed, poll).into_iter().for_each(|change| model.apply(change));
        }
        assert_eq!(saved(&segment).expect("saved"), (epoch - 1).to_le_bytes());
        assert!(Copy::read(&segment) == model, "after {epoch} polls");
        assert!(*follower.finish(&segment) == model, "what was followed, after {epoch} polls");
        assert_eq!(verify(&segment).expect("verify"), Vec::<String>::new());
        done = epoch;
    }
    println!("{done} polls, {undone} of {KILLS} deaths inside of one, {looks} looks at a state in use");
    assert!(undone > 0 && looks > 0);
}

/// Start the writer, let it live for `life` after its first poll, look at it meanwhile, and kill it.
fn run_and_kill(seed: u64, fd: &OwnedFd, life: Duration, mut look: impl FnMut()) {
    let epoch = Frame::open(fd.as_fd(), false).expect("open");
    let first = epoch.epoch();
    let mut writer = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "writer_to_be_killed", "--ignored", "--quiet"])
        .env("SNAP_SEED", seed.to_string())
        .stdin(Stdio::from(fd.try_clone().expect("dup")))
        .stdout(Stdio::null())
        .spawn()
        .expect("spawn");
    let patience = Instant::now() + Duration::from_secs(20);
    while epoch.epoch() == first {
        assert!(writer.try_wait().expect("wait").is_none() && Instant::now() < patience, "the writer does not write");
        std::thread::sleep(Duration::from_micros(200));
    }
    let end = Instant::now() + life;
    while Instant::now() < end {
        look();
        std::thread::sleep(Duration::from_micros(300));
    }
    assert!(writer.try_wait().expect("wait").is_none(), "the writer ended by itself");
    writer.kill().expect("kill");
    writer.wait().expect("wait");
}
