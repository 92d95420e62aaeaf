//! Arbitrary packets of another host to an engine of Pony Express: right checksums, anything else.
//!
//! The input is a run of steps: header fields, and frames as payload. Afterwards the engine runs, its state is sound, and
//! another engine can take it over.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;
mod site;

use std::net::UdpSocket;

use libfuzzer_sys::fuzz_target;
use snap_dataplane::pony::flow::{Header, Version};

use site::Site;

const BOUND: &[u8] = &[1, 0, 0, 0, 0, 0, 0, 0, b'b'];
const MTU: usize = 1472;

struct Stranger {
    socket: UdpSocket,
    flow: u32,
    seq: u64,
    epoch: u32,
}

impl Stranger {
    fn new(site: &mut Site) -> Stranger {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
        socket.connect(site.address()).expect("connect");
        let address = socket.local_addr().expect("bound");
        site.control(r#"{"do":"reserve","host":"evil"}"#);
        site.control(&format!(
            r#"{{"do":"attach","host":"evil","remote":5,"address":"{address}","version":2,"mtu":{MTU},"algorithm":"swift"}}"#
        ));
        // The first link, as it was reserved for the first time.
        Stranger { socket, flow: 1 | 1 << 16, seq: 1 << 36, epoch: 1 }
    }

    fn send(&mut self, fields: &[u8], payload: &[u8]) {
        let version = if fields[0] & 128 == 0 { Version::Two } else { Version::One };
        let wild = |byte: u8| match byte % 8 {
            0 => u64::MAX - u64::from(byte),
            1 => 1 << (byte / 4),
            _ => 0,
        };
        self.epoch = self.epoch.wrapping_add(u32::from(fields[0] & 63 == 63));
        let seq = self.seq.wrapping_add(wild(fields[1]));
        let header = Header {
            version,
            flags: fields[0] & 3,
            len: payload.len() as u16,
            flow: self.flow,
            number: seq,
            epoch: self.epoch,
            seq,
            floor: self.seq.wrapping_add(wild(fields[2])),
            ack: u64::from(fields[3]).wrapping_add(wild(fields[4])),
            sent_at: 1,
            echo: u32::from(fields[5]),
            hold: 0,
            queued: wild(fields[5]) as u32,
            sack: [wild(fields[6]), 0, 0, u64::from(fields[7])],
        };
        self.seq += 1;
        let mut packet = vec![0; version.header()];
        packet.extend_from_slice(payload);
        header.write(&mut packet);
        let _ = self.socket.send(&packet);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut site = Site::new();
    site.apps[0].tx.put(1, BOUND).expect("room");
    site.apps[0].tx.publish();
    site.poll();
    let mut stranger = Stranger::new(&mut site);
    let mut rest = data;
    while rest.len() > 9 {
        let (fields, tail) = rest.split_at(8);
        let len = usize::from(tail[0]) * 2;
        let (payload, after) = tail[1..].split_at((tail.len() - 1).min(len));
        rest = after;
        stranger.send(fields, payload);
        if fields[0] & 64 != 0 {
            site.die();
        } else {
            site.poll();
        }
        let mut taken = [0; 2048];
        stranger.socket.set_nonblocking(true).expect("a socket");
        while stranger.socket.recv(&mut taken).is_ok() {}
        while let Ok(Some(_)) = common::take(&mut site.apps[0].rx) {}
    }
    site.check(data.len() % 32 == 31);
});
