//! Ports on real sockets and real shared memory: packets arrive whole or not at all, and nothing that the outside does
//! breaks one.
#![cfg(not(loom))]

mod common;

use std::cell::Cell;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use common::memfd;
use proptest::prelude::*;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use snap_dataplane::bell::Bell;
use snap_dataplane::error::Fault;
use snap_dataplane::pony::port::faulty::{Faults, Faulty, Toll};
use snap_dataplane::pony::port::udp::{path_mtu, Udp, MAX_MTU};
use snap_dataplane::pony::port::wire::{self, Shape, Side, Wire};
use snap_dataplane::pony::port::{Address, Port, PortError};
use snap_dataplane::segment::Mapping;

/// Longer than anything takes here; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn udp(mtu: usize) -> Udp {
    Udp::bind(loopback(), 1, mtu).expect("bind")
}

/// Packet `number`: its number as far as that goes, then bytes that depend on it and on their place.
fn fill(frame: &mut [u8], number: u64) {
    for (place, byte) in frame.iter_mut().enumerate() {
        *byte = number.wrapping_mul(31).wrapping_add(place as u64 * 7) as u8;
    }
    if let Some(start) = frame.first_chunk_mut() {
        *start = number.to_le_bytes();
    }
}

fn is_packet(bytes: &[u8], number: u64, len: usize) -> bool {
    let mut expected = vec![0; len];
    fill(&mut expected, number);
    bytes == expected
}

/// Push a packet; false when there is no room.
fn push(port: &mut impl Port, number: u64, len: usize, to: Address, path: u8) -> bool {
    let Some(frame) = port.frame() else {
        return false;
    };
    fill(&mut frame[..len], number);
    port.push(len, to, path);
    true
}

fn readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).expect("poll") == 1
}

/// Receive until `count` packets are there.
fn collect(port: &mut impl Port, count: usize) -> Vec<(Vec<u8>, Address)> {
    let mut packets = Vec::new();
    let limit = Instant::now() + PATIENCE;
    while packets.len() < count {
        let burst = port.receive().expect("receive");
        packets.extend((0..burst).map(|index| port.packet(index)).map(|(bytes, from)| (bytes.to_vec(), from)));
        assert!(Instant::now() < limit, "{} packets of {count} came", packets.len());
        if burst == 0 && port.arm() {
            readable(port.fd(), Duration::from_millis(100));
            port.disarm();
        }
    }
    packets
}

/// Send packets of these sizes, as many at a time as the sockets hold, and check that each arrives as it was sent.
fn carry(from: &mut Udp, to: &mut Udp, sizes: &[usize], paths: u8) {
    let target = to.local().expect("local");
    let mut sent = 0;
    while sent < sizes.len() {
        let first = sent;
        let mut bytes = 0;
        while sent < sizes.len() && bytes < 100_000 && push(from, sent as u64, sizes[sent], target, sent as u8 % paths)
        {
            bytes += sizes[sent] + 1000;
            sent += 1;
        }
        from.flush().expect("flush");
        assert!(from.blocked().is_none());
        let mut packets = collect(to, sent - first);
        assert_eq!(packets.len(), sent - first);
        if paths > 1 {
            // Only packets of one path keep their order.
            packets.sort_by_key(|(bytes, _)| u64::from_le_bytes(*bytes.first_chunk().expect("a number")));
        }
        for (number, (bytes, _)) in (first..sent).zip(&packets) {
            assert!(is_packet(bytes, number as u64, sizes[number]), "packet {number} of {} bytes", sizes[number]);
        }
    }
}

#[test]
fn packets_of_every_size_arrive_whole() {
    let (mut a, mut b) = (udp(9000), udp(9000));
    let sizes: Vec<usize> = (1..=9000).step_by(13).chain([1, 2, 8999, 9000]).collect();
    carry(&mut a, &mut b, &sizes, 1);
    assert_eq!(b.statistics().received_packets, sizes.len() as u64);
    assert_eq!(b.statistics().received_bytes, sizes.iter().sum::<usize>() as u64);
}

#[test]
fn the_longest_packet_of_all_goes() {
    let (mut a, mut b) = (udp(MAX_MTU), udp(MAX_MTU));
    carry(&mut a, &mut b, &[MAX_MTU, 1, MAX_MTU], 1);
}

#[test]
fn a_run_of_one_size_is_one_system_call_and_one_message() {
    let (mut a, mut b) = (udp(1400), udp(1400));
    let sizes: Vec<usize> = [vec![1400; 40], vec![77]].concat();
    carry(&mut a, &mut b, &sizes, 1);
    let (sent, received) = (a.statistics(), b.statistics());
    assert!(sent.merges_sent && received.merges_received, "Linux since 5.0 can");
    assert_eq!((sent.sent_packets, sent.sent_calls, sent.unmerged), (41, 1, 0));
    assert_eq!(received.received_packets, 41);
}

#[test]
fn longer_runs_than_one_message_holds_are_split() {
    let (mut a, mut b) = (udp(100), udp(100));
    carry(&mut a, &mut b, &[100; 700], 1);
    let (mut a, mut b) = (udp(9000), udp(9000));
    carry(&mut a, &mut b, &[9000; 100], 1);
}

#[test]
fn without_merging_packets_are_the_same() {
    let (mut a, mut b) = (udp(1400), udp(1400));
    a.merge_nothing();
    b.merge_nothing();
    carry(&mut a, &mut b, &[vec![1400; 100], vec![3; 100]].concat(), 1);
    assert!(!a.statistics().merges_sent && !b.statistics().merges_received);
}

#[test]
fn merging_can_end_with_packets_waiting() {
    let (mut a, mut b) = (udp(1400), udp(1400));
    let target = b.local().expect("local");
    let sizes = [1400, 1400, 5, 1400];
    for (number, size) in sizes.into_iter().enumerate() {
        assert!(push(&mut a, number as u64, size, target, 0));
    }
    a.merge_nothing();
    a.flush().expect("flush");
    for (number, (bytes, _)) in collect(&mut b, sizes.len()).iter().enumerate() {
        assert!(is_packet(bytes, number as u64, sizes[number]));
    }
}

#[test]
fn ipv6_and_mapped_addresses() {
    let six = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
    let bind = || Udp::bind(six, 1, 1400).expect("bind");
    carry(&mut bind(), &mut bind(), &[1400, 1400, 9], 1);
    // A socket of both families speaks to, and hears from, addresses of IPv4 as such.
    let (mut both, mut four) = (Udp::bind((Ipv6Addr::UNSPECIFIED, 0).into(), 1, 1400).expect("bind"), udp(1400));
    assert!(push(&mut both, 1, 100, four.local().expect("local"), 0));
    both.flush().expect("flush");
    let (_, from) = collect(&mut four, 1).remove(0);
    assert_eq!(from, (loopback().ip(), both.local().expect("local").port()).into());
    assert!(push(&mut four, 2, 100, from, 0));
    four.flush().expect("flush");
    assert_eq!(collect(&mut both, 1).remove(0).1, four.local().expect("local"));
}

#[test]
fn each_path_has_its_source_port() {
    let (mut a, mut b) = (Udp::bind(loopback(), 4, 1400).expect("bind"), udp(1400));
    let target = b.local().expect("local");
    for number in 0..40 {
        assert!(push(&mut a, number, 50, target, number as u8));
    }
    a.flush().expect("flush");
    let mut ports = vec![None; 4];
    for (bytes, from) in collect(&mut b, 40) {
        let number = u64::from_le_bytes(*bytes.first_chunk().expect("a number"));
        assert_eq!(*ports[number as usize % 4].get_or_insert(from), from);
    }
    ports.sort();
    ports.dedup();
    assert_eq!(ports.len(), 4);
    assert!(ports.contains(&Some(a.local().expect("local"))));
    carry(&mut a, &mut b, &[vec![1400; 60], vec![44; 60]].concat(), 4);
}

#[test]
fn a_full_socket_keeps_packets_waiting() {
    // A socket of a name space cannot be full towards one of the same host, as that takes the packets at once; so the way
    // out is made to hold one packet, and is filled from behind by frames of a socket that nobody empties.
    let (mut a, mut b) = (udp(9000), udp(9000));
    let target = b.local().expect("local");
    let mut number = 0;
    while push(&mut a, number, 9000, target, 0) {
        number += 1;
    }
    assert!(a.frame().is_none(), "the room is bounded");
    a.flush().expect("flush");
    assert!(a.frame().is_some(), "what has left makes room");
    let statistics = a.statistics();
    assert_eq!(statistics.sent_packets + statistics.send_drops, number);
    assert_eq!(collect(&mut b, 1).len().min(1), 1);
}

#[test]
fn what_cannot_be_sent_is_dropped_and_the_rest_goes() {
    let (mut a, mut b) = (udp(1400), udp(1400));
    let target = b.local().expect("local");
    let nowhere: SocketAddr = ([255, 255, 255, 255], 9).into(); // Broadcast, which a socket has to be allowed.
    assert!(push(&mut a, 0, 100, target, 0));
    for number in 1..4 {
        assert!(push(&mut a, number, 100, nowhere, 0));
    }
    assert!(push(&mut a, 4, 100, target, 0));
    a.flush().expect("flush");
    let packets = collect(&mut b, 2);
    assert!(is_packet(&packets[0].0, 0, 100) && is_packet(&packets[1].0, 4, 100));
    assert_eq!((a.statistics().sent_packets, a.statistics().send_drops), (2, 3));
}

#[test]
fn sockets_go_on_under_another_port() {
    let (mut a, b) = (udp(1400), udp(1400));
    let target = b.local().expect("local");
    for number in 0..20 {
        assert!(push(&mut a, number, 1400, target, 0));
    }
    a.flush().expect("flush");
    let mut b = Udp::from_fds(b.into_fds(), 1400).expect("the same sockets");
    assert_eq!(b.local().expect("local"), target);
    for (number, (bytes, _)) in collect(&mut b, 20).iter().enumerate() {
        assert!(is_packet(bytes, number as u64, 1400));
    }
}

#[test]
fn lost_packets_are_counted() {
    let (mut a, mut b) = (udp(9000), udp(9000));
    a.merge_nothing();
    let target = b.local().expect("local");
    let mut sent = 0;
    // More than the socket of `b` holds.
    for _ in 0..60 {
        while push(&mut a, sent, 9000, target, 0) {
            sent += 1;
        }
        a.flush().expect("flush");
    }
    let mut received = 0;
    loop {
        match b.receive().expect("receive") {
            0 => break,
            count => received += count as u64,
        }
    }
    assert!(received < sent, "the socket held all of it");
    assert_eq!(b.statistics().receive_drops, sent - received);
}

#[test]
fn datagrams_of_others_are_packets_too() {
    let mut b = udp(1400);
    let stranger = UdpSocket::bind(loopback()).expect("bind");
    let target = b.local().expect("local");
    for bytes in [&[][..], b"x", &[1; 5000]] {
        stranger.send_to(bytes, target).expect("send");
    }
    // The one without a byte has no packet in it.
    let packets = collect(&mut b, 2);
    assert_eq!(packets.iter().map(|(bytes, _)| bytes.len()).collect::<Vec<_>>(), [1, 5000]);
    assert_eq!(packets[0].1, stranger.local_addr().expect("address"));
}

#[test]
fn what_is_no_udp_port_is_refused() {
    assert!(Udp::from_fds(vec![], 1400).is_err());
    assert!(Udp::from_fds(vec![memfd(100)], 1400).is_err());
    assert!(Udp::bind(loopback(), 1, 0).is_err());
    assert!(Udp::bind(loopback(), 1, MAX_MTU + 1).is_err());
}

#[test]
fn the_mtu_of_a_path_is_known() {
    assert!((1200..=MAX_MTU).contains(&path_mtu(([127, 0, 0, 1], 9).into()).expect("IPv4")));
    assert!((1200..=MAX_MTU).contains(&path_mtu((Ipv6Addr::LOCALHOST, 9).into()).expect("IPv6")));
}

/// A formatted wire and what both sides need for it.
struct Cable {
    segment: OwnedFd,
    shape: Shape,
    bells: [Bell; 2],
}

impl Cable {
    fn new(frames: u32, mtu: u32) -> Cable {
        let shape = Shape::new(frames, mtu).expect("shape");
        let segment = memfd(shape.bytes());
        wire::format(segment.as_fd(), shape).expect("format");
        Cable { segment, shape, bells: [(); 2].map(|()| Bell::new().expect("eventfd")) }
    }

    fn open(&self, side: Side) -> Result<Wire, PortError> {
        let [a, b] = [0, 1].map(|end| Bell::duplicate(self.bells[end].as_fd()).expect("dup"));
        let bells = if side == Side::A { (a, b) } else { (b, a) };
        Wire::open(self.segment.as_fd(), self.shape, side, bells, peer())
    }

    fn ends(&self) -> (Wire, Wire) {
        (self.open(Side::A).expect("open"), self.open(Side::B).expect("open"))
    }

    /// The segment as a hostile peer sees it.
    fn memory(&self) -> Mapping {
        Mapping::new(self.segment.as_fd(), self.shape.bytes(), true).expect("map")
    }
}

fn peer() -> Address {
    ([127, 0, 0, 1], 1).into()
}

/// A size for packet `number`, from 8 to `mtu`.
fn size_of_packet(number: u64, mtu: u64) -> usize {
    (8 + number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (mtu - 7)) as usize
}

/// Sleep on a port until it may have something, at most for a moment.
fn rest(port: &mut Wire) {
    if port.arm() {
        readable(port.fd(), Duration::from_secs(10));
    }
    port.disarm();
}

#[test]
fn millions_of_frames_cross_a_wire_between_threads() {
    const COUNT: u64 = 2_000_000;
    const MTU: u64 = 300;
    let cable = Cable::new(256, MTU as u32);
    let (mut a, mut b) = cable.ends();
    let sender = std::thread::spawn(move || {
        let mut number = 0;
        while number < COUNT {
            let burst = number + 1 + number % 40;
            while number < burst.min(COUNT) && push(&mut a, number, size_of_packet(number, MTU), peer(), 0) {
                number += 1;
            }
            a.flush().expect("flush");
            if a.frame().is_none() {
                rest(&mut a);
            }
        }
        a.statistics()
    });
    let mut next = 0;
    while next < COUNT {
        let burst = b.receive().expect("receive");
        for index in 0..burst {
            let (bytes, from) = b.packet(index);
            assert_eq!(from, peer());
            assert!(is_packet(bytes, next, size_of_packet(next, MTU)), "packet {next}");
            next += 1;
        }
        if burst == 0 {
            rest(&mut b);
        }
    }
    let (sent, received) = (sender.join().expect("sender"), b.statistics());
    assert_eq!((sent.sent_packets, sent.sent_bytes), (received.received_packets, received.received_bytes));
    assert_eq!(b.receive().expect("receive"), 0);
}

#[test]
fn a_full_wire_has_no_room_until_the_other_side_took_something() {
    let cable = Cable::new(8, 100);
    let (mut a, mut b) = cable.ends();
    for number in 0..8 {
        assert!(push(&mut a, number, 100, peer(), 0));
    }
    assert!(a.frame().is_none());
    assert_eq!(b.receive().expect("receive"), 0, "nothing is there before it is flushed");
    a.flush().expect("flush");
    assert!(a.frame().is_none());
    assert!(a.arm(), "nothing to do yet");
    assert_eq!(b.receive().expect("receive"), 8);
    assert!(readable(a.fd(), PATIENCE), "room rings the bell");
    a.disarm();
    assert!(a.frame().is_some());
}

#[test]
fn an_armed_side_does_not_sleep_on_what_is_there() {
    let cable = Cable::new(8, 100);
    let (mut a, mut b) = cable.ends();
    assert!(b.arm());
    assert!(push(&mut a, 0, 10, peer(), 0));
    a.flush().expect("flush");
    assert!(readable(b.fd(), PATIENCE));
    b.disarm();
    assert!(!b.arm(), "a packet waits");
    assert_eq!(b.receive().expect("receive"), 1);
    assert!(b.arm());
    assert!(!readable(b.fd(), Duration::ZERO));
}

#[test]
fn another_engine_takes_over_an_end() {
    let cable = Cable::new(16, 100);
    let (mut a, mut b) = cable.ends();
    for round in 0..50 {
        for number in 0..7 {
            assert!(push(&mut a, round * 7 + number, 60, peer(), 0));
        }
        a.flush().expect("flush");
        // Written and not published: gone with whoever wrote it.
        assert!(push(&mut a, 999, 60, peer(), 0));
        drop((a, b));
        (a, b) = cable.ends();
        for (number, (bytes, _)) in (0..).zip(collect(&mut b, 7)) {
            assert!(is_packet(&bytes, round * 7 + number, 60));
        }
    }
}

fn fault<T>(result: Result<T, PortError>) -> Option<Fault> {
    match result {
        Err(PortError::Faulted(fault)) => Some(fault),
        _ => None,
    }
}

#[test]
fn a_segment_of_another_shape_is_refused() {
    let cable = Cable::new(8, 100);
    for (offset, expected) in [(0, Fault::Magic), (8, Fault::Version), (12, Fault::Geometry), (16, Fault::Geometry)] {
        let word = cable.memory();
        let word = word.u32_at(offset);
        word.fetch_xor(1, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(fault(cable.open(Side::A)), Some(expected));
        word.fetch_xor(1, std::sync::atomic::Ordering::Relaxed);
    }
    assert!(cable.open(Side::A).is_ok());
    let small = memfd(cable.shape.bytes() - 1);
    assert_eq!(fault(wire::format(small.as_fd(), cable.shape)), Some(Fault::Geometry));
    for (frames, mtu) in [(0, 100), (3, 100), (1 << 17, 100), (8, 0), (8, (1 << 16) + 1)] {
        assert_eq!(Shape::new(frames, mtu), None);
    }
}

#[test]
fn a_shrunk_segment_is_a_fault() {
    let cable = Cable::new(64, 1000);
    let (mut a, mut b) = cable.ends();
    assert!(push(&mut a, 0, 1000, peer(), 0));
    a.flush().expect("flush");
    rustix::fs::ftruncate(&cable.segment, 0).expect("ftruncate");
    let _ = b.receive();
    assert_eq!(fault(b.receive()), Some(Fault::Shrunk));
    let _ = push(&mut a, 1, 1000, peer(), 0);
    assert!(a.flush().is_err());
}

/// Offsets of the words that a peer can lie in: tail and head of direction 0, and the length of its first frames.
const TAIL: usize = 4096;
const HEAD: usize = 4096 + 64;
const FRAMES: usize = 8192;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn an_impossible_tail_is_a_fault(tail in prop_oneof![0u64..64, any::<u64>()], taken in 0u64..8) {
        let cable = Cable::new(8, 100);
        let (mut a, mut b) = cable.ends();
        for number in 0..taken {
            prop_assert!(push(&mut a, number, 50, peer(), 0));
        }
        a.flush().expect("flush");
        prop_assert_eq!(b.receive().expect("receive") as u64, taken);
        let memory = cable.memory();
        for slot in 0..8 {
            memory.u32_at(FRAMES + slot * 192).store(50, std::sync::atomic::Ordering::Relaxed);
        }
        memory.u64_at(TAIL).store(tail, std::sync::atomic::Ordering::Relaxed);
        match b.receive() {
            Ok(count) => prop_assert_eq!(count as u64, tail - taken),
            Err(error) => {
                prop_assert!(tail.wrapping_sub(taken) > 8);
                prop_assert_eq!(fault::<()>(Err(error)), Some(Fault::Index));
                prop_assert!(b.frame().is_none(), "a broken wire carries nothing");
                prop_assert!(b.flush().is_err() && b.receive().is_err());
                prop_assert!(!b.arm(), "and nobody sleeps on it");
            }
        }
    }

    #[test]
    fn an_impossible_head_is_a_fault(head in prop_oneof![0u64..64, any::<u64>()]) {
        let cable = Cable::new(8, 100);
        let (mut a, _b) = cable.ends();
        for number in 0..8 {
            prop_assert!(push(&mut a, number, 50, peer(), 0));
        }
        a.flush().expect("flush");
        cable.memory().u64_at(HEAD).store(head, std::sync::atomic::Ordering::Relaxed);
        let room = (0..20).take_while(|number| push(&mut a, *number, 50, peer(), 0)).count() as u64;
        if head <= 8 {
            prop_assert_eq!(room, head);
            prop_assert!(a.flush().is_ok());
        } else {
            prop_assert_eq!(room, 0);
            prop_assert_eq!(fault(a.flush()), Some(Fault::Index));
        }
    }

    #[test]
    fn a_length_beyond_the_mtu_is_a_fault(len in prop_oneof![0u32..128, any::<u32>()], slot in 0usize..4) {
        let cable = Cable::new(8, 100);
        let (mut a, mut b) = cable.ends();
        for number in 0..4 {
            prop_assert!(push(&mut a, number, 100, peer(), 0));
        }
        a.flush().expect("flush");
        cable.memory().u32_at(FRAMES + slot * 192).store(len, std::sync::atomic::Ordering::Relaxed);
        match b.receive() {
            Ok(count) => {
                prop_assert!(count == 4 && (1..=100).contains(&len));
                prop_assert_eq!(b.packet(slot).0.len(), len as usize);
            }
            Err(error) => {
                prop_assert!(len == 0 || len > 100);
                prop_assert_eq!(fault::<()>(Err(error)), Some(Fault::Length));
            }
        }
    }

    #[test]
    fn any_page_of_control_words_is_survived(words in proptest::collection::vec((0usize..128, any::<u64>()), 1..20)) {
        let cable = Cable::new(8, 100);
        let (mut a, mut b) = cable.ends();
        let memory = cable.memory();
        for (word, value) in words {
            memory.u64_at(4096 + word * 8).store(value, std::sync::atomic::Ordering::Relaxed);
            for end in [&mut a, &mut b] {
                let _ = push(end, 1, 100, peer(), 0);
                let _ = end.flush();
                let count = end.receive().unwrap_or(0);
                prop_assert!(count <= 64 && (0..count).all(|index| end.packet(index).0.len() <= 100));
                end.arm();
                end.disarm();
            }
            let _ = cable.open(Side::A);
        }
    }
}

/// A clock that moves when it is told to.
#[derive(Clone, Default)]
struct Clock(Rc<Cell<u64>>);

impl Clock {
    fn reader(&self) -> impl Fn() -> u64 {
        let time = self.0.clone();
        move || time.get()
    }
}

/// Send `count` packets of 100 bytes, one each microsecond, through `faults`; what came and when, in microseconds.
fn travel(faults: Faults, seed: u64, count: u64) -> (Vec<(u64, Vec<u8>)>, Toll) {
    let cable = Cable::new(1024, 100);
    let (a, mut b) = cable.ends();
    let clock = Clock::default();
    let mut a = Faulty::new(a, faults, seed, clock.reader());
    let mut arrived = Vec::new();
    for number in 0.. {
        if number < count {
            assert!(push(&mut a, number, 100, peer(), 0));
        } else if a.due().is_none() {
            break;
        }
        a.flush().expect("flush");
        let burst = b.receive().expect("receive");
        arrived.extend((0..burst).map(|index| (number, b.packet(index).0.to_vec())));
        clock.0.set(clock.0.get() + 1000);
    }
    (arrived, a.toll())
}

const BAD: Faults = Faults {
    loss: 0.1,
    duplicate: 0.1,
    corrupt: 0.1,
    reorder: 0.2,
    lateness: 50_000,
    delay: 10_000,
    rate: 0,
    queue: 0,
    stall_every: 0,
    stall: 0,
};

#[test]
fn the_same_seed_gives_the_same_faults() {
    let first = travel(BAD, 1, 2000);
    assert_eq!(first, travel(BAD, 1, 2000));
    assert_ne!(first, travel(BAD, 2, 2000));
}

#[test]
fn each_fault_is_what_it_says() {
    let (arrived, toll) = travel(BAD, 3, 2000);
    let whole = |packet: &[u8]| (0..2000).any(|number| is_packet(packet, number, 100));
    let wrong = arrived.iter().filter(|(_, packet)| !whole(packet)).count() as u64;
    for (count, chance) in [(toll.lost, 0.1), (toll.duplicated, 0.1), (toll.corrupted, 0.1), (toll.reordered, 0.2)] {
        assert!((chance * 1500.0..chance * 2500.0).contains(&(count as f64)), "{toll:?}");
    }
    assert_eq!(arrived.len() as u64, 2000 - toll.lost + toll.duplicated);
    assert!((toll.corrupted..=2 * toll.corrupted).contains(&wrong));
}

#[test]
fn a_perfect_network_changes_nothing() {
    let (arrived, toll) = travel(Faults::default(), 5, 500);
    assert_eq!(toll, Toll::default());
    assert!(arrived.iter().zip(0..).all(|((time, packet), number)| *time == number && is_packet(packet, number, 100)));
    assert_eq!(arrived.len(), 500);
}

#[test]
fn one_fault_more_leaves_the_others() {
    let fewer = travel(Faults { corrupt: 0.0, ..BAD }, 9, 2000);
    let more = travel(BAD, 9, 2000);
    assert_eq!(Toll { corrupted: 0, ..more.1 }, fewer.1);
    assert_eq!(more.0.len(), fewer.0.len());
}

#[test]
fn a_slow_link_takes_its_time_and_has_a_queue() {
    // 100 bytes take two microseconds, and one comes each: half of them leave after the last has come.
    let slow = Faults { rate: 50_000_000, ..Faults::default() };
    let (arrived, toll) = travel(slow, 1, 100);
    assert_eq!(arrived.iter().map(|(time, _)| *time).collect::<Vec<_>>(), (1..=100).map(|n| 2 * n).collect::<Vec<_>>());
    assert_eq!(toll, Toll::default());
    let (arrived, toll) = travel(Faults { queue: 500, ..slow }, 1, 100);
    assert_eq!(arrived.len() as u64, 100 - toll.overflowed);
    assert!((40..=50).contains(&toll.overflowed), "{toll:?}");
}

#[test]
fn a_stalled_link_holds_everything_until_it_moves() {
    let (arrived, _) = travel(Faults { stall_every: 20_000, stall: 15_000, ..Faults::default() }, 1, 40);
    assert_eq!(arrived.len(), 40);
    assert!(arrived.iter().all(|(time, _)| time % 20 < 5));
    assert_eq!(arrived.iter().filter(|(time, _)| *time == 20).count(), 16);
}

/// Packets per second and Gbps of one port to another, each on a thread of its own.
fn race(mut from: impl Port + Send + 'static, mut to: impl Port, target: Address, size: usize) -> (f64, f64) {
    use std::sync::atomic::{AtomicBool, Ordering};
    static STOP: AtomicBool = AtomicBool::new(false);
    STOP.store(false, Ordering::Relaxed);
    let sender = std::thread::spawn(move || {
        while !STOP.load(Ordering::Relaxed) {
            for _ in 0..32 {
                let Some(frame) = from.frame() else {
                    break;
                };
                frame[..size].fill(1);
                from.push(size, target, 0);
            }
            from.flush().expect("flush");
        }
    });
    let start = Instant::now();
    let (mut packets, mut sum) = (0u64, 0u64);
    while start.elapsed() < Duration::from_secs(2) {
        let burst = to.receive().expect("receive");
        sum += (0..burst).map(|index| u64::from(to.packet(index).0[0])).sum::<u64>();
        packets += burst as u64;
    }
    let rate = packets as f64 / start.elapsed().as_secs_f64();
    STOP.store(true, Ordering::Relaxed);
    sender.join().expect("sender");
    assert_eq!(sum, packets);
    (rate, rate * size as f64 * 8e-9)
}

#[test]
#[ignore = "measures"]
fn speed() {
    for size in [64, 1472, 5000, 8972] {
        let (mpps, gbps) = {
            let (a, b) = Cable::new(512, size as u32).ends();
            race(a, b, peer(), size)
        };
        println!("wire          {size:5} B: {:6.2} Mpps {gbps:6.1} Gbps", mpps / 1e6);
        for merge in [true, false] {
            let (mut a, mut b) = (udp(size), udp(size));
            if !merge {
                a.merge_nothing();
                b.merge_nothing();
            }
            let target = b.local().expect("local");
            let (mpps, gbps) = race(a, b, target, size);
            let name = if merge { "UDP merged" } else { "UDP single" };
            println!("{name}    {size:5} B: {:6.2} Mpps {gbps:6.1} Gbps", mpps / 1e6);
        }
    }
}
