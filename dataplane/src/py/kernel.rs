//! What the kernel holds of a channel and of a module: header and state word, gate page, statistics.

use std::sync::atomic::Ordering;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::endpoint::borrow;
use super::errors::{convert, raise};
use crate::bell::Bell;
use crate::channel::{self, State};
use crate::error::{Error, Fault};
use crate::segment::Mapping;
use crate::{gate, layout, stats};

struct Held {
    ring: Mapping,
    bells: [Bell; 2],
}

#[pyclass(module = "snap.dataplane._native")]
pub struct ChannelControl {
    held: Option<Held>,
    slots: u32,
}

impl ChannelControl {
    fn held(&self, py: Python<'_>) -> PyResult<&Held> {
        self.held.as_ref().ok_or_else(|| convert(py, Error::Closed))
    }
}

#[pymethods]
impl ChannelControl {
    #[new]
    fn new(py: Python<'_>, ring_fd: i32, slots: u32, bells: (i32, i32)) -> PyResult<Self> {
        if !layout::slots_valid(slots) {
            return Err(convert(py, Error::Faulted(Fault::Geometry)));
        }
        let fail = |error| convert(py, error);
        let ring = Mapping::new(borrow(ring_fd)?, layout::ring_bytes(slots), true).map_err(fail)?;
        let duplicate = |fd: i32| -> PyResult<Bell> {
            Bell::duplicate(borrow(fd)?).map_err(|errno| fail(Error::os("duplicating a doorbell", errno)))
        };
        Ok(ChannelControl { held: Some(Held { ring, bells: [duplicate(bells.0)?, duplicate(bells.1)?] }), slots })
    }

    fn init(&self, py: Python<'_>, channel: u64, generation: u32) -> PyResult<()> {
        channel::init_header(&self.held(py)?.ring, self.slots, channel, generation);
        Ok(())
    }

    #[pyo3(signature = (state, reason=""))]
    fn set_state(&self, py: Python<'_>, state: &str, reason: &str) -> PyResult<()> {
        let held = self.held(py)?;
        let Some((_, state)) = State::NAMES.iter().find(|(name, _)| *name == state) else {
            return Err(raise(py, "UsageError", &format!("unknown channel state {state:?}"), ""));
        };
        let fault = (*state == State::Faulted && !reason.is_empty()).then_some(Fault::Reported);
        channel::set_state(&held.ring, &held.bells, *state, fault);
        Ok(())
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> PyResult<&'static str> {
        let word = self.held(py)?.ring.u32_at(layout::OFF_STATE).load(Ordering::Acquire);
        Ok(State::from_word(word).map_or("unknown", State::name))
    }

    fn longest_wait(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.held(py)?.ring.u64_at(layout::OFF_LONGEST_WAIT).load(Ordering::Acquire))
    }

    fn clear_longest_wait(&self, py: Python<'_>) -> PyResult<()> {
        channel::clear_longest_wait(&self.held(py)?.ring);
        Ok(())
    }

    fn depth(&self, py: Python<'_>) -> PyResult<(i64, i64)> {
        let ring = &self.held(py)?.ring;
        let depth = |direction: usize| {
            let control = layout::OFF_DIRECTION[direction];
            let tail = ring.u64_at(control + layout::DIR_TAIL).load(Ordering::Relaxed);
            let head = ring.u64_at(control + layout::DIR_HEAD).load(Ordering::Relaxed);
            let depth = tail.wrapping_sub(head);
            if depth <= u64::from(self.slots) {
                depth as i64
            } else {
                -1
            }
        };
        Ok((depth(0), depth(1)))
    }

    fn close(&mut self) {
        self.held = None;
    }
}

#[pyclass(module = "snap.dataplane._native")]
pub struct Gate(Option<gate::Gate>);

#[pymethods]
impl Gate {
    #[classattr]
    const LINES: usize = gate::LINES;
    #[classattr]
    const BYTES: usize = gate::BYTES;

    #[new]
    fn new(py: Python<'_>, fd: i32) -> PyResult<Self> {
        gate::Gate::new(borrow(fd)?).map(|gate| Gate(Some(gate))).map_err(|error| convert(py, error))
    }

    fn open(&self, py: Python<'_>, index: usize, generation: u32) -> PyResult<()> {
        self.line(py, index)?.open(index, generation);
        Ok(())
    }

    fn shut(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        self.line(py, index)?.shut(index);
        Ok(())
    }

    fn close(&mut self) {
        self.0 = None;
    }
}

impl Gate {
    fn line(&self, py: Python<'_>, index: usize) -> PyResult<&gate::Gate> {
        if index >= gate::LINES {
            return Err(PyValueError::new_err("no such gate line"));
        }
        self.0.as_ref().ok_or_else(|| convert(py, Error::Closed))
    }
}

#[pyclass(module = "snap.dataplane._native")]
pub struct StatsPage {
    page: Option<stats::Page>,
    writable: bool,
}

impl StatsPage {
    fn page(&self, py: Python<'_>, index: usize) -> PyResult<&stats::Page> {
        if index >= stats::LINES {
            return Err(PyValueError::new_err("no such statistics record"));
        }
        self.page.as_ref().ok_or_else(|| convert(py, Error::Closed))
    }
}

#[pymethods]
impl StatsPage {
    #[classattr]
    const LINES: usize = stats::LINES;
    #[classattr]
    const BYTES: usize = stats::BYTES;

    #[new]
    fn new(py: Python<'_>, fd: i32, writable: bool) -> PyResult<Self> {
        let page = stats::Page::new(borrow(fd)?, writable).map_err(|error| convert(py, error))?;
        Ok(StatsPage { page: Some(page), writable })
    }

    fn read<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyDict>> {
        let record = self.page(py, index)?.read(index);
        let dict = PyDict::new(py);
        for (name, value) in stats::FIELDS.iter().zip(record) {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    #[pyo3(signature = (index, *, polls, work, busy_ns, channels))]
    fn write(&self, py: Python<'_>, index: usize, polls: u64, work: u64, busy_ns: u64, channels: u64) -> PyResult<()> {
        let page = self.page(py, index)?;
        if !self.writable {
            return Err(raise(py, "DeniedError", "this statistics page is mapped read-only", ""));
        }
        let mut record = stats::Record::default();
        record[..5].copy_from_slice(&[polls, work, busy_ns, stats::monotonic_ns(), channels]);
        page.write(index, &record);
        Ok(())
    }

    fn close(&mut self) {
        self.page = None;
    }
}
