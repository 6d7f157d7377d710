//! Tests of check against real servers.
