//! The waiting loops of the Python face: spin with the GIL, then without it, then sleep, as the caller chose.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::errors::convert;
use crate::bell;
use crate::channel::{Rx, Tx};
use crate::error::{Error, Result};
use crate::poller::{self, Wait};
use crate::ring::ARMED_FUTEX;

/// Looks taken with the GIL held before it is given up: about two microseconds, less than giving it up and back costs
/// when the answer is on its way.
const HELD_LOOKS: u32 = 256;
/// Pauses of a receiver that crowds its sender: some hundred nanoseconds.
const CROWD_PAUSE: u32 = 32;
/// Waiting without the GIL comes back this often for signals, or after a sleep.
const SIGNAL_SLICE: Duration = Duration::from_millis(20);

pub fn mode(number: u8) -> PyResult<Wait> {
    match number {
        0 => Ok(Wait::Spin),
        1 => Ok(Wait::Adaptive),
        2 => Ok(Wait::Block),
        _ => Err(pyo3::exceptions::PyValueError::new_err("wait must be SPIN, ADAPTIVE or BLOCK")),
    }
}

/// When to stop waiting: never, or an instant.
#[derive(Clone, Copy)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    pub fn new(timeout: Option<f64>) -> PyResult<Deadline> {
        let Some(seconds) = timeout else { return Ok(Deadline(None)) };
        let limit = Duration::try_from_secs_f64(seconds.max(0.0))
            .map_err(|_| pyo3::exceptions::PyValueError::new_err("timeout must be seconds or None"))?;
        Ok(Deadline(Instant::now().checked_add(limit)))
    }

    fn passed(&self) -> bool {
        self.0.is_some_and(|end| Instant::now() >= end)
    }

    fn left(&self) -> Option<Duration> {
        self.0.map(|end| end.saturating_duration_since(Instant::now()))
    }
}

enum Outcome {
    Ready,
    Timeout,
    Signals,
}

/// Something to wait for: `look` is cheap and says whether it is there, `sleep` arms, looks again and sleeps.
pub trait Awaited: Send {
    fn look(&mut self) -> Result<bool>;
    /// Cheap enough for every look; errors end the wait.
    fn check(&mut self) -> Result<()>;
    /// True when a signal interrupted it.
    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool>;
    /// Whether looking at once would be in the peer's way.
    fn crowding(&mut self) -> bool {
        false
    }
    /// It took its time to come.
    fn uncrowd(&mut self) {}
    /// It really has to be waited for, from now on and then no more.
    fn begin(&mut self) {}
    fn end(&mut self) {}
}

pub struct Data<'a>(pub &'a mut Rx);

impl Awaited for Data<'_> {
    #[inline]
    fn look(&mut self) -> Result<bool> {
        Ok(self.0.peek()?.is_some() && !self.0.core().paused())
    }
    fn check(&mut self) -> Result<()> {
        self.0.check()
    }
    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool> {
        if !self.0.arm(ARMED_FUTEX)? || self.0.check().is_err() {
            return Ok(false);
        }
        Ok(bell::sleep(self.0.armed_word(), limit))
    }
    fn crowding(&mut self) -> bool {
        self.0.crowding()
    }
    fn uncrowd(&mut self) {
        self.0.uncrowd();
    }
    fn begin(&mut self) {
        self.0.begin_wait();
    }
    fn end(&mut self) {
        self.0.waited();
    }
}

/// Room for `slots` descriptors, or for whatever `attempt` wants beyond that.
pub struct Room<'a, F> {
    pub tx: &'a mut Tx,
    pub attempt: F,
}

impl<F: FnMut(&mut Tx) -> Result<()> + Send> Awaited for Room<'_, F> {
    fn look(&mut self) -> Result<bool> {
        match (self.attempt)(self.tx) {
            Ok(()) => Ok(true),
            Err(Error::Full) => Ok(false),
            Err(error) => Err(error),
        }
    }
    fn check(&mut self) -> Result<()> {
        self.tx.check()
    }
    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool> {
        if !self.tx.arm_stalled(ARMED_FUTEX)? || self.tx.check().is_err() {
            return Ok(false);
        }
        Ok(bell::sleep(self.tx.armed_word(), limit))
    }
}

/// Wait for it: true when it is there, false when the deadline passed. Python signal handlers run meanwhile.
pub fn wait(py: Python<'_>, mut what: impl Awaited, deadline: Deadline, wait: Wait) -> PyResult<bool> {
    if wait != Wait::Block {
        if what.crowding() {
            (0..CROWD_PAUSE).for_each(|_| std::hint::spin_loop());
        }
        for looks in 0..HELD_LOOKS {
            if what.look().map_err(|error| convert(py, error))? {
                if looks > CROWD_PAUSE {
                    what.uncrowd();
                }
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        what.uncrowd();
    }
    what.begin();
    let outcome = wait_on(py, &mut what, deadline, wait);
    what.end();
    outcome
}

fn wait_on(py: Python<'_>, what: &mut impl Awaited, deadline: Deadline, wait: Wait) -> PyResult<bool> {
    let since = Instant::now();
    loop {
        match py.detach(|| slice(what, deadline, wait, since)).map_err(|error| convert(py, error))? {
            Outcome::Ready => return Ok(true),
            Outcome::Timeout => return Ok(false),
            Outcome::Signals => py.check_signals()?,
        }
    }
}

fn slice(what: &mut impl Awaited, deadline: Deadline, wait: Wait, since: Instant) -> Result<Outcome> {
    let began = Instant::now();
    loop {
        for _ in 0..64 {
            if what.look()? {
                return Ok(Outcome::Ready);
            }
            if wait == Wait::Block {
                break;
            }
            std::hint::spin_loop();
        }
        what.check()?;
        if deadline.passed() {
            return Ok(Outcome::Timeout);
        }
        if poller::spins(wait, since) {
            if began.elapsed() > SIGNAL_SLICE {
                return Ok(Outcome::Signals);
            }
            // Whoever we wait for may want this processor.
            std::thread::yield_now();
            continue;
        }
        // Not only when interrupted: a signal may come just before the sleep, or a peer may keep waking us for nothing.
        if what.sleep(deadline.left())? || began.elapsed() > SIGNAL_SLICE {
            return Ok(Outcome::Signals);
        }
    }
}
