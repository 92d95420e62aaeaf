//! Exclusive use of one half of an endpoint by one thread at a time, checked.
//!
//! One of the few files with `unsafe`: a mutex would make the second thread wait with the GIL held; here it is told.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;

pub struct Half<T> {
    busy: AtomicBool,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: `value` is reached only through a `Guard`, of which `busy` allows one at a time.
unsafe impl<T: Send> Sync for Half<T> {}

impl<T> Half<T> {
    pub fn new(value: T) -> Self {
        Half { busy: AtomicBool::new(false), value: UnsafeCell::new(Some(value)) }
    }

    /// Raises BusyError when another thread is inside, ClosedError when the half was taken away.
    #[inline]
    pub fn enter(&self, py: Python<'_>) -> PyResult<Guard<'_, T>> {
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(super::errors::raise(
                py,
                "BusyError",
                "another thread is using this half of the channel",
                "a channel has one sender and one receiver at a time: open a channel per thread",
            ));
        }
        // SAFETY: `busy` was false: no other guard exists, and none is made until this one is dropped.
        if unsafe { (*self.value.get()).is_none() } {
            self.busy.store(false, Ordering::Release);
            return Err(super::errors::convert(py, crate::error::Error::Closed));
        }
        Ok(Guard { half: self })
    }

    /// Take the value out for good.
    pub fn take(&self, py: Python<'_>) -> PyResult<T> {
        let guard = self.enter(py)?;
        // SAFETY: the guard makes the access exclusive.
        let value = unsafe { (*self.value.get()).take() };
        drop(guard);
        value.ok_or_else(|| super::errors::convert(py, crate::error::Error::Closed))
    }
}

pub struct Guard<'a, T> {
    half: &'a Half<T>,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: exclusive by `busy`; `enter` saw that there is a value.
        unsafe { (*self.half.value.get()).as_ref().unwrap_unchecked() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`.
        unsafe { (*self.half.value.get()).as_mut().unwrap_unchecked() }
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.half.busy.store(false, Ordering::Release);
    }
}
