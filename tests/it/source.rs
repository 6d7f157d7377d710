//! Tests of source against real servers.
