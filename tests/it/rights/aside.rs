//! Triggers and foreign keys without session_replication_role.
