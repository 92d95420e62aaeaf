//! A worker: the thread that runs one engine.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::mailbox::Mailbox;
use super::{Channel, Channels, Engine};
use crate::bell::Bell;
use crate::error::{Error, Result};
use crate::poller::{self, Poller, Wait};
use crate::stats::{self, Page};
use crate::sync;

/// Statistics and heartbeat are published this often while there is work; an idle engine publishes at every wake-up.
const PUBLISH_EVERY: Duration = Duration::from_millis(10);

struct State {
    engine: Box<dyn Engine>,
    channels: Channels,
}

struct Shared {
    mailbox: Mailbox<State>,
    poller: Poller,
    stop: AtomicBool,
    alive: AtomicBool,
    /// Rung when `faults` has news or the thread has ended.
    news: Bell,
    faults: Mutex<Vec<(u64, String)>>,
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
}

impl Worker {
    pub fn start(engine: Box<dyn Engine>, settings: Settings) -> Result<Worker> {
        let shared = Arc::new(Shared {
            mailbox: Mailbox::default(),
            poller: Poller::new()?,
            stop: AtomicBool::new(false),
            alive: AtomicBool::new(true),
            news: Bell::new().map_err(|errno| Error::os("making a doorbell", errno))?,
            faults: Mutex::new(Vec::new()),
        });
        let inner = shared.clone();
        let thread = std::thread::Builder::new()
            .name(settings.name.clone())
            .spawn(move || {
                // A panic is the engine's own error; it ends this engine, and `alive` tells the module.
                let outcome = catch_unwind(AssertUnwindSafe(|| run(&inner, engine, &settings)));
                if let Err(panic) = outcome {
                    let text = panic.downcast_ref::<&str>().map_or("engine panicked", |text| *text).to_owned();
                    inner.faults.lock().unwrap_or_else(PoisonError::into_inner).push((0, text));
                }
                inner.alive.store(false, Ordering::Release);
                inner.news.ring();
            })
            .map_err(|source| Error::Os { what: "starting a worker thread", source })?;
        Ok(Worker { shared, thread: Some(thread) })
    }

    fn post(&self, work: impl FnOnce(&mut State) + Send + 'static, timeout: Duration) -> bool {
        let posted = self.shared.mailbox.post(Box::new(work), timeout).is_ok();
        self.shared.poller.wake();
        posted
    }

    /// Hand a channel to the engine. False when the engine did not look into its mailbox for `timeout`.
    pub fn attach(&self, channel: Channel, timeout: Duration) -> Result<bool> {
        self.shared.poller.add(channel.rx.core().own_bell())?;
        Ok(self.post(move |state| state.channels.attach(channel), timeout))
    }

    /// Take a channel away from the engine and close it.
    pub fn detach(&self, id: u64, timeout: Duration) -> bool {
        let shared = self.shared.clone();
        self.post(
            move |state| {
                if let Some(channel) = state.channels.detach(id) {
                    shared.poller.remove(channel.rx.core().own_bell());
                    channel.rx.core().close();
                }
            },
            timeout,
        )
    }

    pub fn take_faults(&self) -> Vec<(u64, String)> {
        self.shared.news.drain();
        std::mem::take(&mut *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn news(&self) -> &Bell {
        &self.shared.news
    }

    pub fn alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// End the thread; it finishes its current poll. True when it ended within `timeout`.
    pub fn stop(&mut self, timeout: Duration) -> bool {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.poller.wake();
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

fn run(shared: &Shared, engine: Box<dyn Engine>, settings: &Settings) {
    let mut state = State { engine, channels: Channels::default() };
    let mut meter = Meter::default();
    let mut idle_since: Option<Instant> = None;
    while !shared.stop.load(Ordering::Acquire) {
        shared.mailbox.run(&mut state);
        let done = state.engine.poll(&mut state.channels, settings.budget);
        report(shared, &mut state.channels);
        meter.poll(done);
        if done > 0 {
            idle_since = None;
            meter.publish(settings, &state.channels, PUBLISH_EVERY);
            continue;
        }
        let since = *idle_since.get_or_insert_with(Instant::now);
        if poller::spins(settings.wait, since) {
            meter.publish(settings, &state.channels, PUBLISH_EVERY);
            std::hint::spin_loop();
            continue;
        }
        idle(shared, &mut state, settings, &mut meter);
        idle_since = (settings.wait == Wait::Adaptive).then(Instant::now);
    }
    for channel in state.channels.iter_mut() {
        channel.rx.core().close();
    }
}

/// Arm, look again, sleep.
fn idle(shared: &Shared, state: &mut State, settings: &Settings, meter: &mut Meter) {
    meter.publish(settings, &state.channels, Duration::ZERO);
    let mut announced = false;
    for channel in state.channels.iter_mut() {
        let room = channel.tx.stalled();
        announced |= poller::raise(&mut channel.tx, &mut channel.rx, room);
    }
    sync::settle(announced);
    let idle = state.channels.iter_mut().all(|channel| {
        let room = channel.tx.stalled();
        poller::idle(&mut channel.tx, &mut channel.rx, room)
    });
    if idle && !shared.mailbox.is_full() && !shared.stop.load(Ordering::Acquire) {
        shared.poller.sleep(None);
        meter.wake();
    }
    state.channels.iter_mut().for_each(|channel| poller::lower(&channel.tx, &channel.rx));
}

/// Hand dropped channels over to control code.
fn report(shared: &Shared, channels: &mut Channels) {
    let dropped = channels.take_dropped();
    if dropped.is_empty() {
        return;
    }
    // Its bell is the client's as well: left in the poller, it would go on waking this worker.
    dropped.iter().for_each(|(channel, _)| shared.poller.remove(channel.rx.core().own_bell()));
    let mut faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
    faults.extend(dropped.into_iter().map(|(channel, error)| (channel.id, error.to_string())));
    drop(faults);
    shared.news.ring();
}

/// Counts polls and work, and times what was busy between two publications.
struct Meter {
    record: stats::Record,
    published: Instant,
    busy_from: Instant,
    polls_since: u32,
}

impl Default for Meter {
    fn default() -> Self {
        let now = Instant::now();
        Meter { record: stats::Record::default(), published: now, busy_from: now, polls_since: 0 }
    }
}

impl Meter {
    fn poll(&mut self, done: usize) {
        self.record[0] += 1;
        self.record[1] += done as u64;
        self.polls_since += 1;
    }

    /// Sleeping is not busy.
    fn wake(&mut self) {
        self.busy_from = Instant::now();
    }

    fn publish(&mut self, settings: &Settings, channels: &Channels, every: Duration) {
        // The clock is read every 64th poll only.
        if !every.is_zero() && self.polls_since < 64 {
            return;
        }
        self.polls_since = 0;
        let now = Instant::now();
        if now - self.published < every {
            return;
        }
        self.published = now;
        self.record[2] += (now - self.busy_from).as_nanos() as u64;
        self.busy_from = now;
        if let Some((page, index)) = &settings.stats {
            self.record[3] = stats::monotonic_ns();
            self.record[4] = channels.len() as u64;
            page.write(*index, &self.record);
        }
    }
}
