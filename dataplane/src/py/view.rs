//! Memory of a state segment that Python sees through the buffer protocol.
//!
//! One of the few files with `unsafe`. A view keeps the mapping alive; what is in it may change with every poll.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::Arc;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;

use super::fast;
use crate::state::Frame;

#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct StateView {
    frame: Arc<Frame>,
    range: Range<usize>,
    writable: bool,
}

impl StateView {
    /// A memoryview of a range that lies in the segment; `writable` only of a state that was opened so.
    pub fn of(py: Python<'_>, frame: Arc<Frame>, range: Range<usize>, writable: bool) -> PyResult<Bound<'_, PyAny>> {
        assert!(range.start <= range.end && range.end <= frame.mapping().len() && (frame.writable() || !writable));
        let view = Bound::new(py, StateView { frame, range, writable })?;
        Ok(PyMemoryView::from(view.as_any())?.into_any())
    }
}

#[pymethods]
impl StateView {
    // SAFETY: Python calls the pair as the buffer protocol says.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let place = this.frame.mapping().base().wrapping_add(this.range.start);
        // SAFETY: the range was checked against the mapping, which lives as long as the exporting object.
        unsafe { fast::export(slf.clone().into_any(), view, flags, place, this.range.len(), !this.writable) }
    }

    // SAFETY: as above; there is nothing to give back.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}
