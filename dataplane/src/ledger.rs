//! The ledger of an engine: what it received, sent and wrote to its state becomes permanent together.
//!
//! Positions of each channel stand in the state segment beside the objects, twice: a commit writes the copy that does not
//! count, stamped with the poll under way, and the one store that makes the poll's mutations permanent makes it count.
//! Only then are answers published and slots and payloads given back, so that a death before the store leaves, for whoever
//! takes over, messages that were never received; and one after it, a publication that the successor makes good. An
//! operation is named by its channel and position: it takes effect once.

use std::sync::atomic::{compiler_fence, Ordering};

use crate::channel::{Rx, Tx};
use crate::error::{self, Error};
use crate::state::{Frame, Phase, Result, Segment, StateError, Word, CURSOR_LINES, CURSOR_WORDS};
use crate::stats::monotonic_ns;

/// Words of one copy; a line has two.
const COPY: usize = CURSOR_WORDS / 2;
const STAMP: usize = 0;
const CHANNEL: usize = 1;
const HEAD: usize = 2;
const TAIL: usize = 3;
const RETURNED: usize = 4;
/// In the second copy of line 0: lines that were ever used, so that nobody looks at the others.
const LINES_USED: usize = COPY + 7;

/// Where the service of a channel stands: slots received, slots sent, tokens given back, all for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cursor {
    head: u64,
    tail: u64,
    returned: u64,
}

/// One channel's place in a ledger.
pub struct Line {
    index: usize,
    channel: u64,
    /// The copy to be written next.
    spare: usize,
}

/// Something that is served: its line and both halves of the channel's end.
pub trait Served {
    fn parts(&mut self) -> (&mut Line, &mut Tx, &mut Rx);
}

impl Line {
    /// `index`: the channel's gate line. The ends do nothing from now on but what a commit says, and nothing before `take`.
    /// Raises `Usage` when there is no such line.
    pub fn join(index: usize, channel: u64, tx: &mut Tx, rx: &mut Rx) -> Result<Line> {
        if index >= CURSOR_LINES {
            return Err(StateError::Usage(format!("there are {CURSOR_LINES} lines, none is number {index}")));
        }
        tx.defer();
        rx.defer();
        tx.core().join();
        Ok(Line { index, channel, spare: 0 })
    }

    pub fn index(&self) -> usize {
        self.index
    }

    /// Serve the channel from where the last commit left it. A channel whose memory does not fit is faulted.
    pub fn take(&mut self, frame: &Frame, tx: &mut Tx, rx: &mut Rx) -> error::Result<()> {
        let cursor = self.find(frame);
        tx.core().awake();
        tx.resume(cursor.tail)?;
        rx.resume(cursor.head, cursor.returned)
    }

    fn find(&mut self, frame: &Frame) -> Cursor {
        let Some(newest) = newest(frame, self.index) else {
            self.spare = 0;
            return Cursor::default();
        };
        self.spare = 1 - newest;
        let word = |word| load(frame, self.index, newest, word);
        if word(CHANNEL) != self.channel {
            return Cursor::default();
        }
        Cursor { head: word(HEAD), tail: word(TAIL), returned: word(RETURNED) }
    }

    /// Write the positions of the poll under way.
    fn write(&mut self, frame: &Frame, tx: &Tx, rx: &mut Rx) {
        let (head, returned) = rx.write();
        if used(frame) <= self.index {
            frame.cursor(0, LINES_USED).store(self.index as u64 + 1, Ordering::Release);
        }
        put(frame, self.index, self.spare, self.channel, Cursor { head, tail: tx.tail(), returned });
        self.spare = 1 - self.spare;
    }
}

fn load(frame: &Frame, line: usize, copy: usize, word: usize) -> u64 {
    frame.cursor(line, copy * COPY + word).load(Ordering::Acquire)
}

/// The copy of a line that counts, if any does.
fn newest(frame: &Frame, line: usize) -> Option<usize> {
    let stamps =
        [0, 1].map(|copy| load(frame, line, copy, STAMP)).map(|stamp| if stamp > frame.epoch() { 0 } else { stamp });
    match stamps {
        [0, 0] => None,
        [first, second] => Some(usize::from(second > first)),
    }
}

/// The stamp last: until it is there, the copy is an older one than that which counts.
fn put(frame: &Frame, line: usize, copy: usize, channel: u64, cursor: Cursor) {
    let store = |word, value| frame.cursor(line, copy * COPY + word).store(value, Ordering::Release);
    store(CHANNEL, channel);
    store(HEAD, cursor.head);
    store(TAIL, cursor.tail);
    store(RETURNED, cursor.returned);
    store(STAMP, frame.stamp());
}

fn used(frame: &Frame) -> usize {
    (frame.cursor(0, LINES_USED).load(Ordering::Acquire) as usize).min(CURSOR_LINES)
}

/// Have the pages of the positions at hand, so that taking over meets none for the first time.
pub fn prefault(frame: &Frame) {
    for line in 0..used(frame) {
        std::hint::black_box(load(frame, line, 0, STAMP));
    }
}

/// Begin to own a state: roll back what its last owner left unfinished (words undone). With a `source`, the state that a
/// migration filled takes its place, with its positions. Raises `Damaged`, `Schema`, `Usage`.
pub fn take(segment: &mut Segment, source: Option<&mut Segment>, generation: u64) -> Result<u64> {
    segment.check_writable()?;
    let mut undone = 0;
    let source = match source {
        // Somebody who died after the last store below had done all of it.
        Some(source) if source.phase()? == Phase::Retired => None,
        Some(source) => {
            check_phase(source, false)?;
            undone += source.recover()?;
            Some(source)
        }
        None => None,
    };
    check_phase(segment, source.is_some())?;
    undone += segment.recover()?;
    scrub(segment);
    segment.set(Word::Adoptions, segment.get(Word::Adoptions).saturating_add(1));
    segment.set(Word::Generation, generation);
    segment.set(Word::Owner, u64::from(std::process::id()));
    if let Some(source) = source {
        copy_cursors(source, segment);
        segment.set(Word::LastPollNs, source.get(Word::LastPollNs));
        segment.commit();
        segment.set_phase(Phase::Serving);
        source.set_phase(Phase::Retired);
    } else {
        segment.set_phase(Phase::Serving);
    }
    Ok(undone)
}

fn check_phase(segment: &Segment, building: bool) -> Result<()> {
    match segment.phase()? {
        Phase::Blank | Phase::Serving => Ok(()),
        Phase::Building if building => Ok(()),
        phase => Err(StateError::Damaged(format!("the state is {}: it is not one to serve with", phase.name()))),
    }
}

/// Positions that were written and not committed must not come to count with the next commit.
fn scrub(segment: &Segment) {
    for line in 0..used(segment) {
        for copy in [0, 1] {
            if load(segment, line, copy, STAMP) > segment.epoch() {
                segment.cursor(line, copy * COPY + STAMP).store(0, Ordering::Release);
            }
        }
    }
}

fn copy_cursors(from: &Segment, to: &Segment) {
    let lines = used(from);
    to.cursor(0, LINES_USED).store(lines as u64, Ordering::Release);
    for line in 0..lines {
        to.cursor(line, COPY + STAMP).store(0, Ordering::Release);
        let Some(copy) = newest(from, line) else { continue };
        let word = |word| load(from, line, copy, word);
        put(to, line, 0, word(CHANNEL), Cursor { head: word(HEAD), tail: word(TAIL), returned: word(RETURNED) });
    }
}

/// Whether anything was received, sent or given back since the last commit.
#[inline]
pub fn touched(served: &mut impl Served) -> bool {
    let (_, tx, rx) = served.parts();
    tx.touched() || rx.touched()
}

/// End of a poll: everything since the last commit becomes permanent, then visible. False when there was nothing.
#[inline]
pub fn commit<S: Served>(segment: &mut Segment, served: &mut [S]) -> bool {
    if !segment.changed() && !served.iter_mut().any(touched) {
        return false;
    }
    commit_all(segment, served);
    true
}

fn commit_all<S: Served>(segment: &mut Segment, served: &mut [S]) {
    for one in &mut *served {
        if touched(one) {
            let (line, tx, rx) = one.parts();
            line.write(segment, tx, rx);
        }
    }
    compiler_fence(Ordering::SeqCst);
    segment.commit();
    for one in served {
        if touched(one) {
            let (_, tx, rx) = one.parts();
            tx.keep();
            rx.keep();
        }
    }
}

/// Take the poll back: state, messages received, messages sent; words undone.
pub fn abort<S: Served>(segment: &mut Segment, served: &mut [S]) -> Result<u64> {
    for one in served {
        let (_, tx, rx) = one.parts();
        tx.take_back();
        rx.take_back();
    }
    segment.abort()
}

/// A whole poll has passed: the state did not kill its adopter. Acknowledges whoever asks for changes to be tracked.
#[inline]
pub fn polled(segment: &mut Segment) {
    if segment.get(Word::Adoptions) != 0 {
        segment.set(Word::Adoptions, 0);
    }
    segment.acknowledge();
}

/// The last commit of a planned hand-over; when it was (CLOCK_MONOTONIC, ns). The ends sleep until the next `take`.
pub fn hand_over<S: Served>(segment: &mut Segment, served: &mut [S]) -> u64 {
    commit(segment, served);
    for one in served {
        let (_, tx, rx) = one.parts();
        tx.core().sleep();
        tx.retire();
        rx.retire();
    }
    let now = monotonic_ns();
    segment.set(Word::LastPollNs, now);
    now
}

/// The first poll is about to begin; when (CLOCK_MONOTONIC, ns).
pub fn first_poll(frame: &Frame) -> u64 {
    let now = monotonic_ns();
    frame.set(Word::FirstPollNs, now);
    now
}

/// Take every channel over where it was left. Those whose memory does not fit are faulted, which the next look at them
/// meets; the others go on.
pub fn take_channels<S: Served>(segment: &mut Segment, served: &mut [S]) -> Vec<Error> {
    let mut errors = Vec::new();
    for one in &mut *served {
        let (line, tx, rx) = one.parts();
        if let Err(error) = line.take(segment, tx, rx) {
            errors.push(error);
        }
    }
    // What the dead held goes back.
    commit(segment, served);
    errors
}
