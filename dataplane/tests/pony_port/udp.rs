//! The UDP port on sockets of this host.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;

use rustix::event::{poll, PollFd, PollFlags};
use snap_dataplane::pony::port::udp::{path_mtu, Udp, MAX_MTU};
use snap_dataplane::pony::port::Port;

use super::common::memfd;
use super::{collect, is_packet, loopback, push, udp};

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
fn the_room_for_packets_is_bounded() {
    let (mut a, b) = (udp(9000), udp(9000));
    let target = b.local().expect("local");
    let count = (0..).take_while(|number| push(&mut a, *number, 9000, target, 0)).count() as u64;
    assert!(a.frame().is_none());
    a.flush().expect("flush");
    assert!(a.frame().is_some(), "what has left makes room");
    assert_eq!(a.statistics().sent_packets, count);
}

/// Run the test of this name again, in a network of its own that `setup` (a shell command) has prepared. True in there;
/// false outside, when it has succeeded there, or where nobody may make networks.
fn in_own_network(name: &str, setup: &str) -> bool {
    const INSIDE: &str = "SNAP_TEST_NETWORK";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let inside = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--net", "sh", "-c", command]).env(INSIDE, "1");
        unshare
    };
    if !inside(setup).status().is_ok_and(|status| status.success()) {
        eprintln!("not tested, as no network can be made here: {setup}");
        return false;
    }
    let program = std::env::current_exe().expect("the test program");
    let command = format!("{setup} && exec {} --exact udp::{name} --nocapture", program.display());
    assert!(inside(&command).status().expect("unshare").success());
    false
}

/// A link that is slow and cuts merged packets.
const SLOW: &str = "ip link set lo up mtu 9100 && tc qdisc add dev lo root tbf rate 400mbit burst 10kb latency 10s";

#[test]
fn a_full_socket_keeps_packets_waiting() {
    if !in_own_network("a_full_socket_keeps_packets_waiting", SLOW) {
        return;
    }
    for sizes in [[9000, 9000], [1000, 700]] {
        let (socket, mut b) = (UdpSocket::bind(loopback()).expect("bind"), udp(9000));
        let same = socket.try_clone().expect("dup");
        let mut a = Udp::from_fds(vec![socket.into()], 9000).expect("port");
        set_option(&same, libc::SO_SNDBUF, 20_000);
        let target = b.local().expect("local");
        let (mut sent, mut received) = (0, 0);
        // Never more under way than the socket of `b` holds.
        while a.statistics().send_waits < 100 {
            if a.blocked().is_none() {
                let more = sent + 100_000 / sizes[0] as u64;
                sent +=
                    (sent..more).take_while(|n| push(&mut a, *n, size_of_packet(*n, sizes), target, 0)).count() as u64;
            }
            a.flush().expect("flush");
            wait_for_room(&a);
            received += drain(&mut b, received, sizes);
        }
        while a.blocked().is_some() || received < sent {
            wait_for_room(&a);
            received += drain(&mut b, received, sizes);
            a.flush().expect("flush");
        }
        let statistics = a.statistics();
        assert_eq!((statistics.sent_packets, statistics.send_drops), (sent, 0));
    }
}

fn wait_for_room(port: &Udp) {
    if let Some(socket) = port.blocked() {
        poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::OUT)], None).expect("poll");
    }
}

fn size_of_packet(number: u64, sizes: [usize; 2]) -> usize {
    sizes[number as usize / 50 % 2]
}

/// Check all packets that are there, the first of which has this number; how many there were.
fn drain(port: &mut Udp, first: u64, sizes: [usize; 2]) -> u64 {
    let mut next = first;
    loop {
        let count = port.receive().expect("receive");
        for index in 0..count {
            assert!(is_packet(port.packet(index).0, next, size_of_packet(next, sizes)), "packet {next}");
            next += 1;
        }
        if count == 0 {
            return next - first;
        }
    }
}

fn set_option(socket: &UdpSocket, name: libc::c_int, value: libc::c_int) {
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: reads the bytes of `value`.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const value).cast(), len) };
    assert_eq!(done, 0);
}

#[test]
fn too_long_for_the_path_is_dropped_and_the_rest_goes() {
    if !in_own_network("too_long_for_the_path_is_dropped_and_the_rest_goes", "ip link set lo up mtu 1500") {
        return;
    }
    let (mut a, mut b) = (udp(9000), udp(9000));
    let target = b.local().expect("local");
    assert_eq!(path_mtu(target).expect("path_mtu"), 1472);
    let sizes = [1472, 1472, 1472, 10, 1473, 1473, 1473, 11, 1472, 12];
    for (number, size) in (0..).zip(sizes) {
        assert!(push(&mut a, number, size, target, 0));
    }
    a.flush().expect("flush");
    let arrived: Vec<usize> = collect(&mut b, 7).iter().map(|(bytes, _)| bytes.len()).collect();
    assert_eq!(arrived, [1472, 1472, 1472, 10, 11, 1472, 12]);
    let statistics = a.statistics();
    assert_eq!((statistics.send_drops, statistics.unmerged, statistics.merges_sent), (3, 1, true));
}

#[test]
fn where_merging_is_refused_packets_go_one_by_one() {
    let socket = UdpSocket::bind(loopback()).expect("bind");
    // Linux does not merge for a socket without checksums.
    set_option(&socket, libc::SO_NO_CHECK, 1);
    let (mut a, mut b) = (Udp::from_fds(vec![socket.into()], 1400).expect("port"), udp(1400));
    carry(&mut a, &mut b, &[vec![1400; 30], vec![7]].concat(), 1);
    let statistics = a.statistics();
    assert_eq!((statistics.unmerged, statistics.send_drops), (1, 0));
    for _ in 0..20 {
        carry(&mut a, &mut b, &[9; 50], 1);
    }
    assert!(!a.statistics().merges_sent, "not tried for ever");
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
