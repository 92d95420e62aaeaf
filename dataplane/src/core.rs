//! What both halves of a channel's end share: mappings, doorbells, state, and the checks made with every burst.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bell::{self, Bell};
use crate::error::{Error, Fault, Result};
use crate::gate::Line;
use crate::layout::{self, INLINE_MAX};
use crate::pool::{Allocations, Returns};
use crate::ring::{take_down, Wake};
use crate::segment::{Mapping, SHRUNK};
use crate::stats;
use crate::sync;

pub const RIGHT_SEND: u8 = 1;
pub const RIGHT_RECV: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Open = 1,
    Paused = 2,
    Moved = 3,
    Revoked = 4,
    Faulted = 5,
    Gone = 6,
    /// The engine goes on without its state: what was under way is lost.
    Lost = 7,
}

impl State {
    pub const NAMES: [(&'static str, State); 7] = [
        ("open", State::Open),
        ("paused", State::Paused),
        ("moved", State::Moved),
        ("revoked", State::Revoked),
        ("faulted", State::Faulted),
        ("gone", State::Gone),
        ("lost", State::Lost),
    ];

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, state)| *state == self).map_or("", |(name, _)| name)
    }

    pub fn from_word(word: u32) -> Option<State> {
        Self::NAMES.iter().map(|(_, state)| *state).find(|state| *state as u32 == word & 0xff)
    }
}

/// What the kernel granted, as it told this end: never read from the segment.
pub struct Grant<'fd> {
    pub role: Role,
    pub ring: BorrowedFd<'fd>,
    /// Pools written by the client and by the server, with their sizes in bytes; 0 bytes: none.
    pub pools: [(Option<BorrowedFd<'fd>>, usize); 2],
    pub slots: u32,
    /// Eventfds that wake the server and the client.
    pub bells: [BorrowedFd<'fd>; 2],
    pub generation: u32,
    pub rights: u8,
    pub gate: Option<(BorrowedFd<'fd>, usize)>,
    /// Memory that both ends write, for one-sided operations, with its size in bytes.
    pub arena: Option<(BorrowedFd<'fd>, usize)>,
}

/// Write a fresh header: the kernel's part, before either end maps the segment.
pub fn init_header(ring: &Mapping, slots: u32, channel: u64, generation: u32) {
    ring.u32_at(layout::OFF_VERSION).store(layout::LAYOUT_VERSION, Ordering::Relaxed);
    ring.u32_at(layout::OFF_SLOTS).store(slots, Ordering::Relaxed);
    ring.u64_at(layout::OFF_CHANNEL).store(channel, Ordering::Relaxed);
    ring.u32_at(layout::OFF_GENERATION).store(generation, Ordering::Relaxed);
    ring.u32_at(layout::OFF_STATE).store(State::Open as u32, Ordering::Relaxed);
    clear_longest_wait(ring);
    ring.u64_at(layout::OFF_MAGIC).store(layout::MAGIC, Ordering::Release);
}

/// Measure the client's longest wait from now on.
pub fn clear_longest_wait(ring: &Mapping) {
    ring.u64_at(layout::OFF_WAITS_SINCE).store(stats::monotonic_ns(), Ordering::Release);
    ring.u64_at(layout::OFF_LONGEST_WAIT).store(0, Ordering::Release);
}

/// Write the state word and wake everybody who sleeps on the channel, armed or not.
pub fn set_state(ring: &Mapping, bells: &[Bell; 2], state: State, fault: Option<Fault>) {
    let reason = fault.map_or(0, |fault| u32::from(fault as u8) << 8);
    ring.u32_at(layout::OFF_STATE).store(state as u32 | reason, Ordering::SeqCst);
    for control in layout::OFF_DIRECTION {
        for armed in [layout::DIR_DATA_ARMED, layout::DIR_ROOM_ARMED] {
            let word = ring.u32_at(control + armed);
            word.store(0, Ordering::SeqCst);
            bell::wake(word, Wake(crate::ring::ARMED_FUTEX), &bells[0]);
        }
    }
    bells.iter().for_each(Bell::ring);
}

#[derive(Default)]
pub struct Counters {
    pub sent: AtomicU64,
    pub received: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    pub waits: AtomicU64,
    pub bells: AtomicU64,
}

/// A counter that one thread writes and others read: no read-modify-write on the path of a message.
#[inline]
pub fn count(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}

/// Whether this end may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Standing {
    Active = 0,
    /// Another process serves the channel; this one may come to (see `ledger`).
    Dormant = 1,
    Closed = 2,
}

/// What both halves of an end share.
pub struct Core {
    pub role: Role,
    pub slots: u32,
    pub ring: Arc<Mapping>,
    own_pool: Option<Mapping>,
    peer_pool: Option<Mapping>,
    arena: Option<Mapping>,
    bells: [Bell; 2],
    pub rights: u8,
    gate: Option<Line>,
    pub allocations: Mutex<Allocations>,
    returns: Mutex<Returns>,
    /// The first fault that this end found; sticky, in private memory.
    fault: AtomicU32,
    shrunk_seen: AtomicU32,
    standing: AtomicU8,
    /// The channel outlives this end: it does nothing but what its ledger committed, and closing it says nothing.
    in_ledger: AtomicBool,
    /// `Returns::touched`, to be seen without its lock.
    returning: AtomicBool,
    pub counters: Counters,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub fn own_direction(&self) -> usize {
        match self.role {
            Role::Client => 0,
            Role::Server => 1,
        }
    }

    pub fn peer_direction(&self) -> usize {
        1 - self.own_direction()
    }

    /// The eventfd that this end listens to.
    pub fn own_bell(&self) -> &Bell {
        &self.bells[self.peer_direction()]
    }

    fn peer_bell(&self) -> &Bell {
        &self.bells[self.own_direction()]
    }

    /// The checks of every burst: gate, state word, own faults, shrunk segments. A few loads of lines that hardly
    /// ever change.
    #[inline]
    pub fn check(&self) -> Result<()> {
        let state = self.ring.u32_at(layout::OFF_STATE).load(Ordering::Acquire);
        let gate_open = self.gate_open();
        if state == State::Open as u32
            && gate_open
            && self.fault.load(Ordering::Relaxed) == 0
            && SHRUNK.load(Ordering::Acquire) == self.shrunk_seen.load(Ordering::Relaxed)
            && self.standing.load(Ordering::Relaxed) == Standing::Active as u8
        {
            return Ok(());
        }
        self.explain(state, gate_open)
    }

    /// Whether the kernel still lets this end serve the channel; always, at a client's end.
    #[inline]
    pub fn gate_open(&self) -> bool {
        self.gate.as_ref().is_none_or(Line::is_open)
    }

    #[cold]
    fn explain(&self, word: u32, gate_open: bool) -> Result<()> {
        match self.standing.load(Ordering::Acquire) {
            active if active == Standing::Active as u8 => {}
            dormant if dormant == Standing::Dormant as u8 => return Err(Error::Dormant),
            _ => return Err(Error::Closed),
        }
        let own = self.fault.load(Ordering::Relaxed);
        if own != 0 {
            return Err(Error::Faulted(Fault::from_number(own as u8)));
        }
        let shrunk = SHRUNK.load(Ordering::Acquire);
        let mappings = [Some(&*self.ring), self.own_pool(), self.peer_pool(), self.arena()];
        if mappings.into_iter().flatten().any(Mapping::shrunk) {
            return Err(self.fail(Fault::Shrunk));
        }
        self.shrunk_seen.store(shrunk, Ordering::Relaxed);
        match State::from_word(word) {
            Some(State::Gone) => Err(Error::Gone),
            Some(State::Revoked) => Err(Error::Revoked),
            // The client can write the state word as well: no other state is believed behind a shut gate.
            _ if !gate_open => Err(Error::Revoked),
            Some(State::Lost) => Err(Error::Lost),
            Some(State::Moved) => Err(Error::Moved),
            Some(State::Faulted) => Err(Error::Faulted(Fault::from_number((word >> 8) as u8))),
            Some(State::Open | State::Paused) => Ok(()),
            None => Err(self.fail(Fault::State)),
        }
    }

    pub fn paused(&self) -> bool {
        State::from_word(self.ring.u32_at(layout::OFF_STATE).load(Ordering::Relaxed)) == Some(State::Paused)
    }

    /// Record a fault of the peer, tell it, and wake whoever waits at either end.
    #[cold]
    pub fn fail(&self, fault: Fault) -> Error {
        if self.fault.compare_exchange(0, fault as u32, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            set_state(&self.ring, &self.bells, State::Faulted, Some(fault));
        }
        Error::Faulted(fault)
    }

    #[inline]
    pub fn ring_peer(&self, word: &AtomicU32, wake: Wake) {
        if wake.0 != 0 {
            count(&self.counters.bells, 1);
            bell::wake(word, wake, self.peer_bell());
        }
    }

    /// Close this end and tell the other one, if the channel was still open and ends with it. Idempotent.
    pub fn close(&self) {
        self.leave(!self.in_ledger.load(Ordering::Acquire));
    }

    /// Close this end and the channel with it, though it was to outlive this end: nobody is left to serve it.
    pub fn abandon(&self) {
        self.leave(true);
    }

    fn leave(&self, ends: bool) {
        if self.standing.swap(Standing::Closed as u8, Ordering::AcqRel) == Standing::Closed as u8 {
            return;
        }
        let state = self.ring.u32_at(layout::OFF_STATE).load(Ordering::Acquire);
        if ends && matches!(State::from_word(state), Some(State::Open | State::Paused)) {
            set_state(&self.ring, &self.bells, State::Gone, None);
        } else {
            set_state_unchanged(&self.ring, &self.bells);
        }
    }

    pub fn closed(&self) -> bool {
        self.standing.load(Ordering::Relaxed) == Standing::Closed as u8
    }

    fn active(&self) -> bool {
        self.standing.load(Ordering::Acquire) == Standing::Active as u8
    }

    /// The channel is going to outlive this end, which waits for its turn to serve it.
    pub(crate) fn join(&self) {
        self.in_ledger.store(true, Ordering::Release);
        lock(&self.allocations).record(&self.ring, self.slots);
        lock(&self.returns).record(&self.ring, self.slots);
        self.sleep();
    }

    /// Another process is going to serve.
    pub(crate) fn sleep(&self) {
        // Whoever gives something back at this moment does it before, or not at all.
        let _returns = lock(&self.returns);
        let (active, dormant) = (Standing::Active as u8, Standing::Dormant as u8);
        let _ = self.standing.compare_exchange(active, dormant, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// This process serves.
    pub(crate) fn awake(&self) {
        let (active, dormant) = (Standing::Active as u8, Standing::Dormant as u8);
        let _ = self.standing.compare_exchange(dormant, active, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Whether payloads came or are to go back since the last commit.
    #[inline]
    pub(crate) fn returning(&self) -> bool {
        self.returning.load(Ordering::Acquire)
    }

    /// Write what goes back into the ring of returns; tokens there, for the commit to record.
    pub(crate) fn write_returns(&self) -> u64 {
        let mut returns = lock(&self.returns);
        returns.write(&self.ring, self.slots, self.peer_direction());
        returns.tail()
    }

    /// After the commit.
    pub(crate) fn publish_returns(&self) {
        if !self.returning() {
            return;
        }
        let mut returns = lock(&self.returns);
        let wake = returns.publish_written(&self.ring, self.peer_direction());
        self.returning.store(returns.touched(), Ordering::Release);
        drop(returns);
        self.ring_room(wake);
    }

    /// Go on where the process before stopped (see `Returns::resume`).
    pub(crate) fn resume_returns(&self, head: u64, returned: u64) -> std::result::Result<(), Fault> {
        let mut returns = lock(&self.returns);
        let wake = returns.resume(&self.ring, self.slots, self.peer_direction(), head, returned)?;
        self.returning.store(returns.touched(), Ordering::Release);
        drop(returns);
        self.ring_room(wake);
        Ok(())
    }

    pub(crate) fn returns(&self) -> MutexGuard<'_, Returns> {
        lock(&self.returns)
    }

    /// A payload came at `position` of the ring.
    pub(crate) fn claim(&self, token: u64, position: u64) -> Result<()> {
        if !self.in_ledger.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut returns = lock(&self.returns);
        let outcome = returns.claim(self.slots, token, position);
        self.returning.store(returns.touched(), Ordering::Release);
        drop(returns);
        outcome.map_err(|fault| self.fail(fault))
    }

    /// Ring the peer's bell if it waits for room, in the direction that we consume.
    pub(crate) fn ring_room(&self, wake: Wake) {
        let word = self.ring.u32_at(layout::OFF_DIRECTION[self.peer_direction()] + layout::DIR_ROOM_ARMED);
        self.ring_peer(word, wake);
    }

    pub fn state_name(&self) -> &'static str {
        match self.check() {
            Ok(()) if self.paused() => "paused",
            Ok(()) => "open",
            Err(Error::Revoked) => "revoked",
            Err(Error::Gone) => "gone",
            Err(Error::Lost) => "lost",
            Err(Error::Moved) => "moved",
            Err(Error::Closed) => "closed",
            // What the channel is, not who serves it.
            Err(Error::Dormant) => self.word_name(),
            Err(_) => "faulted",
        }
    }

    fn word_name(&self) -> &'static str {
        let word = self.ring.u32_at(layout::OFF_STATE).load(Ordering::Acquire);
        State::from_word(word).map_or("faulted", State::name)
    }

    /// Own payloads that are out: lent or sent, and not yet given back by the peer.
    pub fn loans_out(&self) -> usize {
        let mut allocations = lock(&self.allocations);
        if !self.active() {
            return allocations.out();
        }
        let _ = allocations.collect(&self.ring, self.slots, self.own_direction()).map_err(|fault| self.fail(fault));
        allocations.out()
    }

    /// Take a loan back unsent, and wake whoever of this end waits for room.
    pub fn cancel_loan(&self, token: u64) {
        if !self.active() {
            return;
        }
        // Our own token: it is out until it is sent or given back, once.
        let _ = lock(&self.allocations).free(token);
        let word = self.ring.u32_at(layout::OFF_DIRECTION[self.own_direction()] + layout::DIR_ROOM_ARMED);
        bell::wake(word, take_down(word, true), self.own_bell());
    }

    /// Give a received payload's memory back to its sender.
    pub fn give_back(&self, token: u64) {
        let mut returns = lock(&self.returns);
        // Another process that serves by now has given it back itself.
        if !self.active() {
            return;
        }
        let wake = returns.push(&self.ring, self.slots, self.peer_direction(), token);
        self.returning.store(returns.touched(), Ordering::Release);
        drop(returns);
        self.ring_room(wake);
    }

    pub fn own_pool(&self) -> Option<&Mapping> {
        self.own_pool.as_ref()
    }

    pub fn peer_pool(&self) -> Option<&Mapping> {
        self.peer_pool.as_ref()
    }

    /// What both ends write: nothing that is read there may be believed.
    #[inline]
    pub fn arena(&self) -> Option<&Mapping> {
        self.arena.as_ref()
    }

    pub fn max_message(&self) -> usize {
        lock(&self.allocations).largest().max(INLINE_MAX)
    }
}

/// Wake both ends without touching the state word (it already says why).
fn set_state_unchanged(ring: &Mapping, bells: &[Bell; 2]) {
    for control in layout::OFF_DIRECTION {
        for armed in [layout::DIR_DATA_ARMED, layout::DIR_ROOM_ARMED] {
            bell::wake(ring.u32_at(control + armed), Wake(crate::ring::ARMED_FUTEX), &bells[0]);
        }
    }
}

impl Core {
    /// Map and check everything that was granted.
    pub fn open(grant: &Grant<'_>) -> Result<Arc<Core>> {
        if !layout::slots_valid(grant.slots) {
            return Err(Error::Faulted(Fault::Geometry));
        }
        sync::prepare();
        let ring = Arc::new(Mapping::new(grant.ring, layout::ring_bytes(grant.slots), true)?);
        check_header(&ring, grant)?;
        let own = usize::from(grant.role == Role::Server);
        let map = |index: usize, writable| -> Result<Option<Mapping>> {
            match grant.pools[index] {
                (Some(fd), bytes) if bytes > 0 => Mapping::new(fd, bytes, writable).map(Some),
                _ => Ok(None),
            }
        };
        let duplicate = |index: usize| {
            Bell::duplicate(grant.bells[index]).map_err(|errno| Error::os("duplicating a doorbell", errno))
        };
        let own_pool = map(own, true)?;
        Ok(Arc::new(Core {
            role: grant.role,
            slots: grant.slots,
            allocations: Mutex::new(Allocations::new(own_pool.as_ref().map_or(0, Mapping::len), grant.slots)),
            own_pool,
            peer_pool: map(1 - own, false)?,
            arena: grant.arena.map(|(fd, bytes)| Mapping::new(fd, bytes, true)).transpose()?,
            bells: [duplicate(0)?, duplicate(1)?],
            rights: grant.rights,
            gate: grant.gate.map(|(fd, index)| Line::new(fd, index, grant.generation)).transpose()?,
            returns: Mutex::new(Returns::new()),
            fault: AtomicU32::new(0),
            shrunk_seen: AtomicU32::new(SHRUNK.load(Ordering::Acquire)),
            standing: AtomicU8::new(Standing::Active as u8),
            in_ledger: AtomicBool::new(false),
            returning: AtomicBool::new(false),
            counters: Counters::default(),
            ring,
        }))
    }

    #[inline]
    pub fn paused_now(&self) -> bool {
        self.ring.u32_at(layout::OFF_STATE).load(Ordering::Relaxed) == State::Paused as u32
    }
}

fn check_header(ring: &Mapping, grant: &Grant<'_>) -> Result<()> {
    let same = |offset, wanted, fault| {
        let found = ring.u32_at(offset).load(Ordering::Relaxed);
        if found == wanted {
            Ok(())
        } else {
            Err(Error::Faulted(fault))
        }
    };
    if ring.u64_at(layout::OFF_MAGIC).load(Ordering::Acquire) != layout::MAGIC {
        return Err(Error::Faulted(Fault::Magic));
    }
    same(layout::OFF_VERSION, layout::LAYOUT_VERSION, Fault::Version)?;
    same(layout::OFF_SLOTS, grant.slots, Fault::Geometry)?;
    same(layout::OFF_GENERATION, grant.generation, Fault::Generation)
}
