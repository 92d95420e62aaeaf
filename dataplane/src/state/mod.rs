//! An engine's state in a segment that outlives its process.
//!
//! `Frame` is the mapped segment: geometry and header words, safe to look at from any thread. `Segment` is the one
//! writer's half: every mutation goes in place after its old bytes went to the undo log, and `commit` is one store.
//! Tables, slabs and arrays are plain descriptions (`Table` and so on) whose methods take the segment.
//!
//! Only the death of a process matters here, never that of the machine: stores that were executed are in memory, so
//! program order is all that recovery needs, and compiler fences are enough to keep it. Bytes are hostile: geometry
//! is read once, checked, and kept in private memory; everything else is checked where it is used.

mod array;
mod copy;
mod frame;
#[cfg(test)]
mod fuse;
mod layout;
mod segment;
mod slab;
mod snapshot;
mod table;
#[cfg(test)]
mod tests;
mod verify;

use thiserror::Error;

pub use array::Array;
pub use copy::copy_to;
pub use frame::{Frame, Header, Phase, Word};
pub use layout::{
    Kind, Object, ObjectSpec, Schema, CURSOR_LINES, CURSOR_WORDS, LAYOUT, LOG_BYTES, MAGIC, MAX_OBJECTS, MIN_BYTES,
};
pub use segment::{Segment, Shared};
pub use slab::Slab;
pub use snapshot::{save, saved};
pub use table::Table;
pub use verify::verify;

#[derive(Debug, Error)]
pub enum StateError {
    #[error("{0}")]
    Damaged(String),
    #[error("{0}")]
    Schema(String),
    #[error("{0}")]
    Full(String),
    #[error("{0}")]
    Usage(String),
    #[error("{what}: {source}")]
    Os { what: &'static str, source: std::io::Error },
}

impl StateError {
    /// The name of this error for programs, as `dataplane/errors.py` has it.
    pub fn code(&self) -> &'static str {
        match self {
            StateError::Damaged(_) => "state_damaged",
            StateError::Schema(_) => "schema",
            StateError::Full(_) => "state_full",
            StateError::Usage(_) => "usage",
            StateError::Os { .. } => "resources",
        }
    }

    fn os(what: &'static str, errno: rustix::io::Errno) -> StateError {
        StateError::Os { what, source: errno.into() }
    }
}

pub type Result<T> = std::result::Result<T, StateError>;

#[cold]
fn damaged<T>(what: impl Into<String>) -> Result<T> {
    Err(StateError::Damaged(what.into()))
}

#[cold]
fn usage<T>(what: impl Into<String>) -> Result<T> {
    Err(StateError::Usage(what.into()))
}

#[cold]
fn full<T>(what: impl Into<String>) -> Result<T> {
    Err(StateError::Full(what.into()))
}
