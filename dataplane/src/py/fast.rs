//! Raw CPython calls where the safe ones cost too much per message: uninitialised `bytes`, untyped buffers.
//!
//! One of the few files with `unsafe`.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// A new `bytes` of `len`, filled by `fill`, which must write every byte (or fail).
#[inline]
pub fn bytes_with<'py>(
    py: Python<'py>,
    len: usize,
    fill: impl FnOnce(&mut [u8]) -> PyResult<()>,
) -> PyResult<Bound<'py, PyBytes>> {
    // SAFETY: a null source makes an uninitialised object of `len` bytes, which nobody else has seen; u8 has no invalid
    // values, and on failure the object is dropped unread.
    unsafe {
        let object = ffi::PyBytes_FromStringAndSize(ptr::null(), len as ffi::Py_ssize_t);
        let bytes = Bound::from_owned_ptr_or_err(py, object)?;
        let place = ffi::PyBytes_AsString(bytes.as_ptr()).cast::<u8>();
        fill(std::slice::from_raw_parts_mut(place, len))?;
        Ok(bytes.cast_into_unchecked())
    }
}

/// A contiguous buffer of any Python object, released on drop (with the GIL).
pub struct Buffer {
    view: Box<ffi::Py_buffer>,
}

impl Buffer {
    /// Raises BufferError or TypeError as the object does.
    pub fn get(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Buffer> {
        let flags: c_int = if writable { ffi::PyBUF_WRITABLE } else { ffi::PyBUF_SIMPLE };
        let mut view = Box::new(MaybeUninit::<ffi::Py_buffer>::zeroed());
        // SAFETY: a zeroed Py_buffer is what PyObject_GetBuffer expects; it is initialised when the call returns 0.
        unsafe {
            if ffi::PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), flags) != 0 {
                return Err(PyErr::fetch(object.py()));
            }
            Ok(Buffer { view: Box::from_raw(Box::into_raw(view).cast()) })
        }
    }

    pub fn bytes(&self) -> &[u8] {
        if self.view.buf.is_null() {
            return &[];
        }
        // SAFETY: PyBUF_SIMPLE promises `len` contiguous bytes for as long as the view is held. Another thread may write
        // them meanwhile (a bytearray): we only ever copy them.
        unsafe { std::slice::from_raw_parts(self.view.buf.cast(), self.view.len as usize) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.view.buf.is_null() {
            return &mut [];
        }
        // SAFETY: as in `bytes`; the view was asked for as writable.
        unsafe { std::slice::from_raw_parts_mut(self.view.buf.cast(), self.view.len as usize) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        Python::attach(|_| {
            // SAFETY: got by PyObject_GetBuffer, released once, with the GIL held.
            unsafe { ffi::PyBuffer_Release(&mut *self.view) }
        });
    }
}

/// Fill `view` for an object that lends `len` bytes at `place`. Raises BufferError when a writable view of read-only memory
/// is asked for.
///
/// # Safety
/// `view` is the pointer that Python passed to `__getbuffer__`; `place` stays valid until `__releasebuffer__`.
pub unsafe fn export(
    owner: Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    flags: c_int,
    place: *mut u8,
    len: usize,
    readonly: bool,
) -> PyResult<()> {
    // SAFETY: the caller's promise; PyBuffer_FillInfo takes a new reference to `owner`.
    let status = unsafe {
        ffi::PyBuffer_FillInfo(view, owner.as_ptr(), place.cast(), len as ffi::Py_ssize_t, c_int::from(readonly), flags)
    };
    if status != 0 {
        return Err(PyErr::fetch(owner.py()));
    }
    Ok(())
}
