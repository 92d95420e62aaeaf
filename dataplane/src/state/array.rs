//! Items in one piece, for NumPy: blocks of them share a checksum, made at the commit, and a dirty mark.

use std::ops::Range;
use std::sync::Arc;

use super::frame::Frame;
use super::layout::{Kind, Object, META_USED, META_WORDS};
use super::segment::Segment;
use super::{usage, Result};

#[derive(Clone)]
pub struct Array {
    object: Arc<Object>,
}

impl Array {
    /// Raises `Schema`.
    pub fn of(frame: &Frame, name: &str) -> Result<Array> {
        Ok(Array { object: frame.object(Kind::Array, name)?.clone() })
    }

    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Copy whole items from `start` on. Raises `Usage`.
    pub fn read(&self, frame: &Frame, start: usize, out: &mut [u8]) -> Result<()> {
        let range = self.range(start, self.whole(out.len())?)?;
        frame.mapping().read(range.start, out);
        Ok(())
    }

    /// Write whole items from `start` on. Raises `Usage`, and `Full` when it is more than the undo log holds.
    pub fn write(&self, segment: &mut Segment, start: usize, data: &[u8]) -> Result<()> {
        let range = self.edit(segment, start, self.whole(data.len())?)?;
        segment.put(range.start, data);
        Ok(())
    }

    /// Save these items to the undo log; where they are in the segment, to be written until the commit. Raises as `write`.
    pub fn edit(&self, segment: &mut Segment, start: usize, count: usize) -> Result<Range<usize>> {
        let object = &self.object;
        segment.check_writable()?;
        let range = self.range(start, count)?;
        if count == 0 {
            return Ok(range);
        }
        let (first, last) =
            ((range.start - object.data) / object.stride, (range.end - 1 - object.data) / object.stride);
        let blocks = last - first + 1;
        segment.reserve(blocks + 2, META_WORDS * 8 + range.len().next_multiple_of(8) + blocks * 8)?;
        segment.log(range.start, range.len())?;
        for block in first..=last {
            segment.unsum(object, block)?;
        }
        let used = segment.load(object.meta + META_USED);
        if used < (start + count) as u64 {
            segment.log_counters(object)?;
            segment.store(object.meta + META_USED, (start + count) as u64);
        }
        Ok(range)
    }

    /// Where `count` items from `start` on are in the segment. Raises `Usage`.
    pub fn range(&self, start: usize, count: usize) -> Result<Range<usize>> {
        let spec = &self.object.spec;
        if start > spec.count || count > spec.count - start {
            return usage(format!("array {:?} has {} items, not {count} from {start} on", spec.name, spec.count));
        }
        let from = self.object.data + start * spec.item;
        Ok(from..from + count * spec.item)
    }

    fn whole(&self, bytes: usize) -> Result<usize> {
        let item = self.object.spec.item;
        if bytes % item != 0 {
            return usage(format!("{bytes} bytes are no whole number of items of {item}"));
        }
        Ok(bytes / item)
    }
}
