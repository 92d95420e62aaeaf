//! A worker: the thread that runs one engine whenever its process owns it.
//!
//! The thread waits for the ownership, takes the state and the channels over where their last commit left them, polls, and
//! commits after every poll; told to hand over, it lets go at a poll boundary and waits again, as warm as it is. While it
//! waits, whoever posts a piece of work runs it itself on the parked engine.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::mailbox::{Mailbox, Work};
use super::meter::Meter;
use super::{Channel, Channels, Engine};
use crate::bell::Bell;
use crate::error::{Error, Result};
use crate::ledger;
use crate::ownership::{Ownership, Waited};
use crate::poller::{self, Poller, Wait};
use crate::state::{self, Segment, Shared as Segments, StateError, Word};
use crate::stats::Page;
use crate::sync;

/// Statistics and heartbeat are published this often while there is work; an idle engine publishes at every wake-up.
const PUBLISH_EVERY: Duration = Duration::from_millis(10);
/// A waiting engine beats its heart this often.
const WAITING: Duration = Duration::from_millis(100);
/// Polls in vain after which others get the processor, if there are any.
const PATIENCE: u32 = 16;
/// Polls under one lock of the state, which nobody else wants while the engine runs.
const POLLS: u32 = 64;

/// What runs on the engine's thread, or waits to.
struct Running {
    engine: Box<dyn Engine>,
    channels: Channels,
    segment: Segments,
    owned: bool,
}

/// What became of an engine, for control code.
#[derive(Debug)]
pub enum News {
    Fault {
        channel: u64,
        reason: String,
    },
    Took {
        first_poll_ns: u64,
        last_poll_ns: u64,
        undone: u64,
    },
    Yielded {
        last_poll_ns: u64,
    },
    /// `held`: it ran on this state, and lets nobody else have it.
    Refused {
        why: Refusal,
        held: bool,
    },
    /// What the engine itself has to say.
    Said(Vec<u8>),
    Ended(String),
}

struct Shared {
    mailbox: Mailbox<Running>,
    /// The engine, while its thread waits for the ownership.
    parked: Mutex<Option<Running>>,
    poller: Poller,
    ownership: Option<Ownership>,
    stop: AtomicBool,
    /// Nobody serves the channels after this.
    last: AtomicBool,
    hand_over: AtomicBool,
    retire: AtomicBool,
    alive: AtomicBool,
    /// Rung when `news` has something.
    bell: Bell,
    news: Mutex<Vec<News>>,
}

pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub struct Settings {
    pub name: String,
    pub stats: Option<(Page, usize)>,
    pub budget: usize,
    pub wait: Wait,
    pub segment: Segments,
    /// The state that a migration filled `segment` from: it is taken over with its channels, and retired.
    pub source: Option<Segments>,
    pub ownership: Option<Ownership>,
    pub generation: u64,
    /// Run when the ownership was got for the first time, before anything is taken over: what is left of a migration. When it
    /// fails, nothing is taken.
    pub finish: Option<Finish>,
    /// Those that are there from the beginning: the first poll misses none of them.
    pub channels: Vec<Channel>,
}

pub type Finish = Box<dyn FnOnce() -> std::result::Result<(), Refusal> + Send>;

/// Why a state is not taken over: the code of an error, and its text.
#[derive(Debug)]
pub struct Refusal {
    pub code: String,
    pub text: String,
}

impl From<StateError> for Refusal {
    fn from(error: StateError) -> Refusal {
        Refusal { code: error.code().into(), text: error.to_string() }
    }
}

/// Why an engine ended before it was told to.
enum End {
    Failed(String),
    /// Its state is not what engines wrote.
    Damaged(Refusal),
}

impl From<Error> for End {
    fn from(error: Error) -> End {
        End::Failed(error.to_string())
    }
}

impl From<StateError> for End {
    fn from(error: StateError) -> End {
        match error {
            StateError::Damaged(_) => End::Damaged(error.into()),
            other => End::Failed(other.to_string()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn tell(&self, news: News) {
        lock(&self.news).push(news);
        self.bell.ring();
    }

    /// The last word of the thread.
    fn end(&self, how: std::result::Result<(), End>) {
        let (text, damage) = match how {
            Ok(()) => (String::new(), None),
            Err(End::Failed(text)) => (text, None),
            Err(End::Damaged(why)) => (String::new(), Some(why)),
        };
        match (damage, &self.ownership) {
            // The ownership stays until the process ends: by then there is another state to take.
            (Some(why), _) => self.tell(News::Refused { why, held: true }),
            // Gone is as good as free.
            (None, Some(ownership)) => drop(ownership.release()),
            (None, None) => {}
        }
        self.alive.store(false, Ordering::Release);
        self.tell(News::Ended(text));
    }

    fn leaving(&self) -> bool {
        self.stop.load(Ordering::Acquire) || self.hand_over.load(Ordering::Acquire)
    }
}

impl Worker {
    /// Begins to wait for the ownership at once; without one, the engine is owned.
    pub fn start(engine: Box<dyn Engine>, mut settings: Settings) -> Result<Worker> {
        let poller = Poller::new()?;
        for fd in engine.watched() {
            poller.watch(fd)?;
        }
        let mut running =
            Running { engine, channels: Channels::default(), segment: settings.segment.clone(), owned: false };
        for channel in settings.channels.drain(..) {
            poller.add(channel.rx.core().own_bell())?;
            running.attach(channel);
        }
        let shared = Arc::new(Shared {
            mailbox: Mailbox::default(),
            parked: Mutex::new(Some(running)),
            poller,
            ownership: settings.ownership.take(),
            stop: AtomicBool::new(false),
            last: AtomicBool::new(false),
            hand_over: AtomicBool::new(false),
            retire: AtomicBool::new(false),
            alive: AtomicBool::new(true),
            bell: Bell::new().map_err(|errno| Error::os("making a doorbell", errno))?,
            news: Mutex::default(),
        });
        let inner = shared.clone();
        let thread = std::thread::Builder::new()
            .name(settings.name.clone())
            .spawn(move || {
                // A panic is the engine's own error; it ends this engine, and what its poll did is never committed.
                let outcome = catch_unwind(AssertUnwindSafe(|| live(&inner, &mut settings)));
                inner.end(outcome.unwrap_or_else(|panic| Err(End::Failed(panicked(&*panic)))));
            })
            .map_err(|source| Error::Os { what: "starting a worker thread", source })?;
        Ok(Worker { shared, thread: Some(thread) })
    }

    fn post(&self, work: Work<Running>, timeout: Duration) -> bool {
        let shared = &self.shared;
        if let Some(running) = &mut *lock(&shared.parked) {
            work(running);
            return true;
        }
        let posted = shared.mailbox.post(work, timeout).is_ok();
        // The engine may have been parked in between, without a look.
        if let Some(running) = &mut *lock(&shared.parked) {
            shared.mailbox.run(running);
        }
        shared.poller.wake();
        posted
    }

    /// Hand a channel to the engine. False when the engine did not look into its mailbox for `timeout`.
    pub fn attach(&self, channel: Channel, timeout: Duration) -> Result<bool> {
        self.shared.poller.add(channel.rx.core().own_bell())?;
        Ok(self.post(Box::new(move |running| running.attach(channel)), timeout))
    }

    /// Take a channel away from the engine.
    pub fn detach(&self, id: u64, timeout: Duration) -> bool {
        let shared = self.shared.clone();
        let work = move |running: &mut Running| {
            if let Some(channel) = running.channels.detach(id) {
                shared.poller.remove(channel.rx.core().own_bell());
                channel.rx.core().close();
            }
        };
        self.post(Box::new(work), timeout)
    }

    /// Have the engine answer a request at its next poll boundary. None: it does not run here, or did not look into its
    /// mailbox for `timeout`.
    pub fn control(&self, request: Vec<u8>, timeout: Duration) -> Option<state::Result<Vec<u8>>> {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        let work = move |running: &mut Running| {
            if running.owned {
                let mut segment = lock(&running.segment);
                // Who asked may have gone.
                let _ = answer.send(running.engine.control(&mut segment, &request));
            }
        };
        if !self.post(Box::new(work), timeout) {
            return None;
        }
        answered.recv_timeout(timeout).ok()
    }

    /// Let go at the next poll boundary, then wait for the ownership again or, with `retire`, end.
    pub fn hand_over(&self, retire: bool) {
        self.shared.retire.fetch_or(retire, Ordering::AcqRel);
        self.shared.hand_over.store(true, Ordering::Release);
        self.wake();
    }

    /// What happened since the last call.
    pub fn take_news(&self) -> Vec<News> {
        self.shared.bell.drain();
        std::mem::take(&mut *lock(&self.shared.news))
    }

    pub fn news(&self) -> &Bell {
        &self.shared.bell
    }

    pub fn alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    fn wake(&self) {
        self.shared.poller.wake();
        if let Some(ownership) = &self.shared.ownership {
            if !ownership.held() {
                ownership.cancel();
            }
        }
    }

    /// End the thread; it finishes its current poll, and what it did is left to whoever serves next. True when it ended
    /// within `timeout`. With `last` nobody serves next, and the channels end.
    pub fn stop(&mut self, timeout: Duration, last: bool) -> bool {
        self.shared.last.store(last, Ordering::Release);
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        let end = Instant::now() + timeout;
        while self.alive() && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(200));
        }
        if self.alive() {
            return false;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        true
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "the engine panicked".into())
}

impl Running {
    fn attach(&mut self, channel: Channel) {
        self.channels.attach(channel);
        if self.owned {
            let Some(last) = self.channels.served().last_mut() else { return };
            // A fault is met by the next poll.
            let _ = ledger::take_channels(&mut lock(&self.segment), std::slice::from_mut(last));
        }
    }

    /// The ownership was got: go on where the last commit left everything. Words undone, and when the last poll was.
    fn take(&mut self, settings: &mut Settings) -> std::result::Result<(u64, u64), Refusal> {
        if let Some(finish) = settings.finish.take() {
            finish()?;
        }
        let mut segment = lock(&self.segment);
        let source = settings.source.take();
        let mut source = source.as_ref().map(|source| lock(source));
        let last = source.as_ref().map_or(segment.get(Word::LastPollNs), |source| source.get(Word::LastPollNs));
        let saved_version = source.as_ref().map_or(segment.header(), |source| source.header()).schema.version;
        let saved = match &source {
            Some(source) => state::saved(source)?,
            None => Vec::new(),
        };
        let undone = ledger::take(&mut segment, source.as_deref_mut(), settings.generation)?;
        let saved = if source.is_some() { saved } else { state::saved(&segment)? };
        self.engine.adopt(&mut segment)?;
        if !saved.is_empty() {
            self.engine.restore(saved_version, &saved)?;
        }
        // A fault is met by the first poll.
        let _ = ledger::take_channels(&mut segment, self.channels.served());
        self.owned = true;
        Ok((last, undone))
    }

    /// Commit, let go of everything; when that was.
    fn let_go(&mut self) -> state::Result<u64> {
        let mut segment = lock(&self.segment);
        self.owned = false;
        if let Some(snapshot) = self.engine.snapshot() {
            state::save(&mut segment, &snapshot)?;
        }
        Ok(ledger::hand_over(&mut segment, self.channels.served()))
    }

    /// One poll, made permanent; how much was done.
    #[inline]
    fn poll(&mut self, segment: &mut Segment, budget: usize) -> state::Result<usize> {
        let done = self.engine.poll(&mut self.channels, segment, budget)?;
        ledger::commit(segment, self.channels.served());
        ledger::polled(segment);
        Ok(done)
    }
}

/// The thread: wait, take, poll, let go, and again.
fn live(shared: &Shared, settings: &mut Settings) -> std::result::Result<(), End> {
    let mut meter = Meter::default();
    while wait(shared, settings, &mut meter)? {
        let Some(mut running) = lock(&shared.parked).take() else { break };
        match running.take(settings) {
            Ok((last_poll_ns, undone)) => {
                let first_poll_ns = ledger::first_poll(&lock(&running.segment));
                poll_once(shared, &mut running, settings, &mut meter)?;
                shared.tell(News::Took { first_poll_ns, last_poll_ns, undone });
            }
            Err(why) => {
                shared.tell(News::Refused { why, held: false });
                break;
            }
        }
        run(shared, &mut running, settings, &mut meter)?;
        shared.hand_over.store(false, Ordering::Release);
        let yielded = running.let_go();
        // Only somebody who waits may be asked to run work on it: parked before the ownership goes.
        let mut parked = lock(&shared.parked);
        let running = parked.insert(running);
        shared.mailbox.run(running);
        drop(parked);
        if let Some(ownership) = &shared.ownership {
            ownership.release()?;
        }
        let last_poll_ns = yielded.map_err(|error| Error::Os {
            what: "storing the snapshot at a hand-over",
            source: std::io::Error::other(error.to_string()),
        })?;
        if shared.stop.load(Ordering::Acquire) {
            break;
        }
        shared.tell(News::Yielded { last_poll_ns });
        if shared.retire.load(Ordering::Acquire) {
            break;
        }
    }
    for channel in lock(&shared.parked).iter_mut().flat_map(|running| running.channels.iter_mut()) {
        let core = channel.rx.core();
        if shared.last.load(Ordering::Acquire) {
            core.abandon();
        } else {
            core.close();
        }
    }
    Ok(())
}

/// Wait for the ownership; false when the engine is to end first.
fn wait(shared: &Shared, settings: &Settings, meter: &mut Meter) -> Result<bool> {
    loop {
        if shared.stop.load(Ordering::Acquire) || shared.retire.load(Ordering::Acquire) {
            return Ok(false);
        }
        let Some(ownership) = &shared.ownership else { return Ok(true) };
        if ownership.acquire(Some(WAITING))? == Waited::Owned {
            // Asked for while nothing was held: that is done.
            shared.hand_over.store(false, Ordering::Release);
            return Ok(true);
        }
        meter.beat(settings);
    }
}

fn poll_once(shared: &Shared, running: &mut Running, settings: &Settings, meter: &mut Meter) -> state::Result<()> {
    let segment = running.segment.clone();
    let done = running.poll(&mut lock(&segment), settings.budget)?;
    report(shared, &mut running.channels);
    meter.poll(done);
    Ok(())
}

fn run(shared: &Shared, running: &mut Running, settings: &Settings, meter: &mut Meter) -> state::Result<()> {
    let segment = running.segment.clone();
    let mut idle_since: Option<Instant> = None;
    let mut idle_polls = 0u32;
    while !shared.leaving() {
        shared.mailbox.run(running);
        let mut held = lock(&segment);
        let mut done = 0;
        for _ in 0..POLLS {
            done = running.poll(&mut held, settings.budget)?;
            meter.poll(done);
            if done == 0 || running.channels.any_dropped() || shared.mailbox.is_full() || shared.leaving() {
                break;
            }
        }
        drop(held);
        report(shared, &mut running.channels);
        while let Some(said) = running.engine.say() {
            shared.tell(News::Said(said));
        }
        if done > 0 {
            idle_since = None;
            meter.publish(settings, running.channels.len(), PUBLISH_EVERY);
            continue;
        }
        let since = *idle_since.get_or_insert_with(Instant::now);
        if poller::spins(settings.wait, since) {
            meter.publish(settings, running.channels.len(), PUBLISH_EVERY);
            idle_polls += 1;
            if idle_polls % PATIENCE == 0 {
                // Whoever is to give us work may want this processor.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            continue;
        }
        idle(shared, running, settings, meter);
        idle_since = (settings.wait == Wait::Adaptive).then(Instant::now);
    }
    Ok(())
}

/// Arm, look again, sleep.
fn idle(shared: &Shared, running: &mut Running, settings: &Settings, meter: &mut Meter) {
    meter.publish(settings, running.channels.len(), Duration::ZERO);
    let mut announced = false;
    for channel in running.channels.iter_mut() {
        let room = channel.tx.stalled();
        announced |= poller::raise(&mut channel.tx, &mut channel.rx, room);
    }
    sync::settle(announced);
    let idle = running.channels.iter_mut().all(|channel| {
        let room = channel.tx.stalled();
        poller::idle(&mut channel.tx, &mut channel.rx, room)
    });
    if idle && !shared.mailbox.is_full() && !shared.leaving() {
        let limit = running.engine.rest();
        if !limit.is_zero() {
            shared.poller.sleep(Some(limit));
            meter.wake();
        }
        running.engine.wake();
    }
    running.channels.iter_mut().for_each(|channel| poller::lower(&channel.tx, &channel.rx));
}

/// Hand dropped channels over to control code.
fn report(shared: &Shared, channels: &mut Channels) {
    if !channels.any_dropped() {
        return;
    }
    for (channel, error) in channels.take_dropped() {
        // Its bell is the client's as well: left in the poller, it would go on waking this worker.
        shared.poller.remove(channel.rx.core().own_bell());
        shared.tell(News::Fault { channel: channel.id, reason: error.to_string() });
    }
}
