//! Many operations at once on the memory of regions: the numbers that say which are taken together, so that their memory is
//! on its way while others are worked on.

use std::sync::Arc;

use super::command::{Handle, Status, INDIRECTION, READ, WRITE};
use super::memory::{copy, Place, Regions, Window};
use crate::core::Core;
use crate::segment::Mapping;

/// Operations of a burst whose memory is fetched together.
const AHEAD: usize = 32;

/// The numbers of a burst, from where the client put them.
pub struct Numbers<'a> {
    pub memory: &'a Mapping,
    pub at: usize,
    /// Bytes of one: 4 or 8.
    pub width: usize,
}

impl Numbers<'_> {
    /// Copies `out.len()` of them from number `first` on.
    fn take(&self, first: usize, out: &mut [u64]) {
        let mut bytes = [0; AHEAD * 8];
        let bytes = &mut bytes[..out.len() * self.width];
        self.memory.read(self.at + first * self.width, bytes);
        widen(bytes, self.width, out);
    }
}

/// Numbers of `width` bytes each, little endian.
fn widen(bytes: &[u8], width: usize, out: &mut [u64]) {
    let short = |bytes: &[u8]| bytes.try_into().map_or(0, |four| u64::from(u32::from_le_bytes(four)));
    let long = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    // Each with a length that the compiler knows: else every number would be a call.
    if width == 4 {
        out.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(number, bytes)| *number = short(bytes));
    } else {
        out.iter_mut().zip(bytes.chunks_exact(8)).for_each(|(number, bytes)| *number = long(bytes));
    }
}

/// What a burst does with each of its numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Each {
    /// Read at that offset.
    Read,
    /// Write at that offset.
    Write,
    /// Read what the indirection of that index points to.
    Indirect,
}

impl Each {
    /// Bytes of a number.
    pub fn width(self) -> usize {
        if self == Each::Indirect {
            4
        } else {
            8
        }
    }
}

/// Bytes of an arena.
type Found<'a> = (&'a Mapping, usize, usize);

/// `count` operations of `size` bytes each in order, up to the first that fails: how many were done, and why not more.
/// The initiator's bytes are packed from `start` of its arena on, where `count * size` bytes are.
pub fn burst(
    each: Each,
    place: Place<'_>,
    regions: &impl Regions,
    numbers: &Numbers<'_>,
    (core, start): (&Arc<Core>, usize),
    size: u32,
    count: usize,
) -> Result<(usize, Status), Status> {
    if count == 0 {
        return Ok((0, Status::Ok));
    }
    let own = core.arena().ok_or(Status::OutOfRange)?;
    let window = place.window(if each == Each::Write { WRITE } else { READ })?;
    let mine = |index: usize| start + index * size as usize;
    let numbers = |first: usize, out: &mut [u64]| numbers.take(first, out);
    let read = |index: usize, (arena, from, len): Found<'_>| copy(own, mine(index), arena, from, len);
    let write = |index: usize, (arena, to, len): Found<'_>| copy(arena, to, own, mine(index), len);
    let direct = |number: u64| Ok((window.arena, window.at(number, size.into())?, size as usize));
    Ok(match each {
        Each::Read => run(window, count, numbers, |_| {}, direct, read),
        Each::Write => run(window, count, numbers, |_| {}, direct, write),
        Each::Indirect => {
            let mut pointers = Pointers { table: window, regions, last: None };
            run(window, count, numbers, |index| fetch(window, index), |index| pointers.follow(index, size), read)
        }
    })
}

/// What a burst reads of each of its numbers when it is read in parts: `want` bytes from `skip` on, of at most `cap`.
#[derive(Clone, Copy)]
pub struct Part {
    pub cap: u32,
    pub skip: u32,
    pub want: u32,
}

/// As `burst`, for somebody whose arena is elsewhere: the bytes are packed into `out`, `part.want` for each number, zeros
/// where there are fewer.
pub fn collect(
    each: Each,
    place: Place<'_>,
    regions: &impl Regions,
    numbers: &[u8],
    part: Part,
    out: &mut [u8],
) -> Result<(usize, Status), Status> {
    if numbers.is_empty() {
        return Ok((0, Status::Ok));
    }
    let (window, width, want) = (place.window(READ)?, each.width(), part.want as usize);
    // No more than there is room for.
    let count = (numbers.len() / width).min(out.len().checked_div(want).unwrap_or(usize::MAX));
    let take = |first: usize, out: &mut [u64]| widen(&numbers[first * width..], width, out);
    let put = |index: usize, (arena, from, len): Found<'_>| {
        let place = &mut out[index * want..(index + 1) * want];
        arena.read(from, &mut place[..len]);
        place[len..].fill(0);
    };
    let skip = part.skip as usize;
    Ok(if each == Each::Indirect {
        let mut pointers = Pointers { table: window, regions, last: None };
        let follow = |index: u64| {
            let (arena, from, len) = pointers.follow(index, part.cap)?;
            let skip = skip.min(len);
            Ok((arena, from + skip, (len - skip).min(want)))
        };
        run(window, count, take, |index| fetch(window, index), follow, put)
    } else {
        let direct = |number: u64| {
            let from = number.checked_add(part.skip.into()).ok_or(Status::OutOfRange)?;
            Ok((window.arena, window.at(from, part.want.into())?, want))
        };
        run(window, count, take, |_| {}, direct, put)
    })
}

/// Take `numbers`, `fetch` what says where each one's memory is, `locate` that memory, and `work` on it.
#[inline(always)]
fn run<'a>(
    window: Window<'a>,
    count: usize,
    numbers: impl Fn(usize, &mut [u64]),
    fetch: impl Fn(u64),
    mut locate: impl FnMut(u64) -> Result<Found<'a>, Status>,
    mut work: impl FnMut(usize, Found<'a>),
) -> (usize, Status) {
    let mut words = [0; AHEAD];
    let mut places = [(window.arena, 0, 0); AHEAD];
    for first in (0..count).step_by(AHEAD) {
        let words = &mut words[..AHEAD.min(count - first)];
        numbers(first, words);
        words.iter().for_each(|word| fetch(*word));
        let (mut good, mut status) = (0, Status::Ok);
        for (word, place) in words.iter().zip(&mut places) {
            match locate(*word) {
                Ok((arena, start, len)) => {
                    arena.prefetch(start);
                    *place = (arena, start, len);
                    good += 1;
                }
                Err(why) => {
                    status = why;
                    break;
                }
            }
        }
        for (index, place) in places[..good].iter().enumerate() {
            work(first + index, *place);
        }
        if status != Status::Ok {
            return (first + good, status);
        }
    }
    (count, Status::Ok)
}

fn fetch(table: Window<'_>, index: u64) {
    if let Ok(at) = table.at(index.saturating_mul(INDIRECTION as u64), INDIRECTION as u64) {
        table.arena.prefetch(at);
    }
}

/// Finds what indirections point to. Most likely that is in the same region again.
struct Pointers<'a, R> {
    table: Window<'a>,
    regions: &'a R,
    last: Option<(Handle, Window<'a>)>,
}

impl<'a, R: Regions> Pointers<'a, R> {
    // A result that goes through memory costs more than all of this.
    #[inline(always)]
    fn follow(&mut self, index: u64, most: u32) -> Result<Found<'a>, Status> {
        let (handle, piece) = self.table.indirection(index.saturating_mul(INDIRECTION as u64))?;
        let target = match self.last {
            Some((known, target)) if known == handle => target,
            _ => self.regions.find(handle)?.window(READ)?,
        };
        self.last = Some((handle, target));
        let len = piece.len.min(most.into());
        Ok((target.arena, target.at(piece.offset, len)?, len as usize))
    }
}
