//! A fuse for tests: the process "dies" at the n-th store to a state, in the middle of it when it is a copy.

use std::cell::Cell;

/// What a death unwinds with.
pub struct Died;

thread_local! {
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    static TEAR: Cell<u64> = const { Cell::new(0) };
}

/// Die at the store after `stores` others; `tear` chooses how much of a copy is done by then.
pub fn light(stores: u64, tear: u64) {
    LEFT.set(Some(stores));
    TEAR.set(tear);
}

pub fn put_out() {
    LEFT.set(None);
}

/// Before a store of `len` bytes (0: an atomic word, which dies whole): how many of them are still to be done.
pub fn burn(len: usize) -> Option<usize> {
    let left = LEFT.get()?;
    if left > 0 {
        LEFT.set(Some(left - 1));
        return None;
    }
    if len == 0 {
        die();
    }
    Some((TEAR.get() % (len as u64 + 1)) as usize)
}

pub fn die() -> ! {
    put_out();
    std::panic::resume_unwind(Box::new(Died));
}
