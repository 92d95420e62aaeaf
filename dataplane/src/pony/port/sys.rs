//! The system calls of UDP ports, in safe clothes: many messages at a time, and socket options.
//!
//! One of the few files with `unsafe`. Nothing that the operating system is given outlives the call.

use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, c_uint, c_void, cmsghdr, iovec, mmsghdr, msghdr, sockaddr_in, sockaddr_in6};

/// Messages that one call carries at most.
pub const BATCH: usize = 32;

/// One message to send: a packet, or packets of `segment` bytes each, of which the last may be shorter.
#[derive(Clone, Copy)]
pub struct Outgoing<'a> {
    pub bytes: &'a [u8],
    pub segment: Option<u16>,
    pub to: SocketAddr,
}

/// One message received: where it came from, and the size of its packets when there are several.
#[derive(Clone, Copy)]
pub struct Incoming {
    pub len: usize,
    pub segment: Option<usize>,
    /// When it reached this host, in ns since 1970, if the socket tells.
    pub arrived: Option<u64>,
    pub cut: bool,
    pub from: SocketAddr,
}

/// An address as sockets write it. All zero is valid: an address of no family.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    family: libc::sa_family_t,
    v4: sockaddr_in,
    v6: sockaddr_in6,
}

/// Room for one control message with a number and one with a time, aligned as `cmsghdr` wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

// SAFETY: arithmetic on lengths.
const CONTROL: usize =
    unsafe { libc::CMSG_SPACE(size_of::<c_int>() as c_uint) + libc::CMSG_SPACE(size_of::<libc::timespec>() as c_uint) }
        as usize;

impl Name {
    fn new(address: SocketAddr) -> (Name, libc::socklen_t) {
        match address {
            SocketAddr::V4(address) => {
                let v4 = sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                    sin_zero: [0; 8],
                };
                (Name { v4 }, size_of::<sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(address) => {
                let v6 = sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                (Name { v6 }, size_of::<sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// None: of a family that is neither IPv4 nor IPv6.
    fn address(&self) -> Option<SocketAddr> {
        // SAFETY: every variant begins with the family, and any bits are valid for all of them.
        match c_int::from(unsafe { self.family }) {
            libc::AF_INET => {
                // SAFETY: any bits are valid.
                let v4 = unsafe { self.v4 };
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: any bits are valid.
                let v6 = unsafe { self.v6 };
                let (ip, port) = (Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port));
                Some(match ip.to_ipv4_mapped() {
                    Some(ip) => SocketAddrV4::new(ip, port).into(),
                    None => SocketAddrV6::new(ip, port, v6.sin6_flowinfo, v6.sin6_scope_id).into(),
                })
            }
            _ => None,
        }
    }
}

/// Send messages, at most `BATCH`; how many went. An error is that of the first, and nothing went.
pub fn send<'a>(fd: BorrowedFd<'_>, messages: impl Iterator<Item = Outgoing<'a>>) -> io::Result<usize> {
    // SAFETY: plain C structures, for which all zero is valid.
    let mut headers: [mmsghdr; BATCH] = unsafe { zeroed() };
    // SAFETY: as above.
    let mut parts: [iovec; BATCH] = unsafe { zeroed() };
    // SAFETY: as above.
    let mut names: [Name; BATCH] = unsafe { zeroed() };
    let mut controls = [Control([0; CONTROL]); BATCH];
    let mut count = 0;
    let places = headers.iter_mut().zip(&mut parts).zip(&mut names).zip(&mut controls);
    for (message, (((header, part), name), control)) in messages.zip(places) {
        let name_len;
        (*name, name_len) = Name::new(message.to);
        *part = iovec { iov_base: message.bytes.as_ptr().cast_mut().cast(), iov_len: message.bytes.len() };
        describe(&mut header.msg_hdr, part, name, name_len);
        if let Some(segment) = message.segment {
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: arithmetic on a length.
            header.msg_hdr.msg_controllen = unsafe { libc::CMSG_SPACE(2) } as _;
            // SAFETY: `control` is aligned, and `CMSG_SPACE(2)` fits in it, so the first header and its two bytes are there.
            unsafe {
                let first: *mut cmsghdr = libc::CMSG_FIRSTHDR(&header.msg_hdr);
                (*first).cmsg_level = libc::SOL_UDP;
                (*first).cmsg_type = libc::UDP_SEGMENT;
                (*first).cmsg_len = libc::CMSG_LEN(2) as _;
                libc::CMSG_DATA(first).cast::<u16>().write_unaligned(segment);
            }
        }
        count += 1;
    }
    // SAFETY: the first `count` headers lead to names, parts and controls that live until the end of this function, and to
    // bytes that are borrowed for `'a`; the call only reads them.
    let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), count, libc::MSG_DONTWAIT as _) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receive up to `BATCH` messages, each into `stride` bytes of `buffer` of its own; appends what came to `incoming`.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], stride: usize, incoming: &mut Vec<Incoming>) -> io::Result<()> {
    // SAFETY: plain C structures, for which all zero is valid.
    let mut headers: [mmsghdr; BATCH] = unsafe { zeroed() };
    // SAFETY: as above.
    let mut parts: [iovec; BATCH] = unsafe { zeroed() };
    // SAFETY: as above.
    let mut names: [Name; BATCH] = unsafe { zeroed() };
    let mut controls = [Control([0; CONTROL]); BATCH];
    let mut count = 0;
    let places = headers.iter_mut().zip(&mut parts).zip(&mut names).zip(&mut controls);
    for (bytes, (((header, part), name), control)) in buffer.chunks_exact_mut(stride).zip(places) {
        *part = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        describe(&mut header.msg_hdr, part, name, size_of::<Name>() as libc::socklen_t);
        header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
        header.msg_hdr.msg_controllen = CONTROL as _;
        count += 1;
    }
    // SAFETY: the first `count` headers lead to names, parts and controls that live until the end of this function, and to
    // distinct pieces of `buffer`, which is borrowed; the call writes within the lengths given.
    let received = unsafe {
        libc::recvmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), count, libc::MSG_DONTWAIT as _, ptr::null_mut())
    };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    incoming.extend(headers.iter().zip(&names).take(received).map(|(header, name)| {
        let (segment, arrived) = said(&header.msg_hdr);
        Incoming {
            len: (header.msg_len as usize).min(stride),
            segment,
            arrived,
            cut: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            from: name.address().unwrap_or(nobody),
        }
    }));
    Ok(())
}

fn describe(header: &mut msghdr, part: &mut iovec, name: &mut Name, name_len: libc::socklen_t) {
    header.msg_name = ptr::from_mut(name).cast();
    header.msg_namelen = name_len;
    header.msg_iov = part;
    header.msg_iovlen = 1;
}

/// The size of the packets that were merged into a message, and when it arrived. `header` is one that `recvmmsg` filled.
fn said(header: &msghdr) -> (Option<usize>, Option<u64>) {
    let (mut segment, mut arrived) = (None, None);
    // SAFETY: the operating system wrote `msg_controllen` bytes of control messages at `msg_control`, whole and aligned.
    let mut next: *const cmsghdr = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: not null, so a whole control message; a segment's size is an `int`, a time a `timespec`.
        unsafe {
            let data = libc::CMSG_DATA(next);
            match ((*next).cmsg_level, (*next).cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    segment = usize::try_from(data.cast::<c_int>().read_unaligned()).ok().filter(|size| *size > 0);
                }
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                    let time = data.cast::<libc::timespec>().read_unaligned();
                    arrived = u64::try_from(time.tv_sec).ok().map(|whole| whole * 1_000_000_000 + time.tv_nsec as u64);
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    (segment, arrived)
}

pub fn set_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: reads `len` bytes of `value`.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, ptr::from_ref(&value).cast(), len) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

pub fn option(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<c_int> {
    options::<1>(fd, level, name).map(|[value]| value as c_int)
}

/// Packets that a socket had no room for, ever.
pub fn overflows(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // The last of the numbers of SO_MEMINFO (SK_MEMINFO_DROPS in linux/sock_diag.h).
    options::<9>(fd, libc::SOL_SOCKET, libc::SO_MEMINFO).map(|numbers| numbers[8])
}

fn options<const N: usize>(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<[u32; N]> {
    let mut values = [0u32; N];
    let mut len = size_of_val(&values) as libc::socklen_t;
    // SAFETY: writes at most `len` bytes to `values`.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, values.as_mut_ptr().cast::<c_void>(), &mut len) };
    if result == 0 {
        Ok(values)
    } else {
        Err(io::Error::last_os_error())
    }
}
