//! An engine's small values in one piece: two buffers, of which the newest committed one counts.

use super::frame::Frame;
use super::layout::{OFF_SNAPSHOTS, SNAPSHOT, SNAPSHOT_HEAD, SNAPSHOT_MAX};
use super::segment::Segment;
use super::{damaged, full, Result};

/// Store a snapshot as part of the next commit. Raises `Full` when it is larger than `SNAPSHOT_MAX`.
pub fn save(segment: &mut Segment, bytes: &[u8]) -> Result<()> {
    if bytes.len() > SNAPSHOT_MAX {
        return full(format!("a snapshot of {} bytes exceeds {SNAPSHOT_MAX}", bytes.len()));
    }
    let place = match newest(segment) {
        Some((place, _)) if place == OFF_SNAPSHOTS => OFF_SNAPSHOTS + SNAPSHOT,
        _ => OFF_SNAPSHOTS,
    };
    // Undone, the buffer has its old stamp and other bytes: it is the older one, which nobody looks at.
    segment.write_word(place, 0)?;
    segment.put(place + SNAPSHOT_HEAD, bytes);
    segment.store(place + 8, bytes.len() as u64 | u64::from(crc32c::crc32c(bytes)) << 32);
    segment.store(place, segment.stamp());
    Ok(())
}

/// The last snapshot that was committed; empty when there is none. Raises `Damaged`.
pub fn saved(frame: &Frame) -> Result<Vec<u8>> {
    let Some((place, _)) = newest(frame) else { return Ok(Vec::new()) };
    let word = frame.load(place + 8);
    let (len, crc) = (word as u32 as usize, (word >> 32) as u32);
    if len > SNAPSHOT_MAX {
        return damaged(format!("a snapshot of {len} bytes"));
    }
    let mut bytes = vec![0; len];
    frame.mapping().read(place + SNAPSHOT_HEAD, &mut bytes);
    if crc32c::crc32c(&bytes) != crc {
        return damaged("the checksum of the snapshot does not match");
    }
    Ok(bytes)
}

/// Where the newest committed snapshot is, and its stamp.
fn newest(frame: &Frame) -> Option<(usize, u64)> {
    let epoch = frame.epoch();
    [OFF_SNAPSHOTS, OFF_SNAPSHOTS + SNAPSHOT]
        .map(|place| (place, frame.load(place)))
        .into_iter()
        .filter(|(_, stamp)| (1..=epoch).contains(stamp))
        .max_by_key(|(_, stamp)| *stamp)
}
