//! Tests of copy against real servers.
