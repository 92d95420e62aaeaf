//! The worker thread, its mailbox, and statistics under a concurrent writer.
#![cfg(not(loom))]

mod common;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{memfd, open_state, state, take, Segments};
use snap_dataplane::engine::mailbox::Mailbox;
use snap_dataplane::engine::worker::{News, Settings, Worker};
use snap_dataplane::engine::{self, Channel, Channels, Engine};
use snap_dataplane::layout::{DIR_TAIL, OFF_DIRECTION};
use snap_dataplane::poller::Wait;
use snap_dataplane::state::{self, Kind, ObjectSpec, Segment, Table};
use snap_dataplane::stats::{Page, Record, BYTES, FIELDS};

/// Longer than anything here takes; only a wrong program meets it.
const LIMIT: Duration = Duration::from_secs(10);

fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !ready() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn worker(engine: Box<dyn Engine>) -> Worker {
    worker_on(engine, open_state(&state(Vec::new())))
}

fn worker_on(engine: Box<dyn Engine>, segment: Segment) -> Worker {
    let settings = Settings {
        name: "test".into(),
        stats: None,
        budget: 64,
        wait: Wait::Block,
        segment: Arc::new(Mutex::new(segment)),
        source: None,
        ownership: None,
        generation: 1,
        finish: None,
        channels: Vec::new(),
    };
    Worker::start(engine, settings).expect("a thread")
}

fn faults_of(news: Vec<News>) -> Vec<(u64, String)> {
    let fault = |news| match news {
        News::Fault { channel, reason } => Some((channel, reason)),
        _ => None,
    };
    news.into_iter().filter_map(fault).collect()
}

/// An engine that counts how often it is polled, around the real echo.
struct Counted(Box<dyn Engine>, Arc<AtomicUsize>);

impl Engine for Counted {
    fn poll(&mut self, channels: &mut Channels, state: &mut Segment, budget: usize) -> state::Result<usize> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.poll(channels, state, budget)
    }
}

#[test]
fn a_dropped_channel_cannot_keep_the_worker_awake_and_the_others_are_served() {
    let polls = Arc::new(AtomicUsize::new(0));
    let mut worker = worker(Box::new(Counted(engine::make("echo").expect("shipped"), polls.clone())));
    let (bad, good) = (Segments::new(64, 0, 0), Segments::new(64, 0, 0));
    let mut client = good.client();
    for (id, segments) in [(1, &bad), (2, &good)] {
        let end = segments.server();
        assert!(worker.attach(Channel::new(id, end.tx, end.rx, id as usize).expect("a line"), LIMIT).expect("epoll"));
    }
    bad.word(OFF_DIRECTION[0] + DIR_TAIL, 1 << 40);
    bad.bells[0].ring();
    let mut faults = Vec::new();
    until("the fault", || {
        faults.extend(faults_of(worker.take_news()));
        !faults.is_empty()
    });
    assert_eq!(faults, [(1, "ring index out of range".to_owned())]);
    client.tx.put(9, b"still served").expect("room");
    client.tx.publish();
    let mut answer = None;
    until("the echo", || {
        answer = take(&mut client.rx).expect("sound");
        answer.is_some()
    });
    assert_eq!(answer, Some((9, b"still served".to_vec())));
    let before = polls.load(Ordering::Relaxed);
    for _ in 0..200 {
        bad.bells[0].ring();
        std::thread::sleep(Duration::from_millis(1));
    }
    // An idle worker looks around by itself, a few times a second; each of 200 rings would be seen here.
    assert!(polls.load(Ordering::Relaxed) - before < 100);
    assert!(worker.stop(LIMIT, false));
}

#[test]
fn a_panicking_engine_ends_alone_and_says_so() {
    struct Panics;
    impl Engine for Panics {
        fn poll(&mut self, _: &mut Channels, _: &mut Segment, _: usize) -> state::Result<usize> {
            panic!("on purpose");
        }
    }
    let mut worker = worker(Box::new(Panics));
    until("the end", || !worker.alive());
    assert!(worker.take_news().iter().any(|news| matches!(news, News::Ended(text) if text == "on purpose")));
    assert!(worker.stop(LIMIT, false));
}

/// Looks a row up in every poll.
struct Reads(Table);

impl Engine for Reads {
    fn poll(&mut self, _: &mut Channels, state: &mut Segment, _: usize) -> state::Result<usize> {
        self.0.get(state, b"key.", &mut [0; 4])?;
        Ok(1)
    }
}

#[test]
fn an_engine_that_meets_damage_refuses_its_state() {
    let spec = ObjectSpec { kind: Kind::Table, name: "t".into(), key: 4, item: 4, count: 8, fields: String::new() };
    let fd = state(vec![spec]);
    let mut segment = open_state(&fd);
    let table = Table::of(&segment, "t").expect("there");
    table.put(&mut segment, b"key.", b"row.").expect("room");
    segment.commit();
    let mut worker = worker_on(Box::new(Reads(table)), segment);
    let mut news = Vec::new();
    until("the first poll", || {
        news.extend(worker.take_news());
        news.iter().any(|news| matches!(news, News::Took { .. }))
    });
    let mut bytes = vec![0; rustix::fs::fstat(&fd).expect("stat").st_size as usize];
    rustix::io::pread(&fd, &mut bytes, 0).expect("read");
    let at = bytes.windows(4).position(|four| four == b"row.").expect("written");
    rustix::io::pwrite(&fd, b"!", at as u64).expect("written over");
    until("the end", || !worker.alive());
    news.extend(worker.take_news());
    let refused = |news: &News| matches!(news, News::Refused { why, held: true } if why.code == "state_damaged");
    assert!(news.iter().any(refused), "{news:?}");
    assert!(matches!(news.last(), Some(News::Ended(text)) if text.is_empty()));
    assert!(worker.stop(LIMIT, false));
}

#[test]
fn every_piece_of_work_in_a_mailbox_runs_once_and_in_order() {
    const PIECES: usize = 2000;
    let mailbox: Arc<Mailbox<Vec<usize>>> = Arc::default();
    let poster = {
        let mailbox = mailbox.clone();
        std::thread::spawn(move || {
            for piece in 0..PIECES {
                assert!(mailbox.post(Box::new(move |seen: &mut Vec<usize>| seen.push(piece)), LIMIT).is_ok());
            }
        })
    };
    let mut seen = Vec::new();
    let end = Instant::now() + LIMIT;
    while seen.len() < PIECES {
        assert!(Instant::now() < end, "only {} pieces ran", seen.len());
        if !mailbox.run(&mut seen) {
            std::thread::yield_now();
        }
    }
    poster.join().expect("all were posted");
    assert!(seen.into_iter().eq(0..PIECES));
    assert!(!mailbox.is_full());
}

#[test]
fn a_full_mailbox_gives_the_work_back() {
    let mailbox: Mailbox<u32> = Mailbox::default();
    assert!(mailbox.post(Box::new(|count| *count += 1), Duration::ZERO).is_ok());
    assert!(mailbox.post(Box::new(|count| *count += 10), Duration::ZERO).is_err());
    let mut count = 0;
    assert!(mailbox.run(&mut count));
    assert!(!mailbox.run(&mut count));
    assert_eq!(count, 1);
}

#[test]
fn a_statistics_record_is_never_torn() {
    let fd = memfd(BYTES);
    let (writer, reader) = (Page::new(fd.as_fd(), true).expect("page"), Page::new(fd.as_fd(), false).expect("page"));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for value in 1u64.. {
                writer.write(3, &[value; FIELDS.len()]);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::yield_now();
            }
        });
        let mut last = 0;
        for _ in 0..20_000 {
            let record = reader.read(3);
            assert!(record.iter().all(|value| *value == record[0]), "torn: {record:?}");
            assert!(record[0] >= last);
            last = record[0];
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(reader.read(2), Record::default());
}
