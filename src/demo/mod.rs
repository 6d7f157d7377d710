//! Throw-away servers, a writer, and a comparison that does not use walferry's own: what
//! `walferry demo` shows itself with, and what the tests stand on.

pub mod server;
