//! Words of arenas that atomic operations change. Arenas are in no state, so what a poll does to them is noted in its undo
//! log, and taken back by whoever takes the poll back: then the operation, which is done again, is done once.

use std::sync::atomic::Ordering;

use super::command::{Access, ATOMIC};
use super::memory::Place;
use super::rows::{put, word};
use super::space::Space;
use crate::state::{Result, Segment};

/// What is about to become of the word at `at` of a channel's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    channel: u64,
    at: u64,
    old: u64,
    new: u64,
    /// By adding: that can be taken back whatever came after it.
    added: bool,
}

impl Change {
    const BYTES: usize = 40;

    fn write(&self) -> [u8; Change::BYTES] {
        let mut bytes = [0; Change::BYTES];
        let words = [self.channel, self.at, self.old, self.new, self.added.into()];
        words.into_iter().enumerate().for_each(|(i, value)| put(&mut bytes, i * 8, value));
        bytes
    }

    fn read(note: &[u8]) -> Option<Change> {
        let [channel, at, old, new] = [word(note, 0)?, word(note, 8)?, word(note, 16)?, word(note, 24)?];
        Some(Change { channel, at, old, new, added: word(note, 32)? != 0 })
    }
}

/// Note what an access is about to do to a word of `place`, if it does. Raises `Full`.
pub fn note(segment: &mut Segment, place: Place<'_>, access: &Access<'_>) -> Result<()> {
    let (Access::CompareSwap { at, .. } | Access::FetchAdd { at, .. }) = *access else { return Ok(()) };
    // What is wrong with it is said when it is done.
    let Ok(at) = place.word(ATOMIC, at) else { return Ok(()) };
    let old = place.arena.u64_at(at).load(Ordering::Acquire);
    let (new, added) = match *access {
        Access::FetchAdd { add, .. } => (old.wrapping_add(add), true),
        Access::CompareSwap { expected, desired, .. } if expected == old => (desired, false),
        _ => return Ok(()),
    };
    segment.note(&Change { channel: place.region.channel, at: at as u64, old, new, added }.write())
}

/// Take back what an unfinished poll did, by its notes, the last first.
pub fn take_back(space: &Space, notes: &[Vec<u8>]) {
    for (index, note) in notes.iter().enumerate() {
        let Some(change) = Change::read(note) else { continue };
        let Some(arena) = space.arenas.get(&change.channel).and_then(|core| core.arena()) else { continue };
        if change.at % 8 != 0 || change.at.checked_add(8).is_none_or(|end| end > arena.len() as u64) {
            continue;
        }
        let word = arena.u64_at(change.at as usize);
        // Only of the last one it is not certain that it was done.
        if index == 0 && word.load(Ordering::Acquire) == change.old {
            continue;
        }
        if change.added {
            word.fetch_sub(change.new.wrapping_sub(change.old), Ordering::AcqRel);
        } else {
            // Unless somebody has gone on from there.
            let _ = word.compare_exchange(change.new, change.old, Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}
