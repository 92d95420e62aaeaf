//! Atomics, by loom when the rings are model-checked (`--cfg loom`) and by the machine otherwise; and the pair of fences
//! between "publish, then look whether somebody sleeps" and "announce sleep, then look whether something was published".
//!
//! Publishing happens with every message, sleeping hardly ever, so the fences are asymmetric where the system can do it:
//! the sleeper's `membarrier(2)` makes every running thread of a registered process pass a full barrier, and the publisher
//! needs none of its own, which would hold it until its stores have reached the other core (a whole line transfer).

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[cfg(not(loom))]
pub use self::asymmetric::{heavy_fence, light_fence, prepare};
#[cfg(loom)]
pub use self::symmetric::{heavy_fence, light_fence};

#[cfg(loom)]
mod symmetric {
    use loom::sync::atomic::{fence, Ordering};

    pub fn light_fence() {
        fence(Ordering::SeqCst);
    }

    pub fn heavy_fence() {
        fence(Ordering::SeqCst);
    }
}

#[cfg(not(loom))]
mod asymmetric {
    use std::sync::atomic::{compiler_fence, fence, AtomicBool, Ordering};
    use std::sync::Once;

    use rustix::thread::{membarrier, MembarrierCommand};

    /// Whether this process is registered. Both ends run on one operating system, so they decide alike; one that a seccomp
    /// filter keeps from registering costs its peer a late wake-up, bounded by `bell::SLICE`.
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    static PREPARE: Once = Once::new();

    /// Register the process, once, before its first channel.
    pub fn prepare() {
        PREPARE.call_once(|| {
            let registered = membarrier(MembarrierCommand::RegisterGlobalExpedited).is_ok();
            REGISTERED.store(registered, Ordering::Release);
        });
    }

    /// Between a publication and the look at the armed word.
    #[inline]
    pub fn light_fence() {
        if REGISTERED.load(Ordering::Relaxed) {
            compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    /// Between raising an armed word and the last look before sleep.
    pub fn heavy_fence() {
        if !REGISTERED.load(Ordering::Relaxed) || membarrier(MembarrierCommand::GlobalExpedited).is_err() {
            fence(Ordering::SeqCst);
        }
    }
}
