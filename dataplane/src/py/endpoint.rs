//! `Endpoint`: one end of a channel, as Python calls it. One call per message or burst.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyMemoryView};

use super::buffer::{Arena, Loan, Payload};
use super::errors::{convert, deadline, is_a, raise};
use super::fast::{self, Buffer};
use super::half::Half;
use super::waiting::{self, mode, Data, Deadline, Room};
use crate::channel::{self, Core, Grant, Role, Rx, Tx};
use crate::error::Error;
use crate::layout::{Header, INLINE_MAX};
use crate::ring::ARMED_EVENT;

/// Why two descriptors per number: Python passes plain integers, and -1 for none.
pub fn borrow<'fd>(fd: i32) -> PyResult<BorrowedFd<'fd>> {
    if fd < 0 {
        return Err(PyValueError::new_err("a descriptor must not be negative"));
    }
    // SAFETY: the caller owns the descriptor for the duration of this call; a number that is not open makes the system
    // calls below fail with EBADF.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

#[pyclass(subclass, frozen, weakref, module = "snap.dataplane._native")]
pub struct Endpoint {
    core: Arc<Core>,
    tx: Half<Tx>,
    rx: Half<Rx>,
}

impl Endpoint {
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    pub fn tx(&self) -> &Half<Tx> {
        &self.tx
    }

    pub fn rx(&self) -> &Half<Rx> {
        &self.rx
    }
}

/// Wait until there is a message; None when the deadline passed.
#[inline]
fn next(py: Python<'_>, rx: &mut Rx, timeout: Option<f64>, wait: u8) -> PyResult<Option<Header>> {
    let fail = |error| convert(py, error);
    rx.check().map_err(fail)?;
    if !rx.core().paused() {
        if let Some(header) = rx.peek().map_err(fail)? {
            return Ok(Some(header));
        }
    }
    if timeout == Some(0.0) || !waiting::wait(py, Data(rx), Deadline::new(timeout)?, mode(wait)?)? {
        return Ok(None);
    }
    rx.peek().map_err(fail)
}

#[inline]
fn take_bytes<'py>(py: Python<'py>, rx: &mut Rx, header: Header) -> PyResult<Bound<'py, PyBytes>> {
    fast::bytes_with(py, header.len, |out| rx.take_into(header, out).map_err(|error| convert(py, error)))
}

/// Try once; wait only if it is full, and only as long as the caller said.
#[inline]
fn put(
    py: Python<'_>,
    tx: &mut Tx,
    timeout: Option<f64>,
    wait: u8,
    mut attempt: impl FnMut(&mut Tx) -> crate::error::Result<()> + Send,
) -> PyResult<bool> {
    match attempt(tx) {
        Ok(()) => return Ok(true),
        Err(Error::Full) if timeout == Some(0.0) => return Ok(false),
        Err(Error::Full) => {}
        Err(error) => return Err(convert(py, error)),
    }
    waiting::wait(py, Room { tx, attempt }, Deadline::new(timeout)?, mode(wait)?)
}

fn unsent(py: Python<'_>, timeout: Option<f64>) -> PyErr {
    if timeout == Some(0.0) {
        return convert(py, Error::Full);
    }
    deadline(py, "no room to send before the deadline")
}

#[pymethods]
impl Endpoint {
    #[new]
    #[pyo3(signature = (role, ring_fd, up_fd, down_fd, slots, up_bytes, down_bytes, bells, generation, gate_fd=-1, gate_index=-1, rights=3, arena_fd=-1, arena_bytes=0))]
    #[allow(clippy::too_many_arguments)] // One call per channel; the names are the documentation.
    fn new(
        py: Python<'_>,
        role: u8,
        ring_fd: i32,
        up_fd: i32,
        down_fd: i32,
        slots: u32,
        up_bytes: usize,
        down_bytes: usize,
        bells: (i32, i32),
        generation: u32,
        gate_fd: i32,
        gate_index: i64,
        rights: u8,
        arena_fd: i32,
        arena_bytes: usize,
    ) -> PyResult<Self> {
        let role = match role {
            0 => Role::Client,
            1 => Role::Server,
            _ => return Err(PyValueError::new_err("role must be CLIENT or SERVER")),
        };
        let pool = |fd: i32| if fd < 0 { Ok(None) } else { borrow(fd).map(Some) };
        let gate = match (gate_fd, usize::try_from(gate_index)) {
            (fd, Ok(index)) if fd >= 0 => Some((borrow(fd)?, index)),
            _ => None,
        };
        let grant = Grant {
            role,
            ring: borrow(ring_fd)?,
            pools: [(pool(up_fd)?, up_bytes), (pool(down_fd)?, down_bytes)],
            slots,
            bells: [borrow(bells.0)?, borrow(bells.1)?],
            generation,
            rights,
            gate,
            arena: pool(arena_fd)?.map(|fd| (fd, arena_bytes)),
        };
        let (core, tx, rx) = channel::open(&grant).map_err(|error| convert(py, error))?;
        Ok(Endpoint { core, tx: Half::new(tx), rx: Half::new(rx) })
    }

    /// All of the arena, writable; None without one.
    #[getter]
    fn arena<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyMemoryView>>> {
        Arena::view(py, &self.core)
    }

    #[pyo3(signature = (data, tag=0, timeout=None, wait=1))]
    fn send(&self, py: Python<'_>, data: &Bound<'_, PyAny>, tag: u64, timeout: Option<f64>, wait: u8) -> PyResult<()> {
        let mut tx = self.tx.enter(py)?;
        tx.check().map_err(|error| convert(py, error))?;
        let buffer;
        let bytes = match data.cast::<PyBytes>() {
            Ok(bytes) => bytes.as_bytes(),
            Err(_) => {
                buffer = Buffer::get(data, false)?;
                buffer.bytes()
            }
        };
        if !put(py, &mut tx, timeout, wait, |tx| tx.put(tag, bytes))? {
            return Err(unsent(py, timeout));
        }
        tx.publish();
        Ok(())
    }

    #[pyo3(signature = (timeout=None, wait=1))]
    fn recv<'py>(&self, py: Python<'py>, timeout: Option<f64>, wait: u8) -> PyResult<Bound<'py, PyBytes>> {
        let mut rx = self.rx.enter(py)?;
        match next(py, &mut rx, timeout, wait)? {
            Some(header) => take_bytes(py, &mut rx, header),
            None => Err(deadline(py, "no message before the deadline")),
        }
    }

    #[pyo3(signature = (timeout=None, wait=1))]
    fn recv_tagged<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
        wait: u8,
    ) -> PyResult<(u64, Bound<'py, PyBytes>)> {
        let mut rx = self.rx.enter(py)?;
        match next(py, &mut rx, timeout, wait)? {
            Some(header) => Ok((header.tag, take_bytes(py, &mut rx, header)?)),
            None => Err(deadline(py, "no message before the deadline")),
        }
    }

    fn try_recv<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut rx = self.rx.enter(py)?;
        match next(py, &mut rx, Some(0.0), 0)? {
            Some(header) => take_bytes(py, &mut rx, header).map(Some),
            None => Ok(None),
        }
    }

    #[pyo3(signature = (messages, tag=0, timeout=None, wait=1))]
    fn send_many(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tag: u64,
        timeout: Option<f64>,
        wait: u8,
    ) -> PyResult<usize> {
        let mut tx = self.tx.enter(py)?;
        tx.check().map_err(|error| convert(py, error))?;
        let list;
        let messages = match messages.cast::<PyList>() {
            Ok(messages) => messages,
            Err(_) => {
                list = PyList::new(py, messages.try_iter()?.collect::<PyResult<Vec<_>>>()?)?;
                &list
            }
        };
        let mut sent = 0;
        let outcome = messages.iter().try_for_each(|item| -> PyResult<()> {
            let buffer;
            let bytes = match item.cast::<PyBytes>() {
                Ok(bytes) => bytes.as_bytes(),
                Err(_) => {
                    buffer = Buffer::get(&item, false)?;
                    buffer.bytes()
                }
            };
            match tx.put(tag, bytes) {
                Ok(()) => {}
                Err(Error::Full) => {
                    // What is there goes out first: the room that is missing may be its own.
                    tx.publish();
                    if !put(py, &mut tx, timeout, wait, |tx| tx.put(tag, bytes))? {
                        return Err(unsent(py, timeout));
                    }
                }
                Err(error) => return Err(convert(py, error)),
            }
            sent += 1;
            Ok(())
        });
        tx.publish();
        match outcome {
            Ok(()) => Ok(sent),
            Err(error) => partial(py, error, sent),
        }
    }

    #[pyo3(signature = (limit, timeout=None, wait=1))]
    fn recv_many<'py>(
        &self,
        py: Python<'py>,
        limit: usize,
        timeout: Option<f64>,
        wait: u8,
    ) -> PyResult<Bound<'py, PyList>> {
        let mut rx = self.rx.enter(py)?;
        let mut found = Vec::with_capacity(limit.min(256));
        if limit == 0 || next(py, &mut rx, timeout, wait)?.is_none() {
            return PyList::new(py, found);
        }
        while found.len() < limit {
            let mut failed = None;
            let room = limit - found.len();
            let taken = rx.take_inline(room, |message| {
                let bytes = fast::bytes_with(py, message.len, |out| {
                    message.copy_to(out);
                    Ok(())
                });
                bytes.map(|bytes| found.push(bytes)).map_err(|error| failed = Some(error)).is_ok()
            });
            if let Some(error) = failed {
                return Err(error);
            }
            // An error here is met again by the next call, when what came before it has been handed over.
            match taken.and_then(|_| rx.peek()) {
                Ok(Some(header)) if found.len() < limit => found.push(take_bytes(py, &mut rx, header)?),
                _ => break,
            }
        }
        PyList::new(py, found)
    }

    #[pyo3(signature = (records, size, tag=0, timeout=None, wait=1))]
    fn send_packed(
        &self,
        py: Python<'_>,
        records: &Bound<'_, PyAny>,
        size: usize,
        tag: u64,
        timeout: Option<f64>,
        wait: u8,
    ) -> PyResult<usize> {
        let mut tx = self.tx.enter(py)?;
        tx.check().map_err(|error| convert(py, error))?;
        let buffer = Buffer::get(records, false)?;
        let bytes = buffer.bytes();
        if size == 0 || bytes.len() % size != 0 {
            return Err(PyValueError::new_err("the buffer is not a whole number of records of that size"));
        }
        let mut sent = 0;
        while sent * size < bytes.len() {
            let rest = &bytes[sent * size..];
            let mut step = 0;
            let attempt = |tx: &mut Tx| {
                step = if size > INLINE_MAX {
                    tx.put(tag, &rest[..size]).map(|()| 1)?
                } else {
                    tx.put_packed(tag, rest, size)?
                };
                Ok(())
            };
            match put(py, &mut tx, timeout, wait, attempt) {
                Ok(true) => sent += step,
                Ok(false) => break,
                Err(error) => return partial(py, error, sent),
            }
            tx.publish();
        }
        Ok(sent)
    }

    #[pyo3(signature = (out, size, timeout=None, wait=1))]
    fn recv_packed(
        &self,
        py: Python<'_>,
        out: &Bound<'_, PyAny>,
        size: usize,
        timeout: Option<f64>,
        wait: u8,
    ) -> PyResult<usize> {
        let mut rx = self.rx.enter(py)?;
        let mut buffer = Buffer::get(out, true)?;
        if size == 0 {
            return Err(PyValueError::new_err("records must have at least one byte"));
        }
        let out = buffer.bytes_mut();
        let Some(header) = next(py, &mut rx, timeout, wait)? else { return Ok(0) };
        if header.len != size {
            let text = format!("the next message has {} bytes, not {size}", header.len);
            return Err(raise(py, "MessageSizeError", &text, "receive it with recv() or receive()"));
        }
        let mut received = rx.take_packed(out, size).map_err(|error| convert(py, error))?;
        // What is left are messages in the pool, of another size, or faults; the last two are for the next call to say.
        for place in out.chunks_exact_mut(size).skip(received) {
            match rx.peek() {
                Ok(Some(header)) if header.len == size => {
                    rx.take_into(header, place).map_err(|error| convert(py, error))?;
                    received += 1;
                }
                _ => break,
            }
        }
        Ok(received)
    }

    #[pyo3(signature = (size, timeout=None, wait=1))]
    fn loan(&self, py: Python<'_>, size: usize, timeout: Option<f64>, wait: u8) -> PyResult<Loan> {
        let mut tx = self.tx.enter(py)?;
        tx.check().map_err(|error| convert(py, error))?;
        let mut loan = None;
        let got = put(py, &mut tx, timeout, wait, |tx| {
            loan = Some(tx.loan(size)?);
            Ok(())
        })?;
        match loan {
            Some(loan) if got => Ok(Loan::new(self.core.clone(), loan)),
            _ => Err(unsent(py, timeout)),
        }
    }

    #[pyo3(signature = (loan, tag=0, timeout=None, wait=1))]
    fn send_loan(&self, py: Python<'_>, loan: &Loan, tag: u64, timeout: Option<f64>, wait: u8) -> PyResult<()> {
        let mut tx = self.tx.enter(py)?;
        tx.check().map_err(|error| convert(py, error))?;
        let reference = loan.begin_sending(py, &self.core)?;
        let outcome = put(py, &mut tx, timeout, wait, |tx| tx.put_loan(tag, reference));
        loan.sent(matches!(outcome, Ok(true)));
        if !outcome? {
            return Err(unsent(py, timeout));
        }
        tx.publish();
        Ok(())
    }

    #[pyo3(signature = (timeout=None, wait=1))]
    fn receive(&self, py: Python<'_>, timeout: Option<f64>, wait: u8) -> PyResult<Payload> {
        let mut rx = self.rx.enter(py)?;
        let Some(header) = next(py, &mut rx, timeout, wait)? else {
            return Err(deadline(py, "no message before the deadline"));
        };
        if header.pooled {
            let place = rx.take_pooled(header).map_err(|error| convert(py, error))?;
            return Ok(Payload::pooled(self.core.clone(), header, place));
        }
        let mut bytes = vec![0; header.len].into_boxed_slice();
        rx.take_into(header, &mut bytes).map_err(|error| convert(py, error))?;
        Ok(Payload::inline(header.tag, bytes))
    }

    fn unread(&self, py: Python<'_>, count: usize) -> PyResult<()> {
        if self.rx.enter(py)?.unread(count).map_err(|error| convert(py, error))? {
            return Ok(());
        }
        Err(PyValueError::new_err("so many messages were not received since the last commit of a ledger"))
    }

    /// Messages of any inline size that are sure to fit now.
    fn room(&self, py: Python<'_>) -> PyResult<u64> {
        self.tx.enter(py)?.room().map_err(|error| convert(py, error))
    }

    fn arm_recv(&self, py: Python<'_>) -> PyResult<bool> {
        let mut rx = self.rx.enter(py)?;
        if rx.check().is_err() {
            return Ok(false);
        }
        let armed = rx.arm(ARMED_EVENT).map_err(|error| convert(py, error))?;
        Ok(armed && rx.check().is_ok())
    }

    fn arm_send(&self, py: Python<'_>) -> PyResult<bool> {
        let mut tx = self.tx.enter(py)?;
        if tx.check().is_err() {
            return Ok(false);
        }
        let armed = tx.arm_stalled(ARMED_EVENT).map_err(|error| convert(py, error))?;
        Ok(armed && tx.check().is_ok())
    }

    fn fileno(&self) -> i32 {
        use std::os::fd::AsFd;
        self.core.own_bell().as_fd().as_raw_fd()
    }

    fn drain_bell(&self) {
        self.core.own_bell().drain();
    }

    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.core.check().map_err(|error| convert(py, error))
    }

    fn close(&self) {
        self.core.close();
    }

    fn abandon(&self) {
        self.core.abandon();
    }

    #[getter]
    fn closed(&self) -> bool {
        self.core.closed()
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.core.state_name()
    }

    #[getter]
    fn fault(&self) -> String {
        match self.core.check() {
            Err(Error::Faulted(fault)) => fault.to_string(),
            _ => String::new(),
        }
    }

    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        use std::sync::atomic::Ordering::Relaxed;
        let counters = &self.core.counters;
        let dict = PyDict::new(py);
        dict.set_item("sent", counters.sent.load(Relaxed))?;
        dict.set_item("received", counters.received.load(Relaxed))?;
        dict.set_item("sent_bytes", counters.sent_bytes.load(Relaxed))?;
        dict.set_item("received_bytes", counters.received_bytes.load(Relaxed))?;
        dict.set_item("bells", counters.bells.load(Relaxed))?;
        dict.set_item("loans_out", self.core.loans_out())?;
        Ok(dict)
    }
}

/// A burst that was cut short: how much of it went out matters more than why, unless nothing did. The channel's errors
/// are met again by the next call; others (a wrong type, what a signal handler raises) would be lost.
fn partial(py: Python<'_>, error: PyErr, sent: usize) -> PyResult<usize> {
    let full = is_a(py, &error, "FullError") || is_a(py, &error, "DeadlineError");
    if full || sent > 0 && is_a(py, &error, "ChannelError") {
        return Ok(sent);
    }
    Err(error)
}
