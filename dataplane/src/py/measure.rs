//! Two figures of the machine that a benchmark is read against: the cache line between two cores, and the checks.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pyo3::prelude::*;
use rustix::thread::{sched_setaffinity, CpuSet};

use crate::layout;

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    // Not permitted or no such core: the figure is then of wherever the threads run.
    let _ = sched_setaffinity(None, &set);
}

/// Median round trip of one cache line between two threads pinned to two cores, in nanoseconds.
#[pyfunction]
#[pyo3(signature = (cpu_a, cpu_b, rounds=20000))]
pub fn measure_line(py: Python<'_>, cpu_a: usize, cpu_b: usize, rounds: u64) -> f64 {
    py.detach(|| {
        #[repr(align(128))]
        struct Line(AtomicU64);
        let line = Line(AtomicU64::new(0));
        let mut times = Vec::with_capacity(rounds as usize);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(cpu_b);
                for round in 0..rounds {
                    while line.0.load(Ordering::Acquire) != 2 * round + 1 {
                        std::hint::spin_loop();
                    }
                    line.0.store(2 * round + 2, Ordering::Release);
                }
            });
            scope.spawn(|| {
                pin(cpu_a);
                for round in 0..rounds {
                    let begin = Instant::now();
                    line.0.store(2 * round + 1, Ordering::Release);
                    while line.0.load(Ordering::Acquire) != 2 * round + 2 {
                        std::hint::spin_loop();
                    }
                    times.push(begin.elapsed().as_nanos() as f64);
                }
            });
        });
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(0.0)
    })
}

/// Mean cost, in nanoseconds, of what a message is checked for beyond moving it: gate, state word, faults, rights (as
/// `Core::check` does), and the descriptor's prefix.
#[pyfunction]
#[pyo3(signature = (endpoint, rounds=1_000_000))]
pub fn measure_check(py: Python<'_>, endpoint: &Bound<'_, super::endpoint::Endpoint>, rounds: u64) -> PyResult<f64> {
    let core = endpoint.get().core().clone();
    let words = layout::emit(64, 7, false);
    let elapsed = py.detach(|| {
        let begin = Instant::now();
        for _ in 0..rounds {
            let _ = black_box(black_box(&core).check());
            let _ = black_box(layout::parse(black_box(words), black_box(2)));
        }
        begin.elapsed()
    });
    Ok(elapsed.as_nanos() as f64 / rounds.max(1) as f64)
}
