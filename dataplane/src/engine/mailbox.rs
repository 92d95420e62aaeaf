//! The mailbox of an engine: a slot of depth one through which control code runs a short piece of work on the engine's
//! thread (SOSP 2019, section 2). The engine's side is one load when the slot is empty and never waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub type Work<T> = Box<dyn FnOnce(&mut T) + Send>;

pub struct Mailbox<T> {
    full: AtomicBool,
    slot: Mutex<Option<Work<T>>>,
    emptied: Condvar,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Mailbox { full: AtomicBool::new(false), slot: Mutex::new(None), emptied: Condvar::new() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Mailbox<T> {
    /// Leave work for the engine; waits up to `timeout` for the slot to be free. Gives the work back if it was not.
    pub fn post(&self, work: Work<T>, timeout: Duration) -> Result<(), Work<T>> {
        let end = Instant::now() + timeout;
        let mut slot = lock(&self.slot);
        while slot.is_some() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(work);
            }
            slot = self.emptied.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *slot = Some(work);
        self.full.store(true, Ordering::Release);
        Ok(())
    }

    /// The engine's side, at a poll boundary: run what is there. The lock is tried, never waited for: a poster that holds
    /// it right now is served at the next boundary.
    pub fn run(&self, target: &mut T) -> bool {
        if !self.full.load(Ordering::Acquire) {
            return false;
        }
        let Ok(mut slot) = self.slot.try_lock() else { return false };
        let work = slot.take();
        self.full.store(false, Ordering::Relaxed);
        drop(slot);
        self.emptied.notify_one();
        if let Some(work) = work {
            work(target);
            return true;
        }
        false
    }

    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }
}
