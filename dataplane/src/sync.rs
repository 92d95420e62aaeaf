//! Atomics, by loom when the rings are model-checked (`--cfg loom`) and by the machine otherwise; and the pair of fences
//! between "publish, then look whether somebody sleeps" and "announce sleep, then look whether something was published".
//!
//! While both sides poll, a fence with every message would hold the publisher until its stores have reached the other core
//! (a whole line transfer) for nothing. So a side that begins to sleep announces that in a word of its own and calls
//! `membarrier(2)`, which makes every running thread of a registered process pass a full barrier; from then on its peer
//! fences, and it needs only an ordinary fence itself, until it has polled for long and takes the announcement back.

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[cfg(not(loom))]
pub use self::asymmetric::{full_fence, light_fence, prepare, settle};
#[cfg(loom)]
pub use self::symmetric::{full_fence, light_fence, settle};

#[cfg(loom)]
mod symmetric {
    use loom::sync::atomic::{fence, Ordering};

    pub fn light_fence() {
        fence(Ordering::SeqCst);
    }

    pub fn full_fence() {
        fence(Ordering::SeqCst);
    }

    pub fn settle(_announced: bool) {
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

    /// In place of the light one where the sleeper has announced itself.
    #[inline]
    pub fn full_fence() {
        fence(Ordering::SeqCst);
    }

    /// Between raising an armed word and the last look before sleep; `announced` when the other side could not know yet
    /// that it has to fence.
    pub fn settle(announced: bool) {
        if !announced || membarrier(MembarrierCommand::GlobalExpedited).is_err() {
            fence(Ordering::SeqCst);
        }
    }
}
