//! Loans, payloads and arenas: memory of a channel that Python sees through the buffer protocol.
//!
//! One of the few files with `unsafe`. Memory is handed on (to the peer, or back to it) only when no view of it is left:
//! a received view cannot dangle and a sent one cannot be written any more.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use super::errors::raise;
use super::fast;
use crate::channel::{Core, LoanRef};
use crate::layout::{Header, PoolRef};
use crate::segment::Mapping;

/// A memoryview handed out by `view`, to be released with its owner. Guarded by the GIL, never held over Python code.
type View = std::sync::Mutex<Option<Py<PyMemoryView>>>;

fn take_view(view: &View) -> Option<Py<PyMemoryView>> {
    view.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
}

fn cached_view<'py>(slot: &View, owner: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyMemoryView>> {
    let py = owner.py();
    let cached = slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_ref().map(|view| view.clone_ref(py));
    if let Some(view) = cached {
        return Ok(view.into_bound(py));
    }
    let view = PyMemoryView::from(owner)?;
    *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(view.clone().unbind());
    Ok(view)
}

fn released(py: Python<'_>, what: &str) -> PyErr {
    raise(py, "ReleasedError", what, "take its bytes before releasing it")
}

const LENT: u8 = 0;
/// `send_loan` waits for room: no new views, and nothing that takes the memory back.
const SENDING: u8 = 1;
const DONE: u8 = 2;

/// Writable memory of this end's pool, on its way to be sent.
#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Loan {
    core: Arc<Core>,
    reference: LoanRef,
    state: std::sync::atomic::AtomicU8,
    exports: AtomicUsize,
    view: View,
}

impl Loan {
    pub fn new(core: Arc<Core>, reference: LoanRef) -> Loan {
        Loan {
            core,
            reference,
            state: std::sync::atomic::AtomicU8::new(LENT),
            exports: AtomicUsize::new(0),
            view: View::default(),
        }
    }

    fn lent(&self) -> bool {
        self.state.load(Ordering::Acquire) == LENT
    }

    /// What to send, if this is a loan of that end, unsent, and nobody can write it any more. It stays so until `sent`.
    pub fn begin_sending(&self, py: Python<'_>, core: &Arc<Core>) -> PyResult<LoanRef> {
        if !self.lent() {
            return Err(released(py, "the loan was sent or released already"));
        }
        if !Arc::ptr_eq(core, &self.core) {
            return Err(raise(py, "UsageError", "the loan belongs to another channel", "send it where it was lent"));
        }
        self.release_view(py)?;
        if self.exports.load(Ordering::Acquire) > 0 {
            return Err(PyBufferError::new_err(
                "the loan still has writable views (NumPy arrays or memoryviews): delete them before sending it",
            ));
        }
        self.state.store(SENDING, Ordering::Release);
        Ok(self.reference)
    }

    fn release_view(&self, py: Python<'_>) -> PyResult<()> {
        if let Some(view) = take_view(&self.view) {
            let view = view.into_bound(py);
            // A view of the view (a slice, an array) keeps it alive: the count of exports then tells.
            let _ = view.call_method0("release");
        }
        Ok(())
    }

    /// Whether it went out; otherwise it is lent as before.
    pub fn sent(&self, out: bool) {
        self.state.store(if out { DONE } else { LENT }, Ordering::Release);
    }

    fn give_back(&self) {
        if self.state.compare_exchange(LENT, DONE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.core.cancel_loan(self.reference.place.token);
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[pymethods]
impl Loan {
    #[getter]
    fn view<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyMemoryView>> {
        cached_view(&slf.get().view, slf.as_any())
    }

    /// Give the memory back unsent; idempotent. Raises BufferError while arrays of it are alive.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.release_view(py)?;
        if self.exports.load(Ordering::Acquire) > 0 {
            return Err(PyBufferError::new_err("the loan still has views: delete them before releasing it"));
        }
        self.give_back();
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.reference.len
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyAny>) -> PyResult<()> {
        if !self.lent() {
            return Ok(());
        }
        self.release_view(py)?;
        // Left with views alive: the memory goes back when the loan object itself is dropped, after the last of them.
        if self.exports.load(Ordering::Acquire) == 0 {
            self.give_back();
        }
        Ok(())
    }

    // SAFETY: Python calls the pair as the buffer protocol says.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let Some(pool) = this.core.own_pool().filter(|_| this.lent()) else {
            return Err(released(slf.py(), "the loan was sent or released already"));
        };
        let place = pool.base().wrapping_add(this.reference.place.offset as usize);
        // SAFETY: the allocation lies inside the pool, which `core` keeps mapped as long as the exporting object lives.
        unsafe { fast::export(slf.clone().into_any(), view, flags, place, this.reference.len, false)? };
        this.exports.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    // SAFETY: as above.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The arena of a channel. It stays mapped as long as there is a view of it, whatever becomes of the channel.
#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Arena {
    core: Arc<Core>,
}

impl Arena {
    pub fn view<'py>(py: Python<'py>, core: &Arc<Core>) -> PyResult<Option<Bound<'py, PyMemoryView>>> {
        if core.arena().is_none() {
            return Ok(None);
        }
        let arena = Bound::new(py, Arena { core: core.clone() })?;
        PyMemoryView::from(arena.as_any()).map(Some)
    }
}

#[pymethods]
impl Arena {
    // SAFETY: Python calls the pair as the buffer protocol says.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let Some(arena) = slf.get().core.arena() else {
            return Err(PyBufferError::new_err("the channel has no arena"));
        };
        // SAFETY: all of a mapping that `core` keeps as long as the exporting object lives.
        unsafe { fast::export(slf.clone().into_any(), view, flags, arena.base(), arena.len(), false) }
    }

    // SAFETY: as above; there is nothing to give back.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

enum Memory {
    Pooled { core: Arc<Core>, place: PoolRef },
    Inline(Box<[u8]>),
}

/// A received message in place, read-only.
#[pyclass(frozen, module = "snap.dataplane._native")]
pub struct Payload {
    memory: Memory,
    len: usize,
    #[pyo3(get)]
    tag: u64,
    released: AtomicBool,
    given_back: AtomicBool,
    exports: AtomicUsize,
    view: View,
}

impl Payload {
    fn new(memory: Memory, len: usize, tag: u64) -> Payload {
        Payload {
            memory,
            len,
            tag,
            released: AtomicBool::new(false),
            given_back: AtomicBool::new(false),
            exports: AtomicUsize::new(0),
            view: View::default(),
        }
    }

    pub fn pooled(core: Arc<Core>, header: Header, place: PoolRef) -> Payload {
        Payload::new(Memory::Pooled { core, place }, header.len, header.tag)
    }

    pub fn inline(tag: u64, bytes: Box<[u8]>) -> Payload {
        let len = bytes.len();
        Payload::new(Memory::Inline(bytes), len, tag)
    }

    /// To the sender, once, when it was released and the last view is gone.
    fn give_back(&self) {
        if let Memory::Pooled { core, place } = &self.memory {
            if !self.given_back.swap(true, Ordering::AcqRel) {
                core.give_back(place.token);
            }
        }
    }

    fn place(&self) -> *mut u8 {
        match &self.memory {
            Memory::Pooled { core, place } => {
                let base = core.peer_pool().map_or(std::ptr::null_mut(), Mapping::base);
                base.wrapping_add(place.offset as usize)
            }
            Memory::Inline(bytes) => bytes.as_ptr().cast_mut(),
        }
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[pymethods]
impl Payload {
    #[getter]
    fn view<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyMemoryView>> {
        cached_view(&slf.get().view, slf.as_any())
    }

    /// Idempotent. Views taken by `view` raise from now on; arrays stay valid and delay only the giving back.
    fn release(&self, py: Python<'_>) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(view) = take_view(&self.view) {
            let _ = view.bind(py).call_method0("release");
        }
        if self.exports.load(Ordering::Acquire) == 0 {
            self.give_back();
        }
    }

    fn __len__(&self) -> usize {
        self.len
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        if self.released.load(Ordering::Acquire) {
            return Err(released(py, "the payload was released"));
        }
        fast::bytes_with(py, self.len, |out| {
            match &self.memory {
                Memory::Pooled { core, place } => {
                    if let Some(pool) = core.peer_pool() {
                        pool.read(place.offset as usize, out);
                    }
                }
                Memory::Inline(bytes) => out.copy_from_slice(bytes),
            }
            Ok(())
        })
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyAny>) {
        self.release(py);
    }

    // SAFETY: Python calls the pair as the buffer protocol says.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        if this.released.load(Ordering::Acquire) {
            return Err(released(slf.py(), "the payload was released"));
        }
        // SAFETY: offset and length were checked against the pool when the message was received; the pool stays mapped, and
        // the memory out of the sender's hands, as long as the exporting object lives.
        unsafe { fast::export(slf.clone().into_any(), view, flags, this.place(), this.len, true)? };
        this.exports.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    // SAFETY: as above.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        if self.exports.fetch_sub(1, Ordering::AcqRel) == 1 && self.released.load(Ordering::Acquire) {
            self.give_back();
        }
    }
}
