//! Sealed packets: AES-256-GCM, with the transmission's number as nonce. The number never repeats with one key: it begins
//! anew above all earlier ones whenever the engine may have lost count.

use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM};

use crate::pony::flow::wire::CLEAR;

pub const TAG: usize = 16;

pub struct Seal {
    seal: LessSafeKey,
    open: LessSafeKey,
}

fn key(bytes: &[u8; 32]) -> LessSafeKey {
    // Fails only for a key of another length.
    match UnboundKey::new(&AES_256_GCM, bytes) {
        Ok(key) => LessSafeKey::new(key),
        Err(_) => unreachable!("32 bytes are a key of AES-256"),
    }
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Seal {
    pub fn new(seal: &[u8; 32], open: &[u8; 32]) -> Seal {
        Seal { seal: key(seal), open: key(open) }
    }

    /// Seal `packet`, whose last `TAG` bytes are room for the tag.
    pub fn seal(&self, number: u64, packet: &mut [u8]) {
        let (clear, rest) = packet.split_at_mut(CLEAR);
        let (body, tag) = rest.split_at_mut(rest.len() - TAG);
        // Fails only for bodies of gigabytes.
        if let Ok(made) = self.seal.seal_in_place_separate_tag(nonce(number), Aad::from(&*clear), body) {
            tag.copy_from_slice(made.as_ref());
        }
    }

    /// Open `packet` in place: the bytes without the tag, if it is the peer's.
    pub fn open<'a>(&self, number: u64, packet: &'a mut [u8]) -> Option<&'a [u8]> {
        let len = packet.len().checked_sub(TAG)?;
        let (clear, rest) = packet.split_at_mut_checked(CLEAR)?;
        self.open.open_in_place(nonce(number), Aad::from(&*clear), rest).ok()?;
        Some(&packet[..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_opened_by_the_peer_only() {
        let (one, two) = ([1; 32], [2; 32]);
        let (near, far) = (Seal::new(&one, &two), Seal::new(&two, &one));
        let mut packet: Vec<u8> = (0..100).collect();
        let plain = packet.clone();
        packet.extend_from_slice(&[0; TAG]);
        near.seal(7, &mut packet);
        assert_eq!(packet[..CLEAR], plain[..CLEAR]);
        assert!(!packet.windows(8).any(|window| window == &plain[40..48]));
        for bit in 0..packet.len() * 8 {
            let mut bad = packet.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(far.open(7, &mut bad).is_none(), "bit {bit}");
        }
        assert!(far.open(8, &mut packet.clone()).is_none());
        assert!(near.open(7, &mut packet.clone()).is_none());
        assert_eq!(far.open(7, &mut packet), Some(&plain[..]));
        assert!(far.open(7, &mut [0; 10]).is_none());
    }
}
