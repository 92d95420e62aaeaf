//! Pony Express: messages, datagrams and one-sided operations between applications, on one host and between hosts.

pub mod port;
