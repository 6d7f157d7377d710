//! When to let messages gather before they are read. Pure.
//!
//! A walsender flushes its socket once a message, and a reader that waits there is woken for each:
//! that costs the source's kernel more than decoding does (100k small transactions on loopback:
//! 2.9 s, 2.4 s of them in the kernel). A reader that comes back after a millisecond finds hundreds
//! of messages, and the walsender writes to a socket at which nobody waits (1.0 s). So while
//! messages come more densely than those of a stream that keeps up, the reader rests before it
//! reads. A Unix-domain socket holds so few messages that the walsender would wait for the reader
//! instead: there it never rests.

use std::time::{Duration, Instant};

/// How long messages gather: the clock's own grain.
const REST: Duration = Duration::from_millis(1);

/// Over what time messages are counted.
const WINDOW: Duration = Duration::from_millis(4);

/// From so many messages a millisecond on they are dense: a walsender that has a backlog sends a
/// few hundred, and 1,000 pgbench transactions a second make 6.
const DENSE: u128 = 50;

/// After so many bytes at once the socket is likely to hold more.
const PLENTY_BYTES: usize = 64 << 10;

/// Watches how densely messages come.
#[derive(Debug)]
pub(super) struct Lull {
    allowed: bool,
    since: Instant,
    messages: u32,
    dense: bool,
    plenty: bool,
}

impl Lull {
    /// Rests only if that is allowed.
    pub fn new(allowed: bool, now: Instant) -> Lull {
        Lull { allowed, since: now, messages: 0, dense: false, plenty: false }
    }

    /// So many messages were read at once, of so many bytes.
    pub fn read(&mut self, messages: u32, bytes: usize, now: Instant) {
        self.messages = self.messages.saturating_add(messages);
        self.plenty = bytes >= PLENTY_BYTES;
        let passed = now.saturating_duration_since(self.since);
        if passed >= WINDOW {
            self.dense = u128::from(self.messages) * 1000 >= DENSE * passed.as_micros();
            (self.since, self.messages) = (now, 0);
        }
    }

    /// How long to rest before the next read, if at all.
    pub fn rest(&self) -> Option<Duration> {
        (self.allowed && self.dense && !self.plenty).then_some(REST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the reader rests after reads of so many messages, a millisecond apart.
    fn rests(allowed: bool, messages: u32, bytes: usize) -> bool {
        let begun = Instant::now();
        let mut lull = Lull::new(allowed, begun);
        for turn in 1..=9 {
            lull.read(messages, bytes, begun + Duration::from_millis(turn));
        }
        lull.rest().is_some()
    }

    #[test]
    fn a_reader_rests_while_messages_are_dense_and_never_at_a_stream_that_keeps_up() {
        assert!(rests(true, 200, 20_000));
        assert!(!rests(true, 12, 1_200));
        assert!(!rests(false, 200, 20_000));
    }

    #[test]
    fn a_reader_does_not_rest_where_more_is_waiting() {
        assert!(!rests(true, 2_000, 128 << 10));
    }

    #[test]
    fn a_reader_rests_no_more_once_the_burst_is_over() {
        let begun = Instant::now();
        let mut lull = Lull::new(true, begun);
        lull.read(1000, 1000, begun + WINDOW);
        assert!(lull.rest().is_some());
        lull.read(1, 100, begun + WINDOW * 3);
        assert!(lull.rest().is_none());
    }
}
