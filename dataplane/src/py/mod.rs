//! The Python face: `snap.dataplane._native`. Typed in `_native.pyi`.

mod buffer;
mod endpoint;
mod errors;
mod fast;
mod half;
mod kernel;
mod ledger;
mod measure;
mod runtime;
mod state;
mod view;
mod waiting;

use std::os::fd::IntoRawFd;

use pyo3::prelude::*;

use crate::pony::port::{wire, PortError};
use crate::{gate, layout, stats};

#[pyfunction]
fn ring_bytes(slots: u32) -> PyResult<usize> {
    if !layout::slots_valid(slots) {
        let text = format!("slots must be a power of two from {} to {}", layout::MIN_SLOTS, layout::MAX_SLOTS);
        return Err(pyo3::exceptions::PyValueError::new_err(text));
    }
    Ok(layout::ring_bytes(slots))
}

#[pyfunction]
fn make_wire(frames: u32, mtu: u32) -> PyResult<i32> {
    let Some(shape) = wire::Shape::new(frames, mtu) else {
        let text = format!("there is no wire of {frames} frames of {mtu} bytes");
        return Err(pyo3::exceptions::PyValueError::new_err(text));
    };
    match wire::make(shape) {
        Ok(fd) => Ok(fd.into_raw_fd()),
        Err(PortError::Os { source, .. }) => Err(source.into()),
        Err(error) => Err(pyo3::exceptions::PyOSError::new_err(error.to_string())),
    }
}

#[pyfunction]
fn engines() -> Vec<&'static str> {
    crate::engine::NAMES.to_vec()
}

#[pyfunction]
fn install_sigbus_guard() {
    crate::segment::install_guard();
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    crate::segment::install_guard();
    module.add("SPIN", 0)?;
    module.add("ADAPTIVE", 1)?;
    module.add("BLOCK", 2)?;
    module.add("CLIENT", 0)?;
    module.add("SERVER", 1)?;
    module.add("RIGHT_SEND", crate::channel::RIGHT_SEND)?;
    module.add("RIGHT_RECV", crate::channel::RIGHT_RECV)?;
    module.add("DESCRIPTOR_BYTES", layout::SLOT)?;
    module.add("INLINE_MAX", layout::INLINE_MAX)?;
    module.add("LAYOUT_VERSION", layout::LAYOUT_VERSION)?;
    module.add("GATE_LINES", gate::LINES)?;
    module.add("GATE_BYTES", gate::BYTES)?;
    module.add("STATS_LINES", stats::LINES)?;
    module.add("STATS_BYTES", stats::BYTES)?;
    module.add_class::<endpoint::Endpoint>()?;
    module.add_class::<buffer::Loan>()?;
    module.add_class::<buffer::Payload>()?;
    module.add_class::<kernel::ChannelControl>()?;
    module.add_class::<kernel::Gate>()?;
    module.add_class::<kernel::StatsPage>()?;
    module.add_class::<state::State>()?;
    module.add_class::<state::StateTable>()?;
    module.add_class::<state::StateSlab>()?;
    module.add_class::<state::StateArray>()?;
    module.add_class::<ledger::Ledger>()?;
    module.add_class::<ledger::Ownership>()?;
    module.add_class::<runtime::Poller>()?;
    module.add_class::<runtime::Worker>()?;
    module.add_function(wrap_pyfunction!(ring_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(make_wire, module)?)?;
    module.add_function(wrap_pyfunction!(engines, module)?)?;
    module.add_function(wrap_pyfunction!(runtime::engine_schema, module)?)?;
    module.add_function(wrap_pyfunction!(runtime::engine_convert, module)?)?;
    module.add_function(wrap_pyfunction!(install_sigbus_guard, module)?)?;
    module.add_function(wrap_pyfunction!(measure::measure_line, module)?)?;
    module.add_function(wrap_pyfunction!(measure::measure_check, module)?)
}
