//! Requests of control code, as JSON: ways to other hosts come and go, and what is known of them.

use std::collections::HashMap;
use std::net::SocketAddr;

use serde::Deserialize;
use serde_json::{json, Value};

use super::line::Line;
use super::rows::{Attached, HOST};
use super::wires::{Given, Plug};
use crate::pony::command::Status;
use crate::pony::desk::Desk;
use crate::pony::flow::{Algorithm, Nanos, Version, MICROSECOND, MILLISECOND};
use crate::pony::port::faulty::Faults;
use crate::state::{Result, Segment, StateError};

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    Reserve {
        host: String,
    },
    Attach {
        host: String,
        remote: u32,
        address: SocketAddr,
        version: u8,
        mtu: u16,
        algorithm: Name,
        keys: Option<Keys>,
        wire: Option<Given>,
    },
    Refuse {
        host: String,
        why: String,
    },
    Detach {
        host: String,
    },
    Faults(Bad),
    Flows,
    Regions,
}

/// A bad network, for tests and measurements: chances for each packet that goes out, and times. Nothing: none.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Bad {
    seed: u64,
    loss: f64,
    duplicate: f64,
    corrupt: f64,
    reorder: f64,
    lateness_us: u32,
    stall_every_ms: u32,
    stall_ms: u32,
}

impl From<&Bad> for Faults {
    fn from(bad: &Bad) -> Faults {
        Faults {
            loss: bad.loss,
            duplicate: bad.duplicate,
            corrupt: bad.corrupt,
            reorder: bad.reorder,
            lateness: Nanos::from(bad.lateness_us) * MICROSECOND,
            stall_every: Nanos::from(bad.stall_every_ms) * MILLISECOND,
            stall: Nanos::from(bad.stall_ms) * MILLISECOND,
            ..Faults::default()
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    Swift,
    Timely,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    send: String,
    receive: String,
}

/// The shortest packets that are of use, in bytes: what every IPv4 path carries.
const LEAST_MTU: u16 = 508;

fn usage(text: impl Into<String>) -> StateError {
    StateError::Usage(text.into())
}

fn key(hex: &str) -> Result<[u8; 32]> {
    let bytes: Option<Vec<u8>> = (0..hex.len() / 2)
        .map(|i| hex.get(i * 2..i * 2 + 2).and_then(|byte| u8::from_str_radix(byte, 16).ok()))
        .collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| usage("a key is 64 hexadecimal digits"))
}

impl Desk {
    /// Raises `Usage` for what is no request, `Full`.
    pub(in crate::pony) fn control(&mut self, segment: &mut Segment, request: &[u8]) -> Result<Vec<u8>> {
        let request = serde_json::from_slice(request).map_err(|error| usage(format!("not a request: {error}")))?;
        self.far.hold = true;
        let answer = match request {
            Request::Reserve { host } => self.reserve(segment, &host)?,
            Request::Attach { host, remote, address, version, mtu, algorithm, keys, wire } => {
                let version = Version::of(version).ok_or_else(|| usage(format!("there is no version {version}")))?;
                if mtu < LEAST_MTU || usize::from(mtu) > crate::pony::port::udp::MAX_MTU {
                    return Err(usage(format!("packets of {mtu} bytes: at least {LEAST_MTU}")));
                }
                let keys = keys.map(|keys| Ok::<_, StateError>([key(&keys.send)?, key(&keys.receive)?])).transpose()?;
                let algorithm = match algorithm {
                    Name::Swift => Algorithm::Swift,
                    Name::Timely => Algorithm::Timely,
                };
                let plug = wire.map(|given| self.far.wires.open(&given, mtu, address)).transpose()?;
                let wired = plug.is_some();
                let attached = Attached { remote, address, version, algorithm, mtu, keys, wired };
                self.attach(segment, &host, attached, plug)?
            }
            Request::Refuse { host, why } => {
                if let Some(link) = self.far.by_host.get(host.as_bytes()).copied() {
                    self.far.refusals.insert(link, why);
                    if !self.far.lines.contains_key(&link) {
                        self.give_up(segment, link, Status::Unreachable)?;
                    }
                }
                json!({})
            }
            Request::Detach { host } => self.detach(segment, &host)?,
            Request::Faults(bad) => {
                if let Some(port) = &mut self.far.port {
                    port.set(Faults::from(&bad), bad.seed);
                }
                json!({})
            }
            Request::Flows => self.flows(),
            Request::Regions => self.regions(),
        };
        Ok(answer.to_string().into_bytes())
    }

    fn reserve(&mut self, segment: &mut Segment, host: &str) -> Result<Value> {
        if host.is_empty() || host.len() > HOST {
            return Err(usage(format!("a host's name has 1 to {HOST} bytes")));
        }
        let link = match self.far.by_host.get(host.as_bytes()) {
            Some(link) => *link,
            None => self.far.link(segment, host.as_bytes())?,
        };
        // What is under way to the present number still arrives: only the set-up that is attached makes the next one count.
        let salt = self.far.links.get(link).map_or(0, |row| row.salt).wrapping_add(1);
        Ok(json!({ "flow": link | u32::from(salt) << 16 }))
    }

    fn attach(&mut self, segment: &mut Segment, host: &str, attached: Attached, plug: Option<Plug>) -> Result<Value> {
        let link = *self.far.by_host.get(host.as_bytes()).ok_or_else(|| usage(format!("{host}: reserve first")))?;
        let before = self.far.links.get(link).and_then(|row| row.attached);
        self.far.links.update(segment, link, |row| {
            row.salt = row.salt.wrapping_add(1);
            row.attached = Some(attached);
        })?;
        if before.is_some_and(|before| before.room() != attached.room()) {
            self.cut_anew(segment, link)?;
        }
        self.far.refusals.remove(&link);
        self.far.wires.take(link);
        if let Some(plug) = plug {
            self.far.wires.put(link, plug);
        }
        if let Some(row) = self.far.links.get(link) {
            self.far.ready.retain(|other| *other != link);
            self.far.lines.insert(link, Box::new(Line::new(row, attached)));
        }
        self.resync(link);
        Ok(json!({}))
    }

    fn detach(&mut self, segment: &mut Segment, host: &str) -> Result<Value> {
        if let Some(link) = self.far.by_host.get(host.as_bytes()).copied() {
            self.give_up(segment, link, Status::Unreachable)?;
            self.far.unlink(segment, link)?;
        }
        Ok(json!({}))
    }

    fn flows(&self) -> Value {
        let mut connections: HashMap<u32, usize> = HashMap::new();
        for (_, own) in self.connections.iter() {
            *connections.entry(own.link).or_default() += 1;
        }
        let flows: Vec<Value> = self
            .far
            .links
            .iter()
            .map(|(link, row)| {
                let connections = connections.get(&link).copied().unwrap_or(0);
                let host = String::from_utf8_lossy(&row.host);
                let Some(line) = self.far.lines.get(&link) else {
                    let why = self.far.refusals.get(&link);
                    return json!({ "host": host, "connections": connections, "attached": false, "refused": why });
                };
                let (flow, counts) = (&line.flow, line.flow.counts);
                json!({
                    "host": host,
                    "connections": connections,
                    "attached": true,
                    "address": line.attached.address.to_string(),
                    "port": if self.far.wires.has(link) { "shared memory" } else { "udp" },
                    "version": line.attached.version as u8,
                    "mtu": line.attached.mtu,
                    "sealed": line.seal.is_some(),
                    "epoch": row.epoch,
                    "peer_epoch": line.peer_epoch,
                    "window": flow.congestion_window(),
                    "flying": flow.flying(),
                    "rtt_us": flow.rtt.smooth / 1e3,
                    "least_rtt_us": flow.rtt.least() as f64 / 1e3,
                    "path": flow.path.number,
                    "path_changes": flow.path.changes,
                    "sent": counts.sent,
                    "again": counts.again,
                    "spurious": flow.spurious(),
                    "probes": counts.probes,
                    "timeouts": counts.timeouts,
                    "received": counts.received,
                    "duplicates": counts.duplicates,
                    "acks": counts.acks,
                    "bad": line.bad,
                    "queued": line.control.len() + line.bulk.len() + line.asking.len(),
                })
            })
            .collect();
        json!({ "flows": flows })
    }

    fn regions(&self) -> Value {
        let regions: Vec<Value> = self
            .space
            .regions
            .iter()
            .map(|(id, region)| {
                json!({
                    "id": id,
                    "channel": region.channel,
                    "offset": region.piece.offset,
                    "bytes": region.piece.len,
                    "rights": region.rights,
                    "connection": region.connection,
                })
            })
            .collect();
        json!({ "regions": regions })
    }
}
