//! A server that dies at any moment: every operation takes effect once and is answered once, in order, bit by bit, whoever
//! serves, and no memory is lost.
//!
//! The same server is dropped between two calls, killed by SIGKILL at a random moment, and killed after a random number of
//! single instructions. Its clients send numbered operations, inline and pooled; its state counts them.
//! `SNAP_SEED=N cargo test --release --no-default-features --test ledger` repeats a run.
#![cfg(not(loom))]

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{open_state, state, End, Random, Segments};
use snap_dataplane::channel::{Rx, Tx};
use snap_dataplane::core::State;
use snap_dataplane::error::{Error, Result};
use snap_dataplane::layout::{Header, PoolRef};
use snap_dataplane::ledger::{self, Line, Served};
use snap_dataplane::state::{Array, Kind, ObjectSpec, Phase, Segment, StateError, Word};

const SLOTS: u32 = 64;
const POOL: usize = 64 * 1024;
const CHANNELS: usize = 3;
/// Longer than anything here takes; only a wrong program meets it.
const LIMIT: Duration = Duration::from_secs(120);

fn seed() -> u64 {
    let seed = match std::env::var("SNAP_SEED") {
        Ok(seed) => seed.parse().expect("SNAP_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64,
    };
    println!("SNAP_SEED={seed}");
    seed
}

/// Bytes that only operation `number` of `channel` has, for the way there (`salt` 1) or back (2).
fn body(channel: usize, number: u64, salt: u64) -> Vec<u8> {
    let mut random = Random::new((number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt << 32 ^ channel as u64);
    random.next();
    let len = match random.below(4) {
        0 => random.below(64),
        1 => random.below(1009),
        _ => 1009 + random.below(5000),
    };
    let first = random.next() as u8;
    (0..len).map(|at| first.wrapping_add(at as u8)).collect()
}

fn counts() -> Vec<ObjectSpec> {
    vec![ObjectSpec {
        kind: Kind::Array,
        name: "counts".into(),
        key: 0,
        item: 8,
        count: CHANNELS,
        fields: String::new(),
    }]
}

struct Place {
    line: Line,
    tx: Tx,
    rx: Rx,
}

impl Served for Place {
    fn parts(&mut self) -> (&mut Line, &mut Tx, &mut Rx) {
        (&mut self.line, &mut self.tx, &mut self.rx)
    }
}

/// Counts operations in its state and answers them.
struct Server {
    segment: Segment,
    counts: Array,
    places: Vec<Place>,
    /// Payloads that it goes on reading over several polls.
    kept: Vec<(usize, PoolRef, Vec<u8>)>,
}

impl Server {
    fn open(segments: &[Segments], fd: &OwnedFd) -> Server {
        let segment = open_state(fd);
        let place = |(index, segments): (usize, &Segments)| {
            let End { mut tx, mut rx, .. } = segments.server();
            let line = Line::join(index + 5, index as u64 + 100, &mut tx, &mut rx).expect("a line");
            Place { line, tx, rx }
        };
        let places = segments.iter().enumerate().map(place).collect();
        Server { counts: Array::of(&segment, "counts").expect("counts"), segment, places, kept: Vec::new() }
    }

    fn take(&mut self, generation: u64) {
        self.kept.clear();
        ledger::take(&mut self.segment, None, generation).expect("a sound state");
        assert!(ledger::take_channels(&mut self.segment, &mut self.places).is_empty());
    }

    fn count(&self, channel: usize) -> u64 {
        let mut bytes = [0; 8];
        self.counts.read(&self.segment, channel, &mut bytes).expect("an item");
        u64::from_le_bytes(bytes)
    }

    /// Serve at most `budget` operations of each channel. `Full` when an answer does not fit: the poll is to be taken back.
    fn poll(&mut self, random: &mut Random, budget: usize) -> Result<usize> {
        let mut done = 0;
        for channel in 0..self.places.len() {
            for _ in 0..budget {
                let Some(header) = self.places[channel].rx.peek()? else { break };
                let number = self.count(channel);
                assert_eq!(header.tag, number, "an operation of channel {channel} came twice, or not at all");
                self.receive(channel, header, random)?;
                self.counts.write(&mut self.segment, channel, &(number + 1).to_le_bytes()).expect("room in the log");
                let place = &mut self.places[channel];
                place.tx.put(number, &body(channel, number, 2))?;
                done += 1;
            }
            self.places[channel].tx.publish();
        }
        Ok(done)
    }

    fn receive(&mut self, channel: usize, header: Header, random: &mut Random) -> Result<()> {
        let place = &mut self.places[channel];
        let expected = body(channel, header.tag, 1);
        if header.pooled && random.below(3) == 0 && self.kept.len() < 8 {
            let payload = place.rx.take_pooled(header)?;
            self.kept.push((channel, payload, expected));
            return Ok(());
        }
        let mut out = vec![0; header.len];
        place.rx.take_into(header, &mut out)?;
        assert_eq!(out, expected);
        Ok(())
    }

    /// Give back some of what is kept; it must be what it was.
    fn let_go(&mut self, random: &mut Random, leave: usize) {
        while self.kept.len() > leave {
            let (channel, payload, expected) = self.kept.swap_remove(random.below(self.kept.len()));
            let core = self.places[channel].rx.core();
            let mut out = vec![0; expected.len()];
            core.peer_pool().expect("a pool").read(payload.offset as usize, &mut out);
            assert_eq!(out, expected);
            core.give_back(payload.token);
        }
    }

    fn commit(&mut self) {
        ledger::commit(&mut self.segment, &mut self.places);
        ledger::polled(&mut self.segment);
    }

    fn abort(&mut self, kept: usize) {
        self.kept.truncate(kept);
        ledger::abort(&mut self.segment, &mut self.places).expect("an undo log");
    }

    /// One whole poll, sometimes taken back, sometimes with its last messages put back.
    fn turn(&mut self, random: &mut Random) {
        // Before the poll: what is let go in a poll that is taken back stays so.
        self.let_go(random, 4);
        let (kept, budget) = (self.kept.len(), 1 + random.below(6));
        match self.poll(random, budget) {
            Ok(_) if random.below(10) == 0 => self.abort(kept),
            Ok(_) => self.commit(),
            Err(Error::Full) => self.abort(kept),
            Err(error) => panic!("{error}"),
        }
    }
}

/// A client's end: sends operations, checks answers.
struct Client {
    channel: usize,
    end: End,
    sent: u64,
    answered: u64,
    kept: Vec<(PoolRef, Vec<u8>)>,
}

impl Client {
    fn send(&mut self, limit: u64, burst: usize) {
        for _ in 0..burst {
            if self.sent >= limit {
                break;
            }
            match self.end.tx.put(self.sent, &body(self.channel, self.sent, 1)) {
                Ok(()) => self.sent += 1,
                Err(Error::Full) => break,
                Err(error) => panic!("the client of channel {}: {error}", self.channel),
            }
        }
        self.end.tx.publish();
    }

    fn receive(&mut self, random: &mut Random, burst: usize) {
        self.end.rx.check().expect("clients see nothing");
        for _ in 0..burst {
            let Some(header) = self.end.rx.peek().expect("clients see nothing") else { break };
            assert_eq!(header.tag, self.answered, "an answer came twice, or not at all");
            let expected = body(self.channel, self.answered, 2);
            if header.pooled && random.below(3) == 0 && self.kept.len() < 6 {
                self.kept.push((self.end.rx.take_pooled(header).expect("sound"), expected));
            } else {
                let mut out = vec![0; header.len];
                self.end.rx.take_into(header, &mut out).expect("sound");
                assert_eq!(out, expected, "answer {}", self.answered);
            }
            self.answered += 1;
        }
        self.check_kept();
        if self.kept.len() > 3 {
            let (place, _) = self.kept.swap_remove(random.below(self.kept.len()));
            self.end.core.give_back(place.token);
        }
    }

    /// What it still reads is nobody else's, whoever died meanwhile.
    fn check_kept(&self) {
        for (place, expected) in &self.kept {
            let mut out = vec![0; expected.len()];
            self.end.core.peer_pool().expect("a pool").read(place.offset as usize, &mut out);
            assert_eq!(&out, expected, "a payload changed while it was read");
        }
    }
}

struct World {
    segments: Vec<Segments>,
    state: OwnedFd,
    clients: Vec<Client>,
    random: Random,
}

impl World {
    fn new(seed: u64) -> World {
        let segments: Vec<_> = (0..CHANNELS).map(|_| Segments::new(SLOTS, POOL, POOL)).collect();
        let client = |(channel, segments): (usize, &Segments)| Client {
            channel,
            end: segments.client(),
            sent: 0,
            answered: 0,
            kept: Vec::new(),
        };
        let clients = segments.iter().enumerate().map(client).collect();
        World { segments, state: state(counts()), clients, random: Random::new(seed) }
    }

    fn server(&self) -> Server {
        Server::open(&self.segments, &self.state)
    }

    fn clients_act(&mut self, limit: u64) {
        for client in &mut self.clients {
            let (sends, receives) = (self.random.below(8), self.random.below(12));
            client.send(limit, sends);
            client.receive(&mut self.random, receives);
        }
    }

    /// One last server answers what is left; then nothing may be out any more, on either side.
    fn settle(&mut self, generation: u64) {
        let mut server = self.server();
        server.take(generation);
        let end = Instant::now() + LIMIT;
        while self.clients.iter().any(|client| client.answered < client.sent) {
            assert!(Instant::now() < end, "operations are left without an answer");
            server.turn(&mut self.random);
            let limit = 0;
            self.clients_act(limit);
        }
        server.let_go(&mut self.random, 0);
        server.commit();
        for client in &mut self.clients {
            client.kept.drain(..).for_each(|(place, _)| client.end.core.give_back(place.token));
            client.end.rx.release();
            assert_eq!(server.count(client.channel), client.sent);
            assert_eq!(client.end.core.loans_out(), 0, "payloads of the client of channel {}", client.channel);
        }
        for (channel, place) in server.places.iter_mut().enumerate() {
            assert_eq!(place.tx.core().loans_out(), 0, "payloads of the server to channel {channel}");
            assert!(place.rx.peek().expect("sound").is_none());
            assert_eq!(self.clients[channel].end.tx.slots_free().expect("sound"), u64::from(SLOTS));
            assert_eq!(place.tx.slots_free().expect("sound"), u64::from(SLOTS));
        }
    }
}

#[test]
fn every_operation_counts_once_whenever_the_server_is_dropped() {
    let mut world = World::new(seed());
    let mut generation = 1;
    let mut server = world.server();
    server.take(generation);
    let mut deaths = 0;
    while deaths < 600 {
        world.clients_act(u64::MAX);
        if world.random.below(4) > 0 {
            server.turn(&mut world.random);
            continue;
        }
        // In the middle of a poll, with things let go of, received, written and sent, or after its commit.
        server.let_go(&mut world.random, 2);
        if server.poll(&mut world.random, 4).is_ok() && world.random.below(4) == 0 {
            server.let_go(&mut world.random, 1);
            server.commit();
        }
        deaths += 1;
        generation += 1;
        server = world.server();
        server.take(generation);
    }
    drop(server);
    world.settle(generation + 1);
}

#[test]
fn two_generations_take_turns_and_each_goes_on_where_the_other_stopped() {
    let mut world = World::new(seed());
    let mut pair = [world.server(), world.server()];
    pair[0].take(1);
    for turn in 0..400 {
        let now = turn % 2;
        for _ in 0..1 + world.random.below(4) {
            world.clients_act(u64::MAX);
            pair[now].turn(&mut world.random);
        }
        let server = &mut pair[now];
        let last = ledger::hand_over(&mut server.segment, &mut server.places);
        assert_eq!(server.segment.get(Word::LastPollNs), last);
        for place in &mut server.places {
            assert!(matches!(place.rx.check(), Err(Error::Dormant)));
            assert!(matches!(place.tx.check(), Err(Error::Dormant)));
        }
        pair[1 - now].take(turn as u64 + 2);
    }
    drop(pair);
    world.settle(1000);
}

#[test]
fn an_end_that_waits_touches_nothing_and_one_that_closes_says_nothing() {
    let mut world = World::new(seed());
    world.clients_act(u64::MAX);
    let image = |world: &World| -> Vec<Vec<u8>> {
        let read = |segments: &Segments| {
            let mut bytes = vec![0; segments.map.len()];
            segments.map.read(0, &mut bytes);
            bytes
        };
        world.segments.iter().map(read).collect()
    };
    let before = image(&world);
    let mut waiting = world.server();
    for place in &mut waiting.places {
        assert!(matches!(place.tx.check(), Err(Error::Dormant)));
        let (tx, rx) = (place.tx.core().loans_out(), place.rx.core().state_name());
        assert_eq!((tx, rx), (0, "open"));
        place.tx.core().cancel_loan(0);
        place.rx.core().give_back(0);
        place.rx.core().close();
    }
    drop(waiting);
    assert_eq!(before, image(&world));
    world.settle(1);
}

#[test]
fn messages_that_are_put_back_come_again_and_the_rest_of_the_poll_stays() {
    let seed = seed();
    let mut random = Random::new(seed);
    let mut world = World::new(seed);
    let mut server = world.server();
    server.take(1);
    for _ in 0..300 {
        world.clients_act(u64::MAX);
        let place = &mut server.places[0];
        let mut received = Vec::new();
        while let Some(header) = place.rx.peek().expect("sound").filter(|_| received.len() < 6) {
            let mut out = vec![0; header.len];
            place.rx.take_into(header, &mut out).expect("sound");
            assert_eq!(out, body(0, header.tag, 1));
            received.push(header.tag);
        }
        assert!(!place.rx.unread(received.len() + 1).expect("sound"));
        let back = random.below(received.len() + 1);
        assert!(place.rx.unread(back).expect("sound"));
        received.truncate(received.len() - back);
        for number in received {
            assert_eq!(number, server.count(0));
            server.counts.write(&mut server.segment, 0, &(number + 1).to_le_bytes()).expect("room in the log");
            while let Err(error) = server.places[0].tx.put(number, &body(0, number, 2)) {
                assert!(matches!(error, Error::Full));
                server.commit();
                world.clients_act(0);
            }
        }
        server.commit();
        server.turn(&mut random);
    }
    drop(server);
    world.settle(2);
}

#[test]
fn state_that_is_retired_or_poisoned_is_not_served_with() {
    let world = World::new(1);
    for phase in [Phase::Retired, Phase::Poisoned, Phase::Building] {
        let mut segment = open_state(&world.state);
        segment.set_phase(phase);
        assert!(matches!(ledger::take(&mut segment, None, 1), Err(StateError::Damaged(_))), "{phase:?}");
        assert_eq!(segment.get(Word::Adoptions), 0);
    }
}

#[test]
fn a_state_that_kills_its_adopters_counts_them_until_one_survives_a_poll() {
    let world = World::new(1);
    for count in 1..4 {
        world.server().take(count);
        let segment = open_state(&world.state);
        assert_eq!((segment.get(Word::Adoptions), segment.get(Word::Generation)), (count, count));
        assert_eq!(segment.get(Word::Owner), u64::from(std::process::id()));
    }
    let mut server = world.server();
    server.take(9);
    server.commit();
    assert_eq!(open_state(&world.state).get(Word::Adoptions), 0);
}

#[test]
fn a_migrated_state_takes_over_positions_and_its_source_is_retired() {
    let mut world = World::new(seed());
    let mut server = world.server();
    server.take(1);
    for _ in 0..50 {
        world.clients_act(u64::MAX);
        server.turn(&mut world.random);
    }
    // It dies in the middle of a poll; what it had counted for good was converted before.
    let _ = server.poll(&mut world.random, 4);
    drop(server);
    let next = state(counts());
    let mut target = open_state(&next);
    target.set_phase(Phase::Building);
    let mut source = open_state(&world.state);
    source.recover().expect("an undo log");
    let array = Array::of(&source, "counts").expect("counts");
    let mut bytes = vec![0; 8 * CHANNELS];
    array.read(&source, 0, &mut bytes).expect("items");
    array.write(&mut target, 0, &bytes).expect("room in the log");
    target.commit();
    let mut place = Place::of(&world.segments[0]);
    drop(target);
    let old = std::mem::replace(&mut world.state, next);
    let mut server = world.server();
    ledger::take(&mut server.segment, Some(&mut source), 2).expect("both are sound");
    assert_eq!(open_state(&old).phase().expect("a phase"), Phase::Retired);
    assert_eq!(server.segment.phase().expect("a phase"), Phase::Serving);
    assert!(ledger::take_channels(&mut server.segment, &mut server.places).is_empty());
    server.turn(&mut world.random);
    // Whoever comes with the old state is refused; whoever died after the flip repeats nothing.
    assert!(matches!(ledger::take(&mut open_state(&old), None, 3), Err(StateError::Damaged(_))));
    drop(server);
    let mut server = world.server();
    ledger::take(&mut server.segment, Some(&mut source), 4).expect("the flip was done");
    assert!(place.line.take(&server.segment, &mut place.tx, &mut place.rx).is_ok());
    drop(server);
    world.settle(5);
}

impl Place {
    /// A place for another channel on a line that was used before.
    fn of(segments: &Segments) -> Place {
        let End { mut tx, mut rx, .. } = segments.server();
        let line = Line::join(5, 100, &mut tx, &mut rx).expect("a line");
        Place { line, tx, rx }
    }
}

#[test]
fn another_channel_on_a_used_line_begins_at_its_beginning() {
    let mut world = World::new(seed());
    let mut server = world.server();
    server.take(1);
    for _ in 0..20 {
        world.clients_act(u64::MAX);
        server.turn(&mut world.random);
    }
    let fresh = Segments::new(SLOTS, POOL, POOL);
    let (mut client, End { mut tx, mut rx, .. }) = (fresh.client(), fresh.server());
    let line = Line::join(5, 7, &mut tx, &mut rx).expect("a line");
    client.tx.put(1, b"to whoever is on line 5 now").expect("room");
    client.tx.publish();
    let mut place = [Place { line, tx, rx }];
    assert!(ledger::take_channels(&mut server.segment, &mut place).is_empty());
    assert_eq!(common::take(&mut place[0].rx).expect("sound"), Some((1, b"to whoever is on line 5 now".to_vec())));
}

// -- real deaths --------------------------------------------------------------------------------------------------

/// A child that serves until it is killed. A failed check there ends it with a status that `reap` notices.
fn fork_server(world: &World, generation: u64, traced: bool) -> libc::pid_t {
    // SAFETY: the child uses nothing but this thread's own memory and files, and never returns.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "no process");
    if child > 0 {
        return child;
    }
    let outcome = std::panic::catch_unwind(|| {
        let mut random = Random::new(generation.wrapping_mul(0x1234_5678_9ABC_DEF1));
        let mut server = world.server();
        if traced {
            // SAFETY: plain system calls about this very process.
            unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                libc::raise(libc::SIGSTOP);
            }
        }
        server.take(generation);
        loop {
            server.turn(&mut random);
            // Somebody else may want the processor: there are as many clients as channels.
            std::thread::yield_now();
        }
    });
    // SAFETY: ends the child at once, with none of what its parent would do at its end.
    unsafe { libc::_exit(if outcome.is_err() { 3 } else { 4 }) }
}

fn wait_for(child: libc::pid_t) -> libc::c_int {
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    status
}

fn kill(child: libc::pid_t) {
    // SAFETY: our own child, not yet waited for.
    unsafe { libc::kill(child, libc::SIGKILL) };
    let status = wait_for(child);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL, "the server ended with {status:#x}");
}

#[test]
fn every_operation_counts_once_whenever_the_server_is_killed() {
    let mut world = World::new(seed());
    for generation in 1..=400 {
        let child = fork_server(&world, generation, false);
        let end = Instant::now() + Duration::from_micros(world.random.below(4000) as u64);
        while Instant::now() < end {
            world.clients_act(u64::MAX);
            std::thread::yield_now();
        }
        kill(child);
    }
    println!("{:?} operations", world.clients.iter().map(|client| client.answered).collect::<Vec<_>>());
    assert!(world.clients.iter().all(|client| client.answered > 0));
    world.settle(1000);
}

#[test]
fn every_operation_counts_once_after_whatever_instruction_the_server_is_killed() {
    let mut world = World::new(seed());
    for generation in 1..=40 {
        world.clients_act(u64::MAX);
        let child = fork_server(&world, generation, true);
        let status = wait_for(child);
        if !libc::WIFSTOPPED(status) {
            println!("skipped: tracing is not allowed here ({status:#x})");
            kill(child);
            return;
        }
        let (full_speed, steps) = (world.random.below(2) == 0, world.random.below(8_000));
        if full_speed {
            // Somewhere in the middle of its life.
            resume(child, libc::PTRACE_CONT);
            std::thread::sleep(Duration::from_micros(world.random.below(1500) as u64));
            // SAFETY: our own child.
            unsafe { libc::kill(child, libc::SIGSTOP) };
            assert!(libc::WIFSTOPPED(wait_for(child)));
        }
        for _ in 0..steps {
            resume(child, libc::PTRACE_SINGLESTEP);
            let status = wait_for(child);
            assert!(libc::WIFSTOPPED(status), "the server ended with {status:#x}");
        }
        kill(child);
        world.clients_act(u64::MAX);
    }
    println!("{:?} operations", world.clients.iter().map(|client| client.answered).collect::<Vec<_>>());
    world.settle(1000);
}

fn resume(child: libc::pid_t, how: libc::c_uint) {
    // SAFETY: a stopped child of ours that asked to be traced.
    assert_eq!(unsafe { libc::ptrace(how, child, 0, 0) }, 0);
}

#[test]
fn a_closed_end_in_a_ledger_leaves_the_channel_open() {
    let world = World::new(1);
    let mut server = world.server();
    server.take(1);
    for place in &server.places {
        place.rx.core().close();
        assert!(matches!(place.tx.check(), Err(Error::Closed)));
    }
    for client in &world.clients {
        client.end.tx.check().expect("still open");
    }
    world.segments[0].set_state(State::Gone);
    assert!(matches!(world.clients[0].end.tx.check(), Err(Error::Gone)));
    let _ = world.state.as_fd();
}
