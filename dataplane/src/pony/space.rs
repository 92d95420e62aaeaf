//! The memory that applications share: arenas, and the regions in them.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::command::{Handle, Piece, Status, ATOMIC, READ, WRITE};
use super::memory::{Place, Regions};
use super::numbered::Numbered;
use super::rows::Region;
use crate::core::Core;
use crate::state::{Result, Segment};

#[derive(Default)]
pub struct Space {
    pub regions: Numbered<Region>,
    pub arenas: FxHashMap<u64, Arc<Core>>,
    pub keys: u32,
}

impl Space {
    /// What a peer sees over the owner's end `connection` of channel `owner`.
    pub fn seen(&self, owner: u64, connection: u32) -> Seen<'_> {
        Seen { space: self, owner, connection }
    }

    /// The range of a piece of the arena of `channel`.
    pub fn range(
        &self,
        channel: u64,
        piece: Piece,
    ) -> std::result::Result<(&Arc<Core>, std::ops::Range<usize>), Status> {
        let core = self.arenas.get(&channel).ok_or(Status::Closed)?;
        let arena = core.arena().ok_or(Status::OutOfRange)?;
        Ok((core, piece.within(arena.len() as u64).ok_or(Status::OutOfRange)?))
    }

    /// Let peers of `channel` use a piece of its arena: the handle's word. Raises `Full`.
    pub fn register(
        &mut self,
        segment: &mut Segment,
        channel: u64,
        connection: u32,
        piece: Piece,
        rights: u32,
    ) -> Result<std::result::Result<u64, Status>> {
        if rights & !(READ | WRITE | ATOMIC) != 0 || rights == 0 {
            return Ok(Err(Status::Bad));
        }
        if let Err(status) = self.range(channel, piece) {
            return Ok(Err(status));
        }
        if !self.regions.may_have(channel, 1) {
            return Ok(Err(Status::Full));
        }
        // Handles of earlier regions must not come to mean this one, nor be guessed.
        self.keys = self.keys.wrapping_add(1);
        let key = crate::stats::monotonic_ns() as u32 ^ self.keys.wrapping_mul(0x9e37_79b9);
        let region = Region { channel, key, rights, connection, piece };
        let id = self.regions.insert(segment, region)?;
        Ok(Ok(region.handle(id).word()))
    }

    pub fn release(
        &mut self,
        segment: &mut Segment,
        channel: u64,
        handle: Handle,
    ) -> Result<std::result::Result<u64, Status>> {
        match self.regions.get(handle.id) {
            Some(region) if region.channel == channel && region.key == handle.key => {
                self.regions.remove(segment, handle.id)?;
                Ok(Ok(0))
            }
            _ => Ok(Err(Status::NoRegion)),
        }
    }
}

#[derive(Clone, Copy)]
pub struct Seen<'a> {
    space: &'a Space,
    owner: u64,
    connection: u32,
}

impl Regions for Seen<'_> {
    fn find(&self, handle: Handle) -> std::result::Result<Place<'_>, Status> {
        let region = self.space.regions.get(handle.id).ok_or(Status::NoRegion)?;
        if region.channel != self.owner {
            return Err(Status::NoRegion);
        }
        if region.key != handle.key {
            return Err(Status::Revoked);
        }
        if region.connection != 0 && region.connection != self.connection {
            return Err(Status::Denied);
        }
        let arena = self.space.arenas.get(&region.channel).and_then(|core| core.arena()).ok_or(Status::Closed)?;
        Ok(Place { region, arena })
    }
}
