//! An engine of Pony Express with two applications, on real shared memory, which can die and be replaced.

#![allow(dead_code)] // Each target uses its part.

use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};

use snap_dataplane::core::Role;
use snap_dataplane::engine::{self, Channel, Channels, Engine};
use snap_dataplane::ledger;
use snap_dataplane::state::{verify, Frame, Segment};

use crate::common::{memfd, End, Segments};

const STATE: usize = 256 << 20;
const SLOTS: u32 = 64;
const POOL: usize = 64 * 1024;
pub const ARENA: usize = 64 * 1024;
const BUDGET: usize = 64;

pub struct Site {
    fd: OwnedFd,
    segments: [Segments; 2],
    pub apps: [End; 2],
    socket: UdpSocket,
    engine: Box<dyn Engine>,
    channels: Channels,
    state: Segment,
    generation: u64,
}

impl Site {
    pub fn new() -> Site {
        let fd = memfd(STATE);
        let engine = engine::make("pony").expect("shipped");
        let schema = snap_dataplane::state::Schema { engine: "pony".into(), ..engine.schema() };
        let log = Frame::log_for(fd.as_fd(), &schema).expect("log");
        Frame::format(fd.as_fd(), &schema, log).expect("format");
        let segments = [(), ()].map(|()| Segments::new(SLOTS, POOL, POOL).with_arena(ARENA));
        let apps = [0, 1].map(|index: usize| segments[index].client());
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let state = Segment::open(fd.as_fd(), true).expect("open");
        let mut site = Site { fd, segments, apps, socket, engine, channels: Channels::default(), state, generation: 0 };
        site.serve();
        site
    }

    /// Where packets for the engine go.
    pub fn address(&self) -> std::net::SocketAddr {
        self.socket.local_addr().expect("bound")
    }

    /// An engine takes over from where the last commit left everything.
    pub fn serve(&mut self) {
        self.generation += 1;
        self.engine = engine::make("pony").expect("shipped");
        let socket = self.socket.try_clone().expect("a descriptor");
        self.engine.equip(vec![socket.into()]).expect("a socket");
        self.state = Segment::open(self.fd.as_fd(), true).expect("open");
        self.channels = Channels::default();
        for (index, segments) in self.segments.iter().enumerate() {
            // One that broke its channel is not offered again.
            if let Ok(end) = segments.open(Role::Server, 3) {
                self.channels.attach(Channel::new(index as u64 + 1, end.tx, end.rx, index + 1).expect("a line"));
            }
        }
        ledger::take(&mut self.state, None, self.generation).expect("its own state");
        self.engine.adopt(&mut self.state).expect("what an engine wrote, another can read");
        ledger::take_channels(&mut self.state, self.channels.served());
    }

    pub fn control(&mut self, request: &str) {
        self.engine.control(&mut self.state, request.as_bytes()).expect("a request");
        ledger::commit(&mut self.state, self.channels.served());
    }

    pub fn poll(&mut self) {
        self.engine.poll(&mut self.channels, &mut self.state, BUDGET).expect("nobody ends an engine");
        ledger::commit(&mut self.state, self.channels.served());
        self.channels.take_dropped();
    }

    /// A poll that dies before it is permanent, and the engine with it.
    pub fn die(&mut self) {
        self.engine.poll(&mut self.channels, &mut self.state, BUDGET).expect("nobody ends an engine");
        self.serve();
    }

    /// What the state holds can be taken over; and it is sound, which takes long to find out: only if `thorough`.
    pub fn check(&mut self, thorough: bool) {
        self.poll();
        if thorough {
            assert_eq!(verify(&self.state).expect("readable"), Vec::<String>::new());
        }
        self.serve();
    }
}
