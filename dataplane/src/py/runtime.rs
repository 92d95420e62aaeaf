//! Poller and Worker as Python sees them.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use super::endpoint::{borrow, Endpoint};
use super::errors::{convert, raise};
use super::fast::Buffer;
use super::state::{self, State};
use super::waiting::mode;
use crate::engine;
use crate::engine::worker::{self, News, Refusal};
use crate::ledger;
use crate::ownership::Ownership;
use crate::poller::{self, Wait};
use crate::state::ObjectSpec;
use crate::stats::Page;
use crate::sync;

/// How long the control side waits for an engine to look into its mailbox: engines never block, so a second is a hang.
const MAILBOX_TIMEOUT: Duration = Duration::from_secs(1);

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Poller {
    poller: poller::Poller,
    members: Mutex<Vec<Member>>,
    woken: AtomicBool,
}

struct Member {
    endpoint: Py<Endpoint>,
    /// Waits for room to send, whatever there is to receive.
    room: bool,
}

impl Poller {
    fn members(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Announce sleep on all; true when none of them needs a look now.
    fn arm(&self, py: Python<'_>) -> PyResult<bool> {
        let members = self.members();
        let mut announced = false;
        for member in members.iter() {
            let endpoint = member.endpoint.get();
            announced |= poller::raise(&mut *endpoint.tx().enter(py)?, &mut *endpoint.rx().enter(py)?, member.room);
        }
        sync::settle(announced);
        for member in members.iter() {
            let endpoint = member.endpoint.get();
            if !poller::idle(&mut *endpoint.tx().enter(py)?, &mut *endpoint.rx().enter(py)?, member.room) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn disarm(&self, py: Python<'_>) -> PyResult<()> {
        for member in self.members().iter() {
            let endpoint = member.endpoint.get();
            poller::lower(&*endpoint.tx().enter(py)?, &*endpoint.rx().enter(py)?);
        }
        Ok(())
    }

    /// Whether something is there without arming: a message, or a changed state.
    fn look(&self, py: Python<'_>) -> PyResult<bool> {
        for member in self.members().iter() {
            let endpoint = member.endpoint.get();
            let mut rx = endpoint.rx().enter(py)?;
            let something = if member.room {
                !matches!(endpoint.tx().enter(py)?.still_stalled(), Ok(true))
            } else {
                !matches!(rx.peek(), Ok(None)) && !rx.core().paused()
            };
            if something || rx.check().is_err() {
                return Ok(true);
            }
        }
        Ok(self.woken.swap(false, Ordering::AcqRel))
    }
}

#[pymethods]
impl Poller {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        Ok(Poller {
            poller: poller::Poller::new().map_err(|error| convert(py, error))?,
            members: Mutex::default(),
            woken: false.into(),
        })
    }

    #[pyo3(signature = (endpoint, room=false))]
    fn add(&self, py: Python<'_>, endpoint: Bound<'_, Endpoint>, room: bool) -> PyResult<()> {
        let mut members = self.members();
        if let Some(member) = members.iter_mut().find(|member| member.endpoint.is(&endpoint)) {
            member.room = room;
            return Ok(());
        }
        self.poller.add(endpoint.get().core().own_bell()).map_err(|error| convert(py, error))?;
        members.push(Member { endpoint: endpoint.unbind(), room });
        Ok(())
    }

    fn remove(&self, endpoint: &Bound<'_, Endpoint>) {
        self.poller.remove(endpoint.get().core().own_bell());
        let mut members = self.members();
        let removed = members.iter().position(|member| member.endpoint.is(endpoint)).map(|at| members.swap_remove(at));
        // Dropped without the lock: the last reference may run Python code.
        drop(members);
        drop(removed);
    }

    #[pyo3(signature = (timeout=None, wait=1))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>, wait: u8) -> PyResult<bool> {
        let wait = mode(wait)?;
        let since = Instant::now();
        let limit = timeout
            .map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)))
            .transpose()
            .map_err(|_| PyValueError::new_err("timeout must be seconds or None"))?;
        loop {
            if self.look(py)? {
                return Ok(true);
            }
            let left = limit.map(|limit| limit.saturating_sub(since.elapsed()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            if poller::spins(wait, since) {
                // Others of this interpreter get their turn: the link to the kernel is one of them.
                py.detach(|| (0..32).for_each(|_| std::hint::spin_loop()));
            } else {
                if self.arm(py)? && !self.woken.load(Ordering::Acquire) {
                    py.detach(|| self.poller.sleep(left));
                }
                self.disarm(py)?;
                py.check_signals()?;
                if wait == Wait::Adaptive || limit.is_none() {
                    // One slice at a time: the caller's thread has housekeeping of its own.
                    return self.look(py);
                }
            }
        }
    }

    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.poller.wake();
    }

    fn close(&self) {
        let members = std::mem::take(&mut *self.members());
        for member in &members {
            self.poller.remove(member.endpoint.get().core().own_bell());
        }
        drop(members);
    }
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Worker {
    worker: Mutex<worker::Worker>,
}

impl Worker {
    fn worker(&self) -> std::sync::MutexGuard<'_, worker::Worker> {
        self.worker.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[pymethods]
impl Worker {
    #[new]
    #[pyo3(signature = (name, engine, state, semaphore, generation, stats_fd=-1, stats_index=0, budget=64, wait=1, source=None, finish=None, channels=Vec::new(), fds=Vec::new()))]
    #[allow(clippy::too_many_arguments)] // One call per engine; the names are the documentation.
    fn new(
        py: Python<'_>,
        name: String,
        engine: &str,
        state: &State,
        semaphore: i32,
        generation: u64,
        stats_fd: i32,
        stats_index: usize,
        budget: usize,
        wait: u8,
        source: Option<&State>,
        finish: Option<Py<PyAny>>,
        channels: Vec<(u64, Bound<'_, Endpoint>, usize)>,
        fds: Vec<i32>,
    ) -> PyResult<Self> {
        let mut made = make(py, engine)?;
        if stats_index >= crate::stats::LINES || budget == 0 {
            return Err(PyValueError::new_err("stats_index or budget out of range"));
        }
        let stats = if stats_fd < 0 {
            None
        } else {
            Some((Page::new(borrow(stats_fd)?, true).map_err(|error| convert(py, error))?, stats_index))
        };
        let held = state.held(py)?;
        let source = source.map(|source| source.held(py)).transpose()?.map(|held| held.segment);
        if source.as_ref().is_some_and(|source| Arc::ptr_eq(source, &held.segment)) {
            return Err(raise(py, "UsageError", "a state is not its own source", ""));
        }
        held.frame.check_writable().map_err(|error| state::convert(py, error))?;
        ledger::prefault(&held.frame);
        let fds = fds.into_iter().map(|fd| Ok(borrow(fd)?.try_clone_to_owned()?)).collect::<PyResult<_>>()?;
        made.equip(fds).map_err(|error| state::convert(py, error))?;
        let settings = worker::Settings {
            name,
            stats,
            budget,
            wait: mode(wait)?,
            segment: held.segment,
            source,
            ownership: (semaphore >= 0).then(|| Ownership::new(semaphore)),
            generation,
            finish: finish.map(finisher),
            channels: channels
                .iter()
                .map(|(channel, endpoint, line)| served(py, *channel, endpoint, *line))
                .collect::<PyResult<_>>()?,
        };
        let worker = worker::Worker::start(made, settings).map_err(|error| convert(py, error))?;
        Ok(Worker { worker: Mutex::new(worker) })
    }

    fn attach(&self, py: Python<'_>, channel: u64, endpoint: &Bound<'_, Endpoint>, line: usize) -> PyResult<()> {
        let channel = served(py, channel, endpoint, line)?;
        match py.detach(|| self.worker().attach(channel, MAILBOX_TIMEOUT)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(hangs(py)),
            Err(error) => Err(convert(py, error)),
        }
    }

    fn detach(&self, py: Python<'_>, channel: u64) -> PyResult<()> {
        if py.detach(|| self.worker().detach(channel, MAILBOX_TIMEOUT)) {
            return Ok(());
        }
        Err(hangs(py))
    }

    fn control(&self, py: Python<'_>, request: &[u8]) -> PyResult<Vec<u8>> {
        let request = request.to_vec();
        match py.detach(|| self.worker().control(request, MAILBOX_TIMEOUT)) {
            Some(answer) => answer.map_err(|error| state::convert(py, error)),
            None => Err(raise(py, "NotRunningError", "the engine does not run in this process", "")),
        }
    }

    #[pyo3(signature = (retire=false))]
    fn hand_over(&self, retire: bool) {
        self.worker().hand_over(retire);
    }

    fn take_news<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let news = self.worker().take_news();
        news.into_iter().map(|news| tell(py, news)).collect()
    }

    fn fileno(&self) -> i32 {
        self.worker().news().as_fd().as_raw_fd()
    }

    #[getter]
    fn alive(&self) -> bool {
        self.worker().alive()
    }

    #[pyo3(signature = (timeout=1.0, last=false))]
    fn stop(&self, py: Python<'_>, timeout: f64, last: bool) -> PyResult<()> {
        let limit = Duration::try_from_secs_f64(timeout.max(0.0))
            .map_err(|_| PyValueError::new_err("timeout must be seconds"))?;
        if py.detach(|| self.worker().stop(limit, last)) {
            return Ok(());
        }
        Err(raise(py, "DeadlineError", "the engine did not end its poll", "it hangs: end its process"))
    }
}

/// Consumes the endpoint.
fn served(py: Python<'_>, id: u64, endpoint: &Bound<'_, Endpoint>, line: usize) -> PyResult<engine::Channel> {
    let endpoint = endpoint.get();
    engine::Channel::new(id, endpoint.tx().take(py)?, endpoint.rx().take(py)?, line)
        .map_err(|error| state::convert(py, error))
}

fn hangs(py: Python<'_>) -> PyErr {
    raise(py, "DeadlineError", "the engine did not look into its mailbox", "it hangs: restart it")
}

fn tell<'py>(py: Python<'py>, news: News) -> PyResult<Bound<'py, PyTuple>> {
    match news {
        News::Fault { channel, reason } => ("fault", channel, reason).into_pyobject(py),
        News::Took { first_poll_ns, last_poll_ns, undone } => {
            let more = PyDict::new(py);
            more.set_item("last_poll_ns", last_poll_ns)?;
            more.set_item("undone", undone)?;
            ("took", first_poll_ns, more).into_pyobject(py)
        }
        News::Yielded { last_poll_ns } => ("yielded", last_poll_ns, py.None()).into_pyobject(py),
        News::Refused { why: Refusal { code, text }, held } => {
            ("refused", u64::from(held), (code, text)).into_pyobject(py)
        }
        News::Said(said) => ("said", 0, PyBytes::new(py, &said)).into_pyobject(py),
        News::Ended(text) => ("ended", 0, text).into_pyobject(py),
    }
}

fn finisher(call: Py<PyAny>) -> worker::Finish {
    Box::new(move || {
        Python::attach(|py| match call.call0(py) {
            Ok(_) => Ok(()),
            Err(error) => {
                let value = error.value(py);
                let code = value.getattr("code").and_then(|code| code.extract());
                Err(Refusal { code: code.unwrap_or_else(|_| "failed".into()), text: value.to_string() })
            }
        })
    })
}

fn make(py: Python<'_>, engine: &str) -> PyResult<Box<dyn engine::Engine>> {
    engine::make(engine).ok_or_else(|| {
        let text = format!("no native engine is called {engine:?}");
        raise(py, "NotFoundError", &text, &format!("there are: {}", engine::NAMES.join(", ")))
    })
}

/// Kind, name, bytes of a key, bytes of an item, count, fields.
type Spec = (&'static str, String, usize, usize, usize, String);

#[pyfunction]
pub fn engine_schema(py: Python<'_>, engine: &str) -> PyResult<(String, u32, u32, Vec<Spec>)> {
    let schema = make(py, engine)?.schema();
    let spec = |spec: ObjectSpec| (spec.kind.name(), spec.name, spec.key, spec.item, spec.count, spec.fields);
    Ok((schema.name, schema.version, schema.oldest, schema.objects.into_iter().map(spec).collect()))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // As the trait has them.
pub fn engine_convert(
    py: Python<'_>,
    engine: &str,
    name: &str,
    from_version: u32,
    to_version: u32,
    old: &Bound<'_, PyAny>,
    new: &Bound<'_, PyAny>,
    count: usize,
) -> PyResult<()> {
    let (old, mut new) = (Buffer::get(old, false)?, Buffer::get(new, true)?);
    let whole = |bytes: usize| if count == 0 { bytes == 0 } else { bytes % count == 0 };
    if !whole(old.bytes().len()) || !whole(new.bytes_mut().len()) {
        return Err(PyValueError::new_err("the buffers are not `count` packed rows"));
    }
    make(py, engine)?
        .convert(name, from_version, to_version, old.bytes(), new.bytes_mut())
        .map_err(|error| state::convert(py, error))
}
