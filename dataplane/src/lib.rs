//! The hot path of Snap: segments, rings, doorbells, channels, and the engine runtime.
//!
//! `ring` knows only atomics and a `Memory`, so that loom can check it; `channel` puts it on shared memory; `engine`
//! runs native engines; `state` outlives them, `ledger` makes what they receive, write and send permanent together, and
//! `ownership` says who runs one; `py` is the Python face. `unsafe` lives in `segment`, `ringmem`, `ownership`,
//! `pony::port::sys`,
//! `pony::port::wire`, `py::buffer`, `py::endpoint`, `py::fast`, `py::half` and `py::view`.

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
pub mod ledger;
#[cfg(not(loom))]
pub mod ownership;
#[cfg(not(loom))]
pub mod poller;
#[cfg(not(loom))]
pub mod pony;
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
