//! Tests of decode against real servers.
