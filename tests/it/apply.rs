//! Tests of apply against real servers.
