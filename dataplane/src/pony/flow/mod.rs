//! The flow layer: single packets, reliably, between two engines. Sans-I/O: bytes and time in, headers and deadlines out;
//! it knows nothing of what the packets carry, and nothing here outlives the engine's process.
//!
//! A flow forgets nothing that matters when its engine dies: an engine acknowledges only what is permanent with it, and says
//! with a new `epoch` that it knows nothing any more. Its peer then sends again what was not acknowledged, and the layer
//! above knows a repetition when it sees one.

pub mod congestion;
mod flight;
#[allow(clippy::module_inception)] // The flow of the flow layer.
mod flow;
mod path;
pub mod rtt;
mod swift;
mod timely;
mod wheel;
mod window;
pub mod wire;

pub use congestion::{Algorithm, Congestion};
pub use flow::{Flow, PeerError, Receipt, Send, Settings};
pub use wheel::Wheel;
pub use wire::{Header, Version};

/// Nanoseconds of the caller's clock.
pub type Nanos = u64;

pub const MICROSECOND: Nanos = 1_000;
pub const MILLISECOND: Nanos = 1_000_000;
