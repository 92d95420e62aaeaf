//! Arbitrary commands of two applications to an engine of Pony Express, which dies now and then.
//!
//! The input is a run of steps: what to do, and the bytes of a command with their length before them. No command may end the
//! engine, break its state, or reach memory outside of arenas (every access is bounds-checked, so that shows as a panic).
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;
mod site;

use libfuzzer_sys::fuzz_target;

use common::take;
use site::Site;

/// Names to be bound and connected to from the start, so that something can be reached.
fn greet(site: &mut Site) {
    let mut connect = vec![2, 0, 0, 0, 0, 0, 0, 0];
    connect.extend_from_slice(b"b");
    let mut bind = connect.clone();
    bind[0] = 1;
    put(site, 1, &bind);
    put(site, 0, &connect);
    // A region of all that there is, with all rights: its handle is found by trying, as keys are nobody's to guess.
    let mut register = vec![7, 0, 0, 0, 0, 0, 0, 0];
    register.extend_from_slice(&0u64.to_le_bytes());
    register.extend_from_slice(&(site::ARENA as u64).to_le_bytes());
    register.extend_from_slice(&7u32.to_le_bytes());
    put(site, 1, &register);
    site.poll();
}

fn put(site: &mut Site, who: usize, command: &[u8]) {
    let tx = &mut site.apps[who].tx;
    if tx.check().is_ok() && tx.put(1, command).is_ok() {
        tx.publish();
    }
}

/// What came for both; the handle of a region, if one is among it.
fn drain(site: &mut Site) -> Option<[u8; 8]> {
    let mut handle = None;
    for app in &mut site.apps {
        while let Ok(Some((_, answer))) = take(&mut app.rx) {
            assert!(answer.len() >= 16 || answer.is_empty());
            if answer.first() == Some(&7) && answer[1] == 0 {
                handle = answer[8..16].try_into().ok();
            }
        }
    }
    handle
}

fuzz_target!(|data: &[u8]| {
    let mut site = Site::new();
    greet(&mut site);
    let mut handle = drain(&mut site).unwrap_or([0; 8]);
    let mut rest = data;
    while let [what, len, tail @ ..] = rest {
        let (command, after) = tail.split_at(tail.len().min(usize::from(*len)));
        rest = after;
        match what % 16 {
            0 => site.poll(),
            1 => site.die(),
            2 => handle = drain(&mut site).unwrap_or(handle),
            // Where commands have handles: the one that is known.
            3..=8 if command.len() >= 16 => {
                let mut command = command.to_vec();
                command[8..16].copy_from_slice(&handle);
                put(&mut site, usize::from(what % 2), &command);
            }
            _ => put(&mut site, usize::from(what % 2), command),
        }
    }
    site.check(data.len() % 32 == 31);
});
