//! The hot path of Snap: segments, rings, doorbells, channels, and the engine runtime.
//!
//! `ring` knows only atomics and a `Memory`, so that loom can check it; `channel` puts it on shared memory; `engine`
//! runs native engines; `py` is the Python face. `unsafe` lives in `segment`, `ringmem`, `py::buffer`, `py::view` and
//! `py::fast`.

pub mod error;
pub mod layout;
pub mod ring;
mod sync;

#[cfg(not(loom))]
pub mod bell;
#[cfg(not(loom))]
pub mod channel;
#[cfg(not(loom))]
pub mod core;
#[cfg(not(loom))]
pub mod engine;
#[cfg(not(loom))]
pub mod gate;
#[cfg(not(loom))]
pub mod poller;
#[cfg(not(loom))]
pub mod pool;
#[cfg(not(loom))]
mod ringmem;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
pub mod state;
#[cfg(not(loom))]
pub mod stats;

#[cfg(all(feature = "python", not(loom)))]
mod py;
