//! `Ledger` and `Ownership` for engines that are written in Python.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::endpoint::Endpoint;
use super::errors::{convert, raise};
use super::half::Guard;
use super::state::{self, Held, State};
use crate::channel::{Role, Rx, Tx};
use crate::error::Error;
use crate::ledger::{self, Line, Served};
use crate::ownership::{self, Waited};
use crate::state::Segment;

struct Member {
    line: Line,
    endpoint: Py<Endpoint>,
}

/// A member whose halves nobody else uses.
struct Entered<'a> {
    line: &'a mut Line,
    tx: Guard<'a, Tx>,
    rx: Guard<'a, Rx>,
}

impl Served for Entered<'_> {
    fn parts(&mut self) -> (&mut Line, &mut Tx, &mut Rx) {
        (self.line, &mut self.tx, &mut self.rx)
    }
}

impl Member {
    fn enter(&mut self, py: Python<'_>) -> PyResult<Entered<'_>> {
        let endpoint = self.endpoint.get();
        Ok(Entered { line: &mut self.line, tx: endpoint.tx().enter(py)?, rx: endpoint.rx().enter(py)? })
    }
}

#[derive(Default)]
struct Members {
    list: Vec<Member>,
    owned: bool,
}

impl Members {
    fn enter_all(&mut self, py: Python<'_>) -> PyResult<Vec<Entered<'_>>> {
        self.list.iter_mut().map(|member| member.enter(py)).collect()
    }

    /// Those that a commit or an abort concerns: mostly none.
    fn enter_touched(&mut self, py: Python<'_>) -> PyResult<Vec<Entered<'_>>> {
        let mut touched = Vec::new();
        for member in &mut self.list {
            let mut entered = member.enter(py)?;
            if ledger::touched(&mut entered) {
                touched.push(entered);
            }
        }
        Ok(touched)
    }

    fn remove(&mut self, line: usize) -> Option<Member> {
        let at = self.list.iter().position(|member| member.line.index() == line)?;
        Some(self.list.swap_remove(at))
    }
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Ledger {
    held: Held,
    members: Mutex<Members>,
}

impl Ledger {
    fn members(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Members>> {
        self.members.try_lock().map_err(|_| {
            raise(py, "BusyError", "another thread is using this ledger", "a ledger belongs to its engine's thread")
        })
    }

    fn segment(&self) -> MutexGuard<'_, Segment> {
        self.held.lock()
    }
}

#[pymethods]
impl Ledger {
    #[new]
    fn new(py: Python<'_>, state: &State) -> PyResult<Self> {
        let held = state.held(py)?;
        held.frame.check_writable().map_err(|error| state::convert(py, error))?;
        ledger::prefault(&held.frame);
        Ok(Ledger { held, members: Mutex::default() })
    }

    fn join(&self, py: Python<'_>, line: usize, channel: u64, endpoint: Bound<'_, Endpoint>) -> PyResult<()> {
        if endpoint.get().core().role != Role::Server {
            let hint = "a client's end belongs to its process";
            return Err(raise(py, "UsageError", "only a server's end can be in a ledger", hint));
        }
        let mut members = self.members(py)?;
        let mut member = {
            let (mut tx, mut rx) = (endpoint.get().tx().enter(py)?, endpoint.get().rx().enter(py)?);
            let line = Line::join(line, channel, &mut tx, &mut rx).map_err(|error| state::convert(py, error))?;
            Member { line, endpoint: endpoint.clone().unbind() }
        };
        if members.owned {
            let mut entered = member.enter(py)?;
            let failed = ledger::take_channels(&mut self.segment(), std::slice::from_mut(&mut entered)).pop();
            drop(entered);
            if let Some(error) = failed {
                return Err(convert(py, error));
            }
        }
        let before = members.remove(line);
        members.list.push(member);
        // Dropped without the lock: the last reference may run Python code.
        drop(members);
        drop(before);
        Ok(())
    }

    fn leave(&self, py: Python<'_>, line: usize) -> PyResult<()> {
        let mut members = self.members(py)?;
        let left = members.remove(line);
        drop(members);
        drop(left);
        Ok(())
    }

    #[pyo3(signature = (generation, source=None))]
    fn take(&self, py: Python<'_>, generation: u64, source: Option<&State>) -> PyResult<u64> {
        let mut members = self.members(py)?;
        let source = source.map(|source| source.held(py)).transpose()?;
        if source.as_ref().is_some_and(|source| std::sync::Arc::ptr_eq(&source.segment, &self.held.segment)) {
            return Err(raise(py, "UsageError", "a state is not its own source", ""));
        }
        let mut source = source.as_ref().map(Held::lock);
        let mut segment = self.segment();
        let undone =
            ledger::take(&mut segment, source.as_deref_mut(), generation).map_err(|error| state::convert(py, error))?;
        // A channel that is faulted by this says so when it is used.
        let _ = ledger::take_channels(&mut segment, &mut members.enter_all(py)?);
        members.owned = true;
        ledger::first_poll(&segment);
        Ok(undone)
    }

    fn commit(&self, py: Python<'_>) -> PyResult<bool> {
        let mut members = self.members(py)?;
        let mut touched = members.enter_touched(py)?;
        Ok(ledger::commit(&mut self.segment(), &mut touched))
    }

    fn abort(&self, py: Python<'_>) -> PyResult<u64> {
        let mut members = self.members(py)?;
        let mut touched = members.enter_touched(py)?;
        ledger::abort(&mut self.segment(), &mut touched).map_err(|error| state::convert(py, error))
    }

    fn polled(&self) {
        ledger::polled(&mut self.segment());
    }

    fn hand_over(&self, py: Python<'_>) -> PyResult<u64> {
        let mut members = self.members(py)?;
        let last = ledger::hand_over(&mut self.segment(), &mut members.enter_all(py)?);
        members.owned = false;
        Ok(last)
    }
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Ownership {
    ownership: ownership::Ownership,
}

#[pymethods]
impl Ownership {
    #[new]
    fn new(semaphore: i32) -> Self {
        Ownership { ownership: ownership::Ownership::new(semaphore) }
    }

    #[pyo3(signature = (timeout=None))]
    fn acquire(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let limit = timeout
            .map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)))
            .transpose()
            .map_err(|_| PyValueError::new_err("timeout must be seconds or None"))?;
        let since = Instant::now();
        loop {
            let left = limit.map(|limit| limit.saturating_sub(since.elapsed()));
            let waited = py.detach(|| self.ownership.acquire(left)).map_err(|error| gone(py, error))?;
            match waited {
                Waited::Owned => return Ok(true),
                Waited::Timeout | Waited::Cancelled => return Ok(false),
                Waited::Signal => py.check_signals()?,
            }
        }
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.ownership.release().map_err(|error| gone(py, error))
    }

    fn cancel(&self) {
        self.ownership.cancel();
    }

    #[getter]
    fn held(&self) -> bool {
        self.ownership.held()
    }
}

fn gone(py: Python<'_>, error: Error) -> PyErr {
    raise(py, "ResourceError", &error.to_string(), "whoever made it has no use for this engine any more")
}
