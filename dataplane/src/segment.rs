//! Mapped segments, and the guard that turns a SIGBUS in one of them into a fault of its channel.
//!
//! One of the few files with `unsafe`. A POSIX shared-memory object can be shrunk under its other user (a sealed
//! memfd cannot); touching the lost pages raises SIGBUS. The guard then lays zero pages over the whole mapping,
//! so that the interrupted access completes, and marks the mapping as shrunk: the next burst sees the mark and
//! faults. The same method as libwayland's `wl_shm_buffer_begin_access`.

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

use crate::error::{Error, Fault, Result};

/// Memory shared with another process. Dropping it unmaps.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    guard: usize,
}

// SAFETY: the mapping is plain memory owned by this value; every access goes through the methods below, whose
// callers own the ranges they touch (ring discipline) or use atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&self` methods use atomics or raw copies into ranges that the ring discipline gives to one side.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `len` bytes of `fd`. Fails with `Fault::Geometry` when the segment is smaller than promised.
    pub fn new(fd: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Mapping> {
        install_guard_once();
        let stat = rustix::fs::fstat(fd).map_err(|errno| Error::os("fstat of a segment", errno))?;
        if len == 0 || (stat.st_size as u64) < len as u64 {
            return Err(Error::Faulted(Fault::Geometry));
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address that the kernel chooses; nothing else refers to it.
        let base = unsafe { mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, fd, 0) }
            .map_err(|errno| Error::os("mmap of a segment", errno))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(Error::Faulted(Fault::Geometry))?;
        let guard = register(base.as_ptr() as usize, len)
            .ok_or_else(|| Error::os("too many mapped segments", rustix::io::Errno::NOMEM));
        match guard {
            Ok(guard) => Ok(Mapping { base, len, guard }),
            Err(error) => {
                // SAFETY: the mapping made above, which nobody has seen yet.
                let _ = unsafe { munmap(base.as_ptr().cast(), len) };
                Err(error)
            }
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the other user of the segment shrank it under us.
    pub fn shrunk(&self) -> bool {
        GUARDS[self.guard].shrunk.load(Ordering::Relaxed)
    }

    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// An atomic word of the mapping. Panics on an offset that the code (never a peer) got wrong.
    #[inline]
    pub fn u32_at(&self, offset: usize) -> &AtomicU32 {
        assert!(offset % 4 == 0 && offset + 4 <= self.len);
        // SAFETY: in bounds and aligned by the assertion; the mapping lives as long as `self`; any bits are a valid u32.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// An atomic double word of the mapping. Panics as `u32_at`.
    #[inline]
    pub fn u64_at(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset + 8 <= self.len);
        // SAFETY: as in `u32_at`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// Copy out of the mapping. Panics on a range that the caller did not check.
    #[inline]
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset <= self.len && out.len() <= self.len - offset);
        // SAFETY: in bounds by the assertion; `out` is private memory, so the ranges do not overlap. A hostile peer may
        // write meanwhile: the bytes are then arbitrary, which every reader of a segment expects.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), out.as_mut_ptr(), out.len()) }
    }

    /// Copy into the mapping, which must be writable. Panics on a range that the caller did not check.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        // SAFETY: as in `read`, the other way; only writable mappings are written (rings, the own pool).
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(offset), bytes.len()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        GUARDS[self.guard].start.store(0, Ordering::Release);
        // SAFETY: made by `new`, unmapped once; all borrows of it have ended with `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        GUARDS[self.guard].taken.store(false, Ordering::Release);
    }
}

/// Counts shrunk mappings: an endpoint looks at this one word per burst, and at its own mappings when it moved.
pub static SHRUNK: AtomicU32 = AtomicU32::new(0);

struct Guard {
    taken: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    shrunk: AtomicBool,
}

const MAX_MAPPINGS: usize = 16384;
static GUARDS: [Guard; MAX_MAPPINGS] = [const {
    Guard {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        shrunk: AtomicBool::new(false),
    }
}; MAX_MAPPINGS];
static IN_USE: AtomicUsize = AtomicUsize::new(0);

fn register(start: usize, len: usize) -> Option<usize> {
    let index = GUARDS
        .iter()
        .position(|g| g.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok())?;
    let guard = &GUARDS[index];
    guard.shrunk.store(false, Ordering::Relaxed);
    guard.len.store(len, Ordering::Relaxed);
    guard.start.store(start, Ordering::Release);
    IN_USE.fetch_max(index + 1, Ordering::AcqRel);
    Some(index)
}

static mut PREVIOUS: std::mem::MaybeUninit<libc::sigaction> = std::mem::MaybeUninit::zeroed();
static INSTALLING: Mutex<()> = Mutex::new(());
static INSTALL: Once = Once::new();

/// Install the SIGBUS guard before the first mapping. A SIGBUS elsewhere goes to whoever handled it before.
fn install_guard_once() {
    INSTALL.call_once(install_guard);
}

/// Install the SIGBUS guard, again if another handler has taken its place (`faulthandler.enable()` does).
pub fn install_guard() {
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe (atomics, mmap, sigaction only); PREVIOUS is
    // written under the lock and only while the handler that reads it is not installed.
    unsafe {
        let mut current: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGBUS, ptr::null(), &mut current);
        if current.sa_sigaction == on_sigbus as *const () as usize {
            return;
        }
        ptr::addr_of_mut!(PREVIOUS).write(std::mem::MaybeUninit::new(current));
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SA_SIGINFO handlers.
    let address = unsafe { (*info).si_addr() } as usize;
    for guard in &GUARDS[..IN_USE.load(Ordering::Acquire)] {
        let start = guard.start.load(Ordering::Acquire);
        let len = guard.len.load(Ordering::Relaxed);
        if start == 0 || address < start || address - start >= len {
            continue;
        }
        // SAFETY: exactly the range of one of our own mappings, replaced by private zero pages, so that the access that
        // was interrupted can complete; MAP_FIXED keeps the address for its users.
        let replaced = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if replaced != libc::MAP_FAILED {
            guard.shrunk.store(true, Ordering::Relaxed);
            SHRUNK.fetch_add(1, Ordering::Release);
            return;
        }
    }
    // SAFETY: not ours: put the previous disposition back; the access repeats and meets it.
    unsafe {
        libc::sigaction(signal, ptr::addr_of!(PREVIOUS).cast(), ptr::null_mut());
    }
}

impl Mapping {
    /// Copy from one mapping into another without a stop in private memory. Panics as `read` and `write`.
    pub fn copy_from(&self, to: usize, source: &Mapping, from: usize, len: usize) {
        assert!(to <= self.len && len <= self.len - to && from <= source.len && len <= source.len - from);
        // SAFETY: both ranges are in bounds; two mappings of our own never overlap.
        unsafe { ptr::copy_nonoverlapping(source.base.as_ptr().add(from), self.base.as_ptr().add(to), len) }
    }

    /// As `copy_from`, inside of this mapping; the ranges may overlap. Panics on a range that the caller did not check.
    #[inline]
    pub fn copy_within(&self, to: usize, from: usize, len: usize) {
        assert!(to <= self.len && len <= self.len - to && from <= self.len && len <= self.len - from);
        // SAFETY: both ranges are in bounds; `copy` allows them to overlap.
        unsafe { ptr::copy(self.base.as_ptr().add(from), self.base.as_ptr().add(to), len) }
    }

    /// Panics on a range that the caller did not check.
    pub fn fill_zero(&self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: the range is in bounds.
        unsafe { ptr::write_bytes(self.base.as_ptr().add(offset), 0, len) }
    }

    /// Say that the byte at `offset` will be read soon.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        #[cfg(target_arch = "x86_64")]
        if offset < self.len {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            // SAFETY: in bounds; a prefetch changes nothing and cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().add(offset).cast()) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset;
    }
}
