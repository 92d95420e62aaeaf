//! Copies of a state: only what is not a hole, so that a sparse segment stays sparse.

use std::os::fd::BorrowedFd;

use rustix::fs::{fallocate, seek, FallocateFlags, SeekFrom};
use rustix::io::{pread, pwrite, Errno};

use super::frame::Frame;
use super::{full, Result, StateError};

const CHUNK: usize = 256 * 1024;
const MAGIC_BYTES: u64 = 8;

/// Copy the state to another segment of at least its size, which becomes blank first and a state last; bytes copied.
/// Nobody may be writing either of them. Raises `Full`, `Os`.
pub fn copy_to(frame: &Frame, target: BorrowedFd<'_>) -> Result<u64> {
    let size = frame.header().size as u64;
    let room = rustix::fs::fstat(target).map_err(|errno| StateError::os("fstat of a copy", errno))?.st_size as u64;
    if room < size {
        return full(format!("a state of {size} bytes does not fit in a segment of {room}"));
    }
    fallocate(target, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, room)
        .map_err(|errno| StateError::os("clearing a copy", errno))?;
    let mut buffer = vec![0; CHUNK];
    let mut copied = 0;
    let mut next = 0;
    while let Some((start, end)) = data_after(frame.fd(), next, size)? {
        copied += copy_range(frame.fd(), target, start.max(MAGIC_BYTES), end, &mut buffer)?;
        next = end;
    }
    Ok(copied + copy_range(frame.fd(), target, 0, MAGIC_BYTES, &mut buffer)?)
}

/// The first stretch of memory that is no hole at or after `offset`, ending at most at `end`.
pub(super) fn data_after(fd: BorrowedFd<'_>, offset: u64, end: u64) -> Result<Option<(u64, u64)>> {
    let failed = |errno| StateError::os("looking for the holes of a state", errno);
    if offset >= end {
        return Ok(None);
    }
    let start = match seek(fd, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = seek(fd, SeekFrom::Hole(start)).map_err(failed)?;
    Ok(Some((start, stop.min(end))))
}

fn copy_range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64, buffer: &mut [u8]) -> Result<u64> {
    let mut at = start;
    while at < end {
        let take = buffer.len().min((end - at) as usize);
        let got = pread(from, &mut buffer[..take], at).map_err(|errno| StateError::os("reading a state", errno))?;
        let put = pwrite(to, &buffer[..got], at).map_err(|errno| StateError::os("writing a copy", errno))?;
        if put == 0 {
            return Err(StateError::os("copying a state that was shrunk", Errno::IO));
        }
        at += put as u64;
    }
    Ok(end.saturating_sub(start))
}
