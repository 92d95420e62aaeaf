//! A state against a model in ordinary memory, with deaths at every store, and bytes that anybody wrote.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};

use proptest::prelude::*;
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};

use super::*;

const KEY: usize = 5;
const ROW: usize = 7;
const ROWS: usize = 40;
const ITEM: usize = 24;
const ITEMS: usize = 70;
const CELLS: usize = 3000;
const LOG: usize = 64 * 1024;

fn schema() -> Schema {
    let object = |kind, name: &str, key, item, count| ObjectSpec {
        kind,
        name: name.into(),
        key,
        item,
        count,
        fields: "{}".into(),
    };
    Schema {
        engine: "test".into(),
        name: "model".into(),
        version: 2,
        oldest: 1,
        objects: vec![
            object(Kind::Table, "rows", KEY, ROW, ROWS),
            object(Kind::Slab, "items", 0, ITEM, ITEMS),
            object(Kind::Array, "cells", 0, 2, CELLS),
        ],
    }
}

fn memory(bytes: usize) -> OwnedFd {
    let fd = memfd_create("state", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, bytes as u64).expect("ftruncate");
    fd
}

fn formatted() -> OwnedFd {
    let fd = memory(MIN_BYTES + (1 << 20));
    Frame::format(fd.as_fd(), &schema(), LOG).expect("format");
    fd
}

fn open(fd: &OwnedFd) -> Segment {
    Segment::open(fd.as_fd(), true).expect("open")
}

#[derive(Clone, Debug)]
enum Op {
    Put(u8, u8),
    Delete(u8),
    Allocate,
    Free(usize),
    WriteItem(usize, usize, u8),
    PutAt(usize, u8),
    WriteCells(usize, usize, u8),
    Edit(usize, usize, u8),
    Save(usize, u8),
    Commit,
    Abort,
    Migrate,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u8..60, any::<u8>()).prop_map(|(key, row)| Op::Put(key, row)),
        4 => (0u8..60).prop_map(Op::Delete),
        2 => Just(Op::Allocate),
        1 => any::<usize>().prop_map(Op::Free),
        2 => (any::<usize>(), 0usize..ITEM, any::<u8>()).prop_map(|(n, at, byte)| Op::WriteItem(n, at, byte)),
        1 => (0usize..ITEMS, any::<u8>()).prop_map(|(n, byte)| Op::PutAt(n, byte)),
        2 => (0usize..CELLS, 1usize..900, any::<u8>()).prop_map(|(at, len, byte)| Op::WriteCells(at, len, byte)),
        1 => (0usize..CELLS, 1usize..900, any::<u8>()).prop_map(|(at, len, byte)| Op::Edit(at, len, byte)),
        1 => (0usize..600, any::<u8>()).prop_map(|(len, byte)| Op::Save(len, byte)),
        4 => Just(Op::Commit),
        1 => Just(Op::Abort),
        1 => Just(Op::Migrate),
    ]
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    rows: HashMap<Vec<u8>, Vec<u8>>,
    items: BTreeMap<usize, Vec<u8>>,
    cells: Vec<u8>,
    snapshot: Vec<u8>,
}

impl Model {
    fn new() -> Model {
        Model { cells: vec![0; CELLS * 2], ..Model::default() }
    }

    fn read(frame: &Frame) -> Model {
        let table = Table::of(frame, "rows").expect("table");
        let mut slots = vec![0; ROWS * table.slot()];
        let used = table.slots(frame, 0, &mut slots);
        let mut rows = HashMap::new();
        for slot in slots.chunks_exact(table.slot()).take(used).filter(|slot| slot[4..8] == 1u32.to_le_bytes()) {
            let (key, row) = (slot[8..8 + KEY].to_vec(), slot[8 + KEY..8 + KEY + ROW].to_vec());
            let mut found = [0; ROW];
            assert!(table.get(frame, &key, &mut found).expect("get") && found[..] == row[..]);
            rows.insert(key, row);
        }
        assert_eq!(rows.len(), table.len(frame));
        let slab = Slab::of(frame, "items").expect("slab");
        let item = |index: u64| {
            let mut bytes = vec![0; ITEM];
            slab.read(frame, index as usize, 0, &mut bytes).expect("read");
            (index as usize, bytes)
        };
        let items: BTreeMap<_, _> = slab.live(frame).into_iter().map(item).collect();
        assert_eq!(items.len(), slab.len(frame));
        let mut cells = vec![0; CELLS * 2];
        Array::of(frame, "cells").expect("array").read(frame, 0, &mut cells).expect("read");
        Model { rows, items, cells, snapshot: saved(frame).expect("saved") }
    }
}

fn key(number: u8) -> Vec<u8> {
    vec![number, 1, 2, 3, number]
}

/// What somebody in another process has copied by dirty marks alone.
struct Shadow {
    slots: Vec<u8>,
    items: BTreeMap<usize, Vec<u8>>,
    cells: Vec<u8>,
}

impl Shadow {
    fn new() -> Shadow {
        Shadow { slots: vec![0; ROWS * 24], items: BTreeMap::new(), cells: vec![0; CELLS * 2] }
    }

    fn follow(&mut self, frame: &Frame) {
        let table = Table::of(frame, "rows").expect("table");
        assert_eq!(table.slot(), 24);
        for slot in frame.take_dirty(table.object()) {
            let place = &mut self.slots[slot as usize * 24..][..24];
            table.gather(frame, [slot].into_iter(), place).expect("gather");
        }
        let slab = Slab::of(frame, "items").expect("slab");
        for index in frame.take_dirty(slab.object()) {
            let mut bytes = vec![0; ITEM];
            match slab.read(frame, index as usize, 0, &mut bytes) {
                Ok(()) => self.items.insert(index as usize, bytes),
                Err(_) => self.items.remove(&(index as usize)),
            };
        }
        let array = Array::of(frame, "cells").expect("array");
        let per_block = array.object().per_block();
        for block in frame.take_dirty(array.object()) {
            let first = block as usize * per_block;
            let last = CELLS.min(first + per_block);
            array.read(frame, first, &mut self.cells[first * 2..last * 2]).expect("read");
        }
    }

    fn equals(&self, model: &Model) {
        let live = self.slots.chunks_exact(24).filter(|slot| slot[4..8] == 1u32.to_le_bytes());
        let rows: HashMap<_, _> =
            live.map(|slot| (slot[8..8 + KEY].to_vec(), slot[8 + KEY..8 + KEY + ROW].to_vec())).collect();
        assert_eq!(rows, model.rows);
        assert_eq!(self.items, model.items);
        assert!(self.cells == model.cells, "cells");
    }
}

struct Run {
    model: Model,
    committed: Model,
    shadow: Shadow,
}

impl Run {
    fn step(&mut self, segment: &mut Segment, op: &Op) {
        // More than the log holds: what an engine does then.
        if segment.reserve(8, 4096).is_err() {
            segment.abort().expect("abort");
            self.model = self.committed.clone();
        }
        let table = Table::of(segment, "rows").expect("table");
        let slab = Slab::of(segment, "items").expect("slab");
        let array = Array::of(segment, "cells").expect("array");
        let nth = |n: usize| slab.live(segment).get(n % slab.len(segment).max(1)).map(|index| *index as usize);
        match *op {
            Op::Put(number, row) => match table.put(segment, &key(number), &[row; ROW]) {
                Ok(()) => drop(self.model.rows.insert(key(number), vec![row; ROW])),
                Err(StateError::Full(_)) => assert_eq!(self.model.rows.len(), ROWS),
                Err(error) => panic!("{error}"),
            },
            Op::Delete(number) => {
                let was = table.delete(segment, &key(number)).expect("delete");
                assert_eq!(was, self.model.rows.remove(&key(number)).is_some());
            }
            Op::Allocate => match slab.allocate(segment) {
                Ok(index) => assert!(self.model.items.insert(index, vec![0; ITEM]).is_none()),
                Err(StateError::Full(_)) => assert_eq!(self.model.items.len(), ITEMS),
                Err(error) => panic!("{error}"),
            },
            Op::Free(n) => {
                if let Some(index) = nth(n) {
                    slab.free(segment, index).expect("free");
                    assert!(self.model.items.remove(&index).is_some());
                }
            }
            Op::WriteItem(n, at, byte) => {
                if let Some(index) = nth(n) {
                    slab.write(segment, index, at, &[byte]).expect("write");
                    self.model.items.get_mut(&index).expect("the model has it")[at] = byte;
                }
            }
            Op::PutAt(index, byte) => {
                slab.put_at(segment, index, &[byte; ITEM]).expect("put_at");
                self.model.items.insert(index, vec![byte; ITEM]);
            }
            Op::WriteCells(at, len, byte) => {
                let len = len.min(CELLS - at);
                array.write(segment, at, &vec![byte; len * 2]).expect("write");
                self.model.cells[at * 2..(at + len) * 2].fill(byte);
            }
            Op::Edit(at, len, byte) => {
                let len = len.min(CELLS - at);
                let range = array.edit(segment, at, len).expect("edit");
                for place in range {
                    segment.put(place, &[byte]);
                }
                self.model.cells[at * 2..(at + len) * 2].fill(byte);
            }
            Op::Save(len, byte) => {
                save(segment, &vec![byte; len]).expect("save");
                self.model.snapshot = vec![byte; len];
            }
            Op::Commit => {
                segment.commit();
                self.committed = self.model.clone();
            }
            Op::Abort => {
                segment.abort().expect("abort");
                self.model = self.committed.clone();
            }
            Op::Migrate => self.shadow.follow(segment),
        }
    }
}

/// Do it, with a death at the store after `stores` others; whether it died.
fn dies(stores: u64, tear: u64, act: impl FnOnce()) -> bool {
    fuse::light(stores, tear);
    let outcome = catch_unwind(AssertUnwindSafe(act));
    fuse::put_out();
    match outcome {
        Ok(()) => false,
        Err(cause) if cause.is::<fuse::Died>() => true,
        Err(cause) => std::panic::resume_unwind(cause),
    }
}

proptest! {
    #[test]
    fn a_successor_finds_the_last_commit_wherever_its_predecessor_died(
        lives in prop::collection::vec((prop::collection::vec(op(), 1..60), 0u64..900, any::<u64>(), 0u64..60), 1..5),
    ) {
        let fd = formatted();
        let mut run = Run { model: Model::new(), committed: Model::new(), shadow: Shadow::new() };
        open(&fd).track(true).expect("track");
        for (ops, stores, tear, again) in lives {
            let mut segment = open(&fd);
            segment.acknowledge();
            dies(stores, tear, || {
                for op in &ops {
                    run.step(&mut segment, op);
                }
            });
            drop(segment);
            prop_assert_eq!(verify(&Frame::open(fd.as_fd(), false).expect("open")).expect("verify"), Vec::<String>::new());
            // The adopter may die, too.
            let mut adopter = open(&fd);
            dies(again, tear, || assert!(adopter.recover().is_ok()));
            let mut segment = open(&fd);
            segment.recover().expect("recover");
            prop_assert_eq!(&Model::read(&segment), &run.committed);
            prop_assert_eq!(verify(&segment).expect("verify"), Vec::<String>::new());
            run.shadow.follow(&segment);
            run.shadow.equals(&run.committed);
            run.model = run.committed.clone();
        }
    }

    #[test]
    fn damaged_bytes_are_found_or_harmless_but_never_followed(
        ops in prop::collection::vec(op(), 1..80),
        flips in prop::collection::vec((0usize..4, any::<usize>(), any::<u64>()), 1..8),
        cut: bool,
    ) {
        let fd = formatted();
        let mut run = Run { model: Model::new(), committed: Model::new(), shadow: Shadow::new() };
        let mut segment = open(&fd);
        for op in &ops {
            run.step(&mut segment, op);
        }
        if !cut {
            segment.commit();
        }
        let size = segment.header().size;
        for (kind, at, value) in flips {
            // Mostly where links and sizes are.
            let objects = segment.objects();
            let object = &objects[at % objects.len()];
            let offset = match kind {
                0 => at % (size / 8) * 8,
                1 => at % 96 * 8,
                2 => object.meta + at / 7 % ((object.data - object.meta) / 8) * 8,
                _ => object.data + at / 7 % (object.data_len / 8) * 8,
            };
            let value = if value % 3 == 0 { value } else { value % 100 };
            rustix::io::pwrite(&fd, &value.to_le_bytes(), offset as u64).expect("pwrite");
        }
        drop(segment);
        exercise(&fd);
    }
}

/// Every call on a segment of any bytes; what it answers does not matter, but that it does.
fn exercise(fd: &OwnedFd) {
    let Ok(mut segment) = Segment::open(fd.as_fd(), true) else { return };
    let _ = verify(&segment).expect("verify");
    let _ = segment.recover();
    let _ = verify(&segment).expect("verify");
    let _ = (segment.phase(), segment.used_bytes(), saved(&segment));
    if let Ok(table) = Table::of(&segment, "rows") {
        let mut row = vec![0; table.item()];
        for number in 0..60 {
            let mut key = key(number);
            key.resize(table.key(), 0);
            let _ = table.get(&segment, &key, &mut row);
            let _ = table.put(&mut segment, &key, &row);
            let _ = table.delete(&mut segment, &key);
        }
        let mut out = vec![0; 3 * table.slot()];
        table.slots(&segment, 0, &mut out);
        let _ = segment.take_dirty(table.object());
    }
    if let Ok(slab) = Slab::of(&segment, "items") {
        for _ in 0..3 {
            let _ = slab.allocate(&mut segment);
        }
        for index in slab.live(&segment) {
            let _ = slab.write(&mut segment, index as usize, 0, &[1]);
            let _ = slab.free(&mut segment, index as usize);
        }
    }
    if let Ok(array) = Array::of(&segment, "cells") {
        let _ = array.write(&mut segment, 5, &[1; 20]);
    }
    let _ = save(&mut segment, b"snapshot");
    segment.acknowledge();
    segment.commit();
    let copy = memory(MIN_BYTES + (1 << 20));
    let _ = copy_to(&segment, copy.as_fd());
}

#[test]
fn every_flipped_bit_of_live_data_is_found() {
    let fd = formatted();
    let mut segment = open(&fd);
    let (table, slab) = (Table::of(&segment, "rows").expect("table"), Slab::of(&segment, "items").expect("slab"));
    let array = Array::of(&segment, "cells").expect("array");
    table.put(&mut segment, &key(1), &[7; ROW]).expect("put");
    slab.allocate(&mut segment).expect("allocate");
    slab.write(&mut segment, 0, 3, &[9]).expect("write");
    array.write(&mut segment, 100, &[3; 20]).expect("write");
    save(&mut segment, b"values").expect("save");
    segment.commit();
    assert_eq!(verify(&segment).expect("verify"), Vec::<String>::new());
    let (rows, items, cells) = (table.object(), slab.object(), array.object());
    let ranges = [
        0..layout::CONSTANT + 4,
        layout::OFF_DIRECTORY..layout::OFF_DIRECTORY + 200,
        layout::OFF_SNAPSHOTS + 8..layout::OFF_SNAPSHOTS + 16,
        layout::OFF_SNAPSHOTS + 64..layout::OFF_SNAPSHOTS + 70,
        rows.meta..rows.meta + 24,
        rows.data..rows.data + rows.stride,
        items.meta + 8..items.meta + 16,
        items.index..items.index + items.index_len * 8,
        items.crc..items.crc + 4,
        items.data..items.data + ITEM,
        cells.crc..cells.crc + 8,
        cells.data..cells.data + 300,
    ];
    for offset in ranges.into_iter().flatten() {
        let mut byte = [0];
        rustix::io::pread(&fd, &mut byte, offset as u64).expect("pread");
        rustix::io::pwrite(&fd, &[byte[0] ^ 1 << (offset % 8)], offset as u64).expect("pwrite");
        let found = match Frame::open(fd.as_fd(), false) {
            Ok(frame) => !verify(&frame).expect("verify").is_empty(),
            Err(_) => true,
        };
        assert!(found, "a flipped bit at {offset}");
        rustix::io::pwrite(&fd, &byte, offset as u64).expect("pwrite");
    }
    assert_eq!(verify(&segment).expect("verify"), Vec::<String>::new());
}

#[test]
fn an_operation_that_does_not_fit_in_the_log_changes_nothing() {
    let fd = memory(MIN_BYTES + (1 << 20));
    Frame::format(fd.as_fd(), &schema(), 4096).expect("format");
    let mut segment = open(&fd);
    let table = Table::of(&segment, "rows").expect("table");
    let slab = Slab::of(&segment, "items").expect("slab");
    let mut fits = 0;
    for round in 0..200u8 {
        let before = Model::read(&segment);
        let done = match round % 4 {
            0 => table.put(&mut segment, &key(round % 7), &[round; ROW]),
            1 => table.delete(&mut segment, &key(round % 7)).map(drop),
            2 => slab.allocate(&mut segment).map(drop),
            _ => slab.put_at(&mut segment, usize::from(round) % ITEMS, &[round; ITEM]),
        };
        match done {
            Ok(()) => fits += 1,
            Err(StateError::Full(_)) => assert_eq!(Model::read(&segment), before),
            Err(error) => panic!("{error}"),
        }
    }
    assert!((20..200).contains(&fits), "{fits}");
    segment.commit();
    assert_eq!(verify(&segment).expect("verify"), Vec::<String>::new());
}

#[test]
fn what_was_deleted_and_replaced_in_one_poll_comes_back() {
    let fd = formatted();
    let mut segment = open(&fd);
    let (table, slab) = (Table::of(&segment, "rows").expect("table"), Slab::of(&segment, "items").expect("slab"));
    table.put(&mut segment, &key(1), &[1; ROW]).expect("put");
    slab.put_at(&mut segment, 0, &[1; ITEM]).expect("put_at");
    segment.commit();
    let before = Model::read(&segment);
    table.delete(&mut segment, &key(1)).expect("delete");
    table.put(&mut segment, &key(2), &[2; ROW]).expect("put");
    slab.free(&mut segment, 0).expect("free");
    assert_eq!(slab.allocate(&mut segment).expect("allocate"), 0);
    segment.abort().expect("abort");
    assert_eq!(Model::read(&segment), before);
}

#[test]
fn what_an_unfinished_poll_noted_is_told_the_last_first() {
    let fd = formatted();
    let mut segment = open(&fd);
    let before = Model::read(&segment);
    segment.note(b"of a poll that ended").expect("note");
    segment.commit();
    let table = Table::of(&segment, "rows").expect("table");
    segment.note(b"first").expect("note");
    table.put(&mut segment, &key(1), &[1; ROW]).expect("put");
    segment.note(b"").expect("note");
    segment.note(&[7; 300]).expect("note");
    drop(segment);
    let mut successor = open(&fd);
    successor.recover().expect("recover");
    assert_eq!(successor.take_notes(), [vec![7; 300], vec![], b"first".to_vec()]);
    assert!(successor.take_notes().is_empty());
    assert_eq!(Model::read(&successor), before);
}

#[test]
fn a_standby_marks_from_its_first_poll_on_what_its_predecessor_promised_to_mark() {
    let fd = formatted();
    let (mut predecessor, mut standby) = (open(&fd), open(&fd));
    let table = Table::of(&standby, "rows").expect("table");
    standby.track(true).expect("track");
    predecessor.acknowledge();
    drop(predecessor);
    standby.recover().expect("recover");
    table.put(&mut standby, &key(1), &[1; ROW]).expect("put");
    standby.commit();
    assert!(standby.tracked());
    assert_eq!(standby.take_dirty(table.object()), [0]);
}

#[test]
fn a_log_of_an_older_poll_is_never_undone() {
    let fd = formatted();
    let mut segment = open(&fd);
    let table = Table::of(&segment, "rows").expect("table");
    table.put(&mut segment, &key(1), &[1; ROW]).expect("put");
    segment.commit();
    let mut other = open(&fd);
    assert_eq!(other.recover().expect("recover"), 0);
    assert_eq!(table.len(&other), 1);
    // Commits without writes, as a poll that only moves messages makes them.
    other.commit();
    other.commit();
    assert_eq!((other.epoch(), open(&fd).recover().expect("recover")), (3, 0));
    assert_eq!(table.len(&other), 1);
}

#[test]
fn a_copy_has_the_state_and_the_holes() {
    let fd = memory(MIN_BYTES + (64 << 20));
    let mut wide = schema();
    wide.objects[2].count = 16 << 20;
    Frame::format(fd.as_fd(), &wide, LOG).expect("format");
    let mut segment = open(&fd);
    Array::of(&segment, "cells").expect("array").write(&mut segment, 9 << 20, &[5; 100]).expect("write");
    segment.commit();
    assert_eq!(verify(&segment).expect("verify"), Vec::<String>::new());
    let copy = memory(segment.header().size);
    rustix::io::pwrite(&copy, &[255; 4096], 48 << 20).expect("pwrite");
    let copied = copy_to(&segment, copy.as_fd()).expect("copy");
    assert!(copied < 1 << 20, "{copied} bytes");
    let blocks = |fd: &OwnedFd| rustix::fs::fstat(fd).expect("fstat").st_blocks * 512;
    assert!(blocks(&copy) <= blocks(&fd) && blocks(&fd) < 1 << 20);
    let other = open(&copy);
    assert_eq!(verify(&other).expect("verify"), Vec::<String>::new());
    let mut cells = [0; 100];
    Array::of(&other, "cells").expect("array").read(&other, 9 << 20, &mut cells).expect("read");
    assert_eq!(cells, [5; 100]);
    assert!(matches!(copy_to(&segment, memory(4096).as_fd()), Err(StateError::Full(_))));
}

#[test]
fn schemas_that_make_no_sense_are_refused() {
    let refused = |change: &dyn Fn(&mut Schema)| {
        let mut bad = schema();
        change(&mut bad);
        let fd = memory(MIN_BYTES + (1 << 20));
        let error = Frame::format(fd.as_fd(), &bad, LOG).expect_err("no such schema");
        assert!(Frame::blank(fd.as_fd()).expect("blank"));
        error
    };
    assert!(matches!(refused(&|schema| schema.objects[0].key = 0), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].key = 8), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].item = 0), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].count = usize::MAX), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].name = "rows".into()), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].name = String::new()), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].fields = "x".repeat(4000)), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.oldest = 3), StateError::Usage(_)));
    assert!(matches!(refused(&|schema| schema.objects[1].count = 1 << 30), StateError::Full(_)));
    assert!(matches!(
        refused(&|schema| {
            schema.objects = (0..33).map(|n| ObjectSpec { name: n.to_string(), ..schema.objects[1].clone() }).collect();
        }),
        StateError::Usage(_)
    ));
}

#[test]
fn a_formatted_segment_is_not_formatted_again() {
    let fd = formatted();
    assert!(!Frame::blank(fd.as_fd()).expect("blank"));
    assert!(matches!(Frame::format(fd.as_fd(), &schema(), LOG), Err(StateError::Usage(_))));
    let reader = Segment::open(fd.as_fd(), false);
    let mut reader = reader.expect("open");
    let table = Table::of(&reader, "rows").expect("table");
    assert!(matches!(table.put(&mut reader, &key(1), &[0; ROW]), Err(StateError::Usage(_))));
    assert!(matches!(reader.recover(), Err(StateError::Usage(_))));
}
