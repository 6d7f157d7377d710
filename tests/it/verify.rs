//! Tests of verify against real servers.
