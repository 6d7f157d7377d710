//! Sessions of clients, as pg_stat_activity tells them from our own and from the server's.

/// A condition on pg_stat_activity: a client session but our own and our runner's. What kind of
/// backend another role's session is stays hidden from roles without pg_read_all_stats: it counts
/// as a client unless it has no role (autovacuum) or is a walsender.
pub const CLIENT: &str = "(backend_type = 'client backend' or backend_type is null \
        and usesysid is not null \
        and pid not in (select w.pid from pg_catalog.pg_stat_get_wal_senders() w)) \
     and pid <> pg_catalog.pg_backend_pid() and application_name is distinct from 'walferry' \
     and application_name is distinct from pg_catalog.current_setting('application_name')";
