//! One direction of a channel inside a mapped segment: addresses worked out once, so that a message costs none.
//!
//! One of the few files with `unsafe`: it is on the path of every message, where bounds are the ring's own mask.

use std::ptr;
use std::sync::Arc;

use crate::layout::{self, SLOT};
use crate::ring::Memory;
use crate::segment::Mapping;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

pub struct RingMemory {
    /// Keeps what the pointers point into mapped.
    _map: Arc<Mapping>,
    capacity: u64,
    tail: *const AtomicU64,
    head: *const AtomicU64,
    data_armed: *const AtomicU32,
    room_armed: *const AtomicU32,
    slots: *mut u8,
}

// SAFETY: the pointers lead into `_map`, which lives as long; control words are atomics, and a slot is accessed only by
// the side to which the ring discipline gives it.
unsafe impl Send for RingMemory {}
// SAFETY: as above.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    /// `map` is at least `ring_bytes(slots)` long: `Channel::new` mapped it so.
    pub fn new(map: &Arc<Mapping>, slots: u32, direction: usize) -> RingMemory {
        assert!(layout::slots_valid(slots) && map.len() >= layout::ring_bytes(slots));
        let control = layout::OFF_DIRECTION[direction];
        RingMemory {
            capacity: u64::from(slots),
            tail: map.u64_at(control + layout::DIR_TAIL),
            head: map.u64_at(control + layout::DIR_HEAD),
            data_armed: map.u32_at(control + layout::DIR_DATA_ARMED),
            room_armed: map.u32_at(control + layout::DIR_ROOM_ARMED),
            slots: map.base().wrapping_add(layout::slots_offset(slots, direction)),
            _map: map.clone(),
        }
    }

    /// The word `steps` after an armed word, on the same line: its announcement.
    #[inline]
    fn word(&self, armed: *const AtomicU32, steps: usize) -> &AtomicU32 {
        // SAFETY: armed words begin a cache line of the control area, which lies in `_map`; `steps` is 0 or 1.
        unsafe { &*armed.add(steps) }
    }

    fn bytes(&self) -> usize {
        self.capacity as usize * SLOT
    }
}

impl Memory for RingMemory {
    #[inline]
    fn data_sleepy(&self) -> bool {
        self.word(self.data_armed, 1).load(Ordering::Relaxed) != 0
    }
    #[inline]
    fn room_sleepy(&self) -> bool {
        self.word(self.room_armed, 1).load(Ordering::Relaxed) != 0
    }
    fn announce_data(&self, sleepy: bool) {
        self.word(self.data_armed, 1).store(u32::from(sleepy), Ordering::Relaxed);
    }
    fn announce_room(&self, sleepy: bool) {
        self.word(self.room_armed, 1).store(u32::from(sleepy), Ordering::Relaxed);
    }

    #[inline]
    fn expect_write(&self, index: u64) {
        let place = self.slots.wrapping_add((index & (self.capacity - 1)) as usize * SLOT);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch changes nothing that a program can see, whatever the address.
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) place, options(nostack, preserves_flags));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = place;
    }

    #[inline]
    fn expect_read(&self, index: u64) {
        let place = self.slots.wrapping_add((index & (self.capacity - 1)) as usize * SLOT);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as in `expect_write`.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(place.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = place;
    }

    #[inline]
    fn capacity(&self) -> u64 {
        self.capacity
    }
    #[inline]
    fn tail(&self) -> &AtomicU64 {
        // SAFETY: points into `_map`, aligned and in bounds by `new`.
        unsafe { &*self.tail }
    }
    #[inline]
    fn head(&self) -> &AtomicU64 {
        // SAFETY: as `tail`.
        unsafe { &*self.head }
    }
    #[inline]
    fn data_armed(&self) -> &AtomicU32 {
        // SAFETY: as `tail`.
        unsafe { &*self.data_armed }
    }
    #[inline]
    fn room_armed(&self) -> &AtomicU32 {
        // SAFETY: as `tail`.
        unsafe { &*self.room_armed }
    }

    #[inline]
    fn write_prefix(&self, index: u64, words: [u64; 2]) {
        let place = self.slots.wrapping_add((index & (self.capacity - 1)) as usize * SLOT).cast::<u64>();
        // SAFETY: the masked index stays in the slot area; slots are 64-byte aligned in a page-aligned mapping.
        // Atomics, as a hostile peer may write the same words at any time.
        unsafe {
            AtomicU64::from_ptr(place).store(words[0], Ordering::Relaxed);
            AtomicU64::from_ptr(place.add(1)).store(words[1], Ordering::Relaxed);
        }
    }

    #[inline]
    fn read_prefix(&self, index: u64) -> [u64; 2] {
        let place = self.slots.wrapping_add((index & (self.capacity - 1)) as usize * SLOT).cast::<u64>();
        // SAFETY: as in `write_prefix`.
        unsafe {
            [
                AtomicU64::from_ptr(place).load(Ordering::Relaxed),
                AtomicU64::from_ptr(place.add(1)).load(Ordering::Relaxed),
            ]
        }
    }

    #[inline]
    fn write(&self, position: u64, bytes: &[u8]) {
        let size = self.bytes();
        assert!(bytes.len() <= layout::INLINE_MAX);
        let start = position as usize & (size - 1);
        let first = bytes.len().min(size - start);
        // SAFETY: `start + first <= size`, and the rest (less than INLINE_MAX, itself less than the smallest ring) goes to
        // the start of the area; the producer owns these slots until it publishes them.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.slots.add(start), first);
            if first < bytes.len() {
                ptr::copy_nonoverlapping(bytes.as_ptr().add(first), self.slots, bytes.len() - first);
            }
        }
    }

    #[inline]
    fn read(&self, position: u64, out: &mut [u8]) {
        let size = self.bytes();
        assert!(out.len() <= layout::INLINE_MAX);
        let start = position as usize & (size - 1);
        let first = out.len().min(size - start);
        // SAFETY: as in `write`; a hostile producer may write meanwhile, which changes only the bytes that are copied.
        unsafe {
            ptr::copy_nonoverlapping(self.slots.add(start), out.as_mut_ptr(), first);
            if first < out.len() {
                ptr::copy_nonoverlapping(self.slots, out.as_mut_ptr().add(first), out.len() - first);
            }
        }
    }
}
