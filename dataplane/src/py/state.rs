//! State segments for Python engines, tools and tests.
//!
//! Readers go to the frame, which any thread may look at; writers take the lock of the segment for the length of one
//! call, with the GIL held: a native thread that holds it never waits for the GIL.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use super::endpoint::borrow;
use super::errors::raise;
use super::fast::{bytes_with, Buffer};
use super::view::StateView;
use crate::state::{self, Frame, Kind, Object, ObjectSpec, Phase, Schema, Segment, Shared, StateError, Word};

type Spec = (String, String, usize, usize, usize, String);

#[cold]
pub fn convert(py: Python<'_>, error: StateError) -> PyErr {
    let text = error.to_string();
    let (class, hint) = match error {
        StateError::Damaged(_) => ("StateDamagedError", "it is not adopted; `snapctl state` shows what is left"),
        StateError::Schema(_) => ("SchemaError", ""),
        StateError::Full(_) => {
            ("StateFullError", "take the poll back and do less in one, or give the object more room")
        }
        StateError::Usage(_) => ("UsageError", ""),
        StateError::Os { .. } => ("ResourceError", "see `snapctl doctor` for the limits of this machine"),
    };
    raise(py, class, &text, hint)
}

/// A state that several Python objects share.
#[derive(Clone)]
pub struct Held {
    pub frame: Arc<Frame>,
    pub segment: Shared,
}

impl Held {
    pub fn lock(&self) -> MutexGuard<'_, Segment> {
        self.segment.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct State {
    held: Mutex<Option<Held>>,
}

impl State {
    /// Raises StateError when it was closed.
    pub fn held(&self, py: Python<'_>) -> PyResult<Held> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        held.ok_or_else(|| raise(py, "StateError", "the state is closed", "open it again"))
    }

    fn mutate<T>(&self, py: Python<'_>, act: impl FnOnce(&mut Segment) -> state::Result<T>) -> PyResult<T> {
        act(&mut self.held(py)?.lock()).map_err(|error| convert(py, error))
    }
}

#[pymethods]
impl State {
    #[classattr]
    const MIN_BYTES: usize = state::MIN_BYTES;

    #[new]
    #[pyo3(signature = (fd, writable=true))]
    fn new(py: Python<'_>, fd: i32, writable: bool) -> PyResult<Self> {
        let frame = Arc::new(Frame::open(borrow(fd)?, writable).map_err(|error| convert(py, error))?);
        let segment = Arc::new(Mutex::new(Segment::new(frame.clone())));
        Ok(State { held: Mutex::new(Some(Held { frame, segment })) })
    }

    #[staticmethod]
    fn blank(py: Python<'_>, fd: i32) -> PyResult<bool> {
        Frame::blank(borrow(fd)?).map_err(|error| convert(py, error))
    }

    #[staticmethod]
    #[pyo3(signature = (fd, engine, schema, version, oldest, objects, log_bytes=None))]
    #[allow(clippy::too_many_arguments)]
    fn format(
        py: Python<'_>,
        fd: i32,
        engine: String,
        schema: String,
        version: u32,
        oldest: u32,
        objects: Vec<Spec>,
        log_bytes: Option<usize>,
    ) -> PyResult<()> {
        let objects = objects.into_iter().map(|spec| object_spec(py, spec)).collect::<PyResult<Vec<_>>>()?;
        let schema = Schema { engine, name: schema, version, oldest, objects };
        let fd = borrow(fd)?;
        let log_bytes = log_bytes.map_or_else(|| Frame::log_for(fd, &schema), Ok);
        log_bytes.and_then(|log_bytes| Frame::format(fd, &schema, log_bytes)).map_err(|error| convert(py, error))
    }

    #[getter]
    fn header<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let frame = self.held(py)?.frame;
        let header = frame.header();
        let dict = PyDict::new(py);
        dict.set_item("engine", &header.schema.engine)?;
        dict.set_item("schema", &header.schema.name)?;
        dict.set_item("version", header.schema.version)?;
        dict.set_item("oldest", header.schema.oldest)?;
        dict.set_item("generation", frame.get(Word::Generation))?;
        dict.set_item("owner", frame.get(Word::Owner))?;
        dict.set_item("phase", frame.phase().map_or("unknown", Phase::name))?;
        dict.set_item("epoch", frame.epoch())?;
        dict.set_item("adoptions", frame.get(Word::Adoptions))?;
        dict.set_item("last_poll_ns", frame.get(Word::LastPollNs))?;
        dict.set_item("first_poll_ns", frame.get(Word::FirstPollNs))?;
        dict.set_item("tracking", frame.get(Word::Tracking) & 1 == 1)?;
        dict.set_item("used_bytes", frame.used_bytes())?;
        dict.set_item("size", header.size)?;
        let objects = frame.objects().iter().map(|object| describe(py, &frame, object));
        dict.set_item("objects", PyList::new(py, objects.collect::<PyResult<Vec<_>>>()?)?)?;
        Ok(dict)
    }

    #[getter]
    fn phase(&self, py: Python<'_>) -> PyResult<&'static str> {
        self.held(py)?.frame.phase().map(Phase::name).map_err(|error| convert(py, error))
    }

    fn set_phase(&self, py: Python<'_>, phase: &str) -> PyResult<()> {
        let held = self.held(py)?;
        let Some(phase) = Phase::named(phase) else {
            return Err(raise(py, "UsageError", &format!("unknown phase {phase:?} of a state"), ""));
        };
        held.frame.check_writable().map_err(|error| convert(py, error))?;
        held.frame.set_phase(phase);
        Ok(())
    }

    fn verify(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let frame = self.held(py)?.frame;
        py.detach(|| state::verify(&frame)).map_err(|error| convert(py, error))
    }

    fn recover(&self, py: Python<'_>) -> PyResult<u64> {
        self.mutate(py, Segment::recover)
    }

    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.mutate(py, |segment| {
            segment.check_writable()?;
            if segment.changed() {
                segment.commit();
            }
            segment.acknowledge();
            Ok(())
        })
    }

    fn abort(&self, py: Python<'_>) -> PyResult<u64> {
        self.mutate(py, Segment::abort)
    }

    fn table(&self, py: Python<'_>, name: &str) -> PyResult<StateTable> {
        let held = self.held(py)?;
        let table = state::Table::of(&held.frame, name).map_err(|error| convert(py, error))?;
        Ok(StateTable { held, table })
    }

    fn slab(&self, py: Python<'_>, name: &str) -> PyResult<StateSlab> {
        let held = self.held(py)?;
        let slab = state::Slab::of(&held.frame, name).map_err(|error| convert(py, error))?;
        Ok(StateSlab { held, slab })
    }

    fn array(&self, py: Python<'_>, name: &str) -> PyResult<StateArray> {
        let held = self.held(py)?;
        let array = state::Array::of(&held.frame, name).map_err(|error| convert(py, error))?;
        Ok(StateArray { held, array })
    }

    fn save(&self, py: Python<'_>, snapshot: &[u8]) -> PyResult<()> {
        self.mutate(py, |segment| state::save(segment, snapshot))
    }

    fn saved<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = state::saved(&self.held(py)?.frame).map_err(|error| convert(py, error))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn track(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.held(py)?.frame.track(on).map_err(|error| convert(py, error))
    }

    fn tracked(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.held(py)?.frame.tracked())
    }

    fn copy_to(&self, py: Python<'_>, fd: i32) -> PyResult<u64> {
        let frame = self.held(py)?.frame;
        let target: BorrowedFd<'_> = borrow(fd)?;
        py.detach(|| state::copy_to(&frame, target)).map_err(|error| convert(py, error))
    }

    fn close(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

fn object_spec(py: Python<'_>, spec: Spec) -> PyResult<ObjectSpec> {
    let (kind, name, key, item, count, fields) = spec;
    let Some(kind) = Kind::named(&kind) else {
        let hint = "objects are tables, slabs and arrays";
        return Err(raise(py, "UsageError", &format!("{name:?} is of unknown kind {kind:?}"), hint));
    };
    Ok(ObjectSpec { kind, name, key, item, count, fields })
}

fn describe<'py>(py: Python<'py>, frame: &Frame, object: &Object) -> PyResult<Bound<'py, PyDict>> {
    let spec = &object.spec;
    let dict = PyDict::new(py);
    dict.set_item("kind", spec.kind.name())?;
    dict.set_item("name", &spec.name)?;
    dict.set_item("key", spec.key)?;
    dict.set_item("item", spec.item)?;
    dict.set_item("count", spec.count)?;
    dict.set_item("fields", &spec.fields)?;
    dict.set_item("used", frame.used(object))?;
    Ok(dict)
}

fn packed<'py>(py: Python<'py>, numbers: &[u64]) -> PyResult<Bound<'py, PyBytes>> {
    bytes_with(py, numbers.len() * 8, |out| {
        for (number, place) in numbers.iter().zip(out.chunks_exact_mut(8)) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        Ok(())
    })
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct StateTable {
    held: Held,
    table: state::Table,
}

#[pymethods]
impl StateTable {
    #[getter]
    fn key(&self) -> usize {
        self.table.key()
    }

    #[getter]
    fn item(&self) -> usize {
        self.table.item()
    }

    #[getter]
    fn count(&self) -> usize {
        self.table.object().spec.count
    }

    #[getter]
    fn slot(&self) -> usize {
        self.table.slot()
    }

    fn __len__(&self) -> usize {
        self.table.len(&self.held.frame)
    }

    fn get<'py>(&self, py: Python<'py>, key: &[u8]) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let frame = &self.held.frame;
        let Some(slot) = self.table.slot_of(frame, key).map_err(|error| convert(py, error))? else { return Ok(None) };
        let row = bytes_with(py, self.table.item(), |out| {
            self.table.read_row(frame, slot, out);
            Ok(())
        })?;
        Ok(Some(row))
    }

    fn put(&self, py: Python<'_>, key: &[u8], row: &[u8]) -> PyResult<()> {
        self.table.put(&mut self.held.lock(), key, row).map_err(|error| convert(py, error))
    }

    fn delete(&self, py: Python<'_>, key: &[u8]) -> PyResult<bool> {
        self.table.delete(&mut self.held.lock(), key).map_err(|error| convert(py, error))
    }

    fn get_packed(
        &self,
        keys: &Bound<'_, PyAny>,
        rows: &Bound<'_, PyAny>,
        found: &Bound<'_, PyAny>,
    ) -> PyResult<usize> {
        let py = keys.py();
        let (keys, mut rows, mut found) =
            (Buffer::get(keys, false)?, Buffer::get(rows, true)?, Buffer::get(found, true)?);
        self.table
            .get_packed(&self.held.frame, keys.bytes(), rows.bytes_mut(), found.bytes_mut())
            .map_err(|error| convert(py, error))
    }

    fn put_packed(&self, keys: &Bound<'_, PyAny>, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = keys.py();
        let (keys, rows) = (Buffer::get(keys, false)?, Buffer::get(rows, false)?);
        self.table.put_packed(&mut self.held.lock(), keys.bytes(), rows.bytes()).map_err(|error| convert(py, error))
    }

    fn delete_packed(&self, keys: &Bound<'_, PyAny>) -> PyResult<usize> {
        let py = keys.py();
        let keys = Buffer::get(keys, false)?;
        self.table.delete_packed(&mut self.held.lock(), keys.bytes()).map_err(|error| convert(py, error))
    }

    fn slots(&self, start: usize, out: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut out = Buffer::get(out, true)?;
        Ok(self.table.slots(&self.held.frame, start, out.bytes_mut()))
    }

    fn gather(&self, slots: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = slots.py();
        let (slots, mut out) = (Buffer::get(slots, false)?, Buffer::get(out, true)?);
        if slots.bytes().len() % 8 != 0 {
            return Err(raise(py, "UsageError", "slot numbers are 8 bytes each", ""));
        }
        let numbers =
            slots.bytes().chunks_exact(8).map(|chunk| u64::from_ne_bytes(chunk.try_into().unwrap_or_default()));
        self.table.gather(&self.held.frame, numbers, out.bytes_mut()).map_err(|error| convert(py, error))
    }

    fn take_dirty<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        take_dirty(py, &self.held, self.table.object())
    }

    fn view<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.held, self.table.object())
    }
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct StateSlab {
    held: Held,
    slab: state::Slab,
}

#[pymethods]
impl StateSlab {
    #[getter]
    fn item(&self) -> usize {
        self.slab.object().spec.item
    }

    #[getter]
    fn count(&self) -> usize {
        self.slab.object().spec.count
    }

    fn __len__(&self) -> usize {
        self.slab.len(&self.held.frame)
    }

    fn allocate(&self, py: Python<'_>) -> PyResult<usize> {
        self.slab.allocate(&mut self.held.lock()).map_err(|error| convert(py, error))
    }

    fn free(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        self.slab.free(&mut self.held.lock(), index).map_err(|error| convert(py, error))
    }

    fn read<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyBytes>> {
        bytes_with(py, self.slab.object().spec.item, |out| {
            self.slab.read(&self.held.frame, index, 0, out).map_err(|error| convert(py, error))
        })
    }

    #[pyo3(signature = (index, data, offset=0))]
    fn write(&self, py: Python<'_>, index: usize, data: &[u8], offset: usize) -> PyResult<()> {
        self.slab.write(&mut self.held.lock(), index, offset, data).map_err(|error| convert(py, error))
    }

    fn put_at(&self, py: Python<'_>, index: usize, data: &[u8]) -> PyResult<()> {
        self.slab.put_at(&mut self.held.lock(), index, data).map_err(|error| convert(py, error))
    }

    fn live<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        packed(py, &self.slab.live(&self.held.frame))
    }

    fn take_dirty<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        take_dirty(py, &self.held, self.slab.object())
    }

    fn view<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.held, self.slab.object())
    }
}

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct StateArray {
    held: Held,
    array: state::Array,
}

#[pymethods]
impl StateArray {
    #[getter]
    fn item(&self) -> usize {
        self.array.object().spec.item
    }

    #[getter]
    fn count(&self) -> usize {
        self.array.object().spec.count
    }

    #[getter]
    fn per_block(&self) -> usize {
        self.array.object().per_block()
    }

    fn read<'py>(&self, py: Python<'py>, start: usize, count: usize) -> PyResult<Bound<'py, PyBytes>> {
        let range = self.array.range(start, count).map_err(|error| convert(py, error))?;
        bytes_with(py, range.len(), |out| {
            self.array.read(&self.held.frame, start, out).map_err(|error| convert(py, error))
        })
    }

    fn write(&self, start: usize, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = data.py();
        let data = Buffer::get(data, false)?;
        self.array.write(&mut self.held.lock(), start, data.bytes()).map_err(|error| convert(py, error))
    }

    fn edit<'py>(&self, py: Python<'py>, start: usize, count: usize) -> PyResult<Bound<'py, PyAny>> {
        let range = self.array.edit(&mut self.held.lock(), start, count).map_err(|error| convert(py, error))?;
        StateView::of(py, self.held.frame.clone(), range, true)
    }

    fn take_dirty<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        take_dirty(py, &self.held, self.array.object())
    }

    fn view<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.held, self.array.object())
    }
}

fn take_dirty<'py>(py: Python<'py>, held: &Held, object: &Object) -> PyResult<Bound<'py, PyBytes>> {
    held.frame.check_writable().map_err(|error| convert(py, error))?;
    packed(py, &held.frame.take_dirty(object))
}

fn view<'py>(py: Python<'py>, held: &Held, object: &Object) -> PyResult<Bound<'py, PyAny>> {
    StateView::of(py, held.frame.clone(), object.data..object.data + object.data_len, false)
}
