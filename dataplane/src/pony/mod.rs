//! Pony Express: messages, datagrams and one-sided operations between applications, on one host and between hosts.

mod bursts;
pub mod command;
mod desk;
mod engine;
mod far;
pub mod flow;
mod memory;
mod numbered;
mod outbox;
pub mod port;
mod rows;
mod space;
mod transfers;
mod words;

pub use engine::Pony;
