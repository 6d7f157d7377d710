//! Tests of schema against real servers.
