//! The job's tables as SQL, and what both sides have. May be run again and again; a schema that is
//! there, made by an administrator perhaps, is used as it is.

/// What both sides have, beside each job's canary: seals, and what a read-only fence replaced.
///
/// The seal's trigger function raises always; whether it stands is decided by the trigger's
/// presence and state, because catalogs are read as they are now even by a transaction whose
/// snapshot is old.
pub const DDL_BOTH: &str = "
do $do$ begin
    if pg_catalog.to_regnamespace('walferry') is null then
        create schema walferry;
        comment on schema walferry is 'made by walferry';
    end if;
end $do$;
create table if not exists walferry.read_only (
    job text primary key, before text, opened_at timestamptz);
create or replace function walferry.seal() returns trigger language plpgsql as $seal$
begin
    -- A stream's session that may not set session_replication_role says so.
    if pg_catalog.current_setting('walferry.applying', true) = 'on' then
        if tg_level = 'STATEMENT' then return null; end if;
        if tg_op = 'DELETE' then return old; end if;
        return new;
    end if;
    if tg_nargs > 0 then
        raise exception 'table %.% is on the other server: it takes no writes here',
            tg_table_schema, tg_table_name
            using errcode = 'read_only_sql_transaction',
                  hint = 'A walferry job switches its tables group by group; its route says where.';
    end if;
    raise exception 'this database has moved: table %.% takes no writes here any more',
        tg_table_schema, tg_table_name
        using errcode = 'read_only_sql_transaction',
              hint = 'Connect to the new server. (A walferry cutover switched it.)';
end $seal$;
";

/// Tables of the home database only.
pub const DDL_HOME: &str = "
create table if not exists walferry.job (
    name text primary key, phase text not null, error text, source_system text, target_system text,
    source text not null, target text not null, options jsonb not null default '{}',
    slot_lsn pg_lsn, armed boolean not null default false, flip jsonb,
    abilities jsonb not null, reading jsonb not null default '{}', spool jsonb, reads jsonb,
    created_at timestamptz not null default now(), updated_at timestamptz not null default now());
do $do$ begin
    if not exists (select from pg_catalog.pg_attribute
            where attrelid = 'walferry.job'::regclass and attname = 'timelines') then
        alter table walferry.job add column timelines jsonb not null default '{}';
    end if;
    if not exists (select from pg_catalog.pg_attribute
            where attrelid = 'walferry.job'::regclass and attname = 'on_conflict') then
        alter table walferry.job add column on_conflict text;
    end if;
    if not exists (select from pg_catalog.pg_attribute
            where attrelid = 'walferry.job'::regclass and attname = 'noted') then
        alter table walferry.job add column noted text;
    end if;
end $do$;
create table if not exists walferry.schema_dump (
    job text primary key, pre text not null, post text not null);
create table if not exists walferry.stream (
    job text not null, stream text not null, received_lsn pg_lsn, decoded_lsn pg_lsn,
    buffered_lsn pg_lsn, applied_lsn pg_lsn, durable_lsn pg_lsn, confirmed_lsn pg_lsn,
    lag_bytes bigint, lag_seconds float8, error text, updated_at timestamptz not null default now(),
    spooled_lsn pg_lsn, spool_bytes bigint, retained_bytes bigint, rows_written bigint,
    primary key (job, stream));
create table if not exists walferry.journal (
    id bigint generated always as identity primary key, job text not null, attempt text not null,
    flip text not null, step text not null, ms float8,
    at timestamptz not null default clock_timestamp());
create table if not exists walferry.ownership (
    job text not null, schema text not null, name text not null, on_target boolean not null,
    switched_by text, lsn pg_lsn, changed_at timestamptz not null default now(),
    primary key (job, schema, name));
create table if not exists walferry.newcomer (
    job text not null, schema text not null, name text not null,
    noted_at timestamptz not null default clock_timestamp(), primary key (job, schema, name));
create table if not exists walferry.large_object (
    job text not null, side text not null, snapshot_xmin bigint, objects bigint,
    primary key (job, side));
create table if not exists walferry.standby (
    job text not null, standby text not null, state text not null, slot_lsn pg_lsn, said text,
    looked_at timestamptz not null default clock_timestamp(), primary key (job, standby));
create table if not exists walferry.command (
    id bigint generated always as identity primary key, job text not null, verb text not null,
    args jsonb not null, state text not null default 'queued', result jsonb, error text,
    created_at timestamptz not null default now(), seen_at timestamptz not null default now());
";
