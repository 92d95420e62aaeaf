//! What can go wrong on a channel. A `Fault` is what a peer did; it names the field that failed its check.

use thiserror::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[repr(u8)]
pub enum Fault {
    #[error("wrong magic in the segment's header")]
    Magic = 1,
    #[error("unknown layout version in the segment's header")]
    Version = 2,
    #[error("the header's geometry is not the one granted")]
    Geometry = 3,
    #[error("the header's generation is not the one granted")]
    Generation = 4,
    #[error("unknown state word")]
    State = 5,
    #[error("ring index out of range")]
    Index = 6,
    #[error("unknown opcode in a descriptor")]
    Opcode = 7,
    #[error("unknown flags in a descriptor")]
    Flags = 8,
    #[error("a descriptor's length exceeds what was published")]
    Length = 9,
    #[error("a descriptor's offset is outside the payload pool")]
    Offset = 10,
    #[error("a payload was given back that was not on loan")]
    Return = 11,
    #[error("the segment was shrunk by its other user")]
    Shrunk = 12,
    #[error("a message came without the right to send")]
    Right = 13,
    #[error("reported by the other end")]
    Reported = 14,
    #[error("a token, or the record of a payload that is out, is out of range")]
    Record = 15,
}

impl Fault {
    /// The fault whose number stands in a state word; an unknown number is itself a fault of the state word.
    pub fn from_number(number: u8) -> Fault {
        use Fault::*;
        [
            Magic, Version, Geometry, Generation, State, Index, Opcode, Flags, Length, Offset, Return, Shrunk, Right,
            Reported, Record,
        ]
        .into_iter()
        .find(|fault| *fault as u8 == number)
        .unwrap_or(Fault::State)
    }
}

#[derive(Debug, Error)]
pub enum Error {
    #[error("no room in the ring or the payload pool")]
    Full,
    #[error("a message of {len} bytes exceeds the {max} that this channel can carry")]
    Size { len: usize, max: usize },
    #[error("the channel was revoked")]
    Revoked,
    #[error("the other end is gone")]
    Gone,
    #[error("the engine behind the channel lost its state, and what was under way with it")]
    Lost,
    #[error("this end is closed")]
    Closed,
    #[error("another process serves the channel now")]
    Dormant,
    #[error("the channel moved to another generation")]
    Moved,
    #[error("the capability of this channel lacks the right to {0}")]
    Denied(&'static str),
    #[error("{0}")]
    Faulted(#[from] Fault),
    #[error("{what}: {source}")]
    Os { what: &'static str, source: std::io::Error },
}

impl Error {
    pub fn os(what: &'static str, errno: rustix::io::Errno) -> Error {
        Error::Os { what, source: errno.into() }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
