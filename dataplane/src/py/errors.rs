//! Errors of the crate as the exceptions of `snap.dataplane.errors`.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyModule;

use crate::error::Error;

static ERRORS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    let module = ERRORS.get_or_try_init(py, || PyModule::import(py, "snap.dataplane.errors").map(Bound::unbind))?;
    module.bind(py).getattr(name)
}

/// Whether `error` is of the class `name` of `snap.dataplane.errors`.
#[cold]
pub fn is_a(py: Python<'_>, error: &PyErr, name: &str) -> bool {
    class(py, name).is_ok_and(|class| error.matches(py, class).unwrap_or(false))
}

/// Make the exception `name` of `snap.dataplane.errors`.
#[cold]
pub fn raise(py: Python<'_>, name: &str, message: &str, hint: &str) -> PyErr {
    match class(py, name).and_then(|class| class.call1((message, hint))) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

#[cold]
pub fn convert(py: Python<'_>, error: Error) -> PyErr {
    let text = error.to_string();
    let (class, hint) = match error {
        Error::Full => ("FullError", "wait by giving a timeout, or receive more often at the other end"),
        Error::Size { .. } => ("MessageSizeError", "open the channel with a larger payload pool, or send in parts"),
        Error::Revoked => ("RevokedError", "ask for a new grant: `snapctl cap why` tells which rule applies"),
        Error::Gone => ("PeerGoneError", "Channel.reopen() gets a fresh channel when the service is back"),
        Error::Lost => ("StateLostError", "Channel.reopen() gets a fresh channel"),
        Error::Closed => ("ClosedError", ""),
        Error::Dormant => ("BusyError", "it can be used after `Ledger.take`"),
        Error::Moved => ("PeerGoneError", "Channel.reopen() gets a channel to the new generation"),
        Error::Denied(_) => ("DeniedError", "the policy decides the rights of a channel"),
        Error::Faulted(_) => ("FaultedError", "the channel is closed for good; open a new one"),
        Error::Os { .. } => ("ResourceError", "see `snapctl doctor` for the limits of this machine"),
    };
    raise(py, class, &text, hint)
}

#[cold]
pub fn deadline(py: Python<'_>, what: &str) -> PyErr {
    raise(py, "DeadlineError", what, "")
}
