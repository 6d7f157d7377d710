-- Changes for every table of a database, whatever it is made of: rows doubled, rows given the values of
-- others, rows touched, deleted, tables truncated. Statements that a constraint or a trigger refuses
-- are part of it: psql goes on, and the server has begun a transaction for nothing.
\set ON_ERROR_STOP 0
\set QUIET on
\o /dev/null
set statement_timeout = '20s';
create temp table round as
select c.oid, format('%I.%I', n.nspname, c.relname) as name, row_number() over (order by c.oid) as nth,
    string_agg(quote_ident(a.attname), ', ' order by a.attnum) as columns
from pg_class c join pg_namespace n on n.oid = c.relnamespace
left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    and a.attgenerated = ''
where c.relkind in ('r', 'p') and c.relpersistence <> 't'
and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') and n.nspname !~ '^pg_'
group by 1, 2, c.oid, n.nspname, c.relname;

-- Each a transaction of its own.
select statement from round, lateral (values
    (1, format('insert into %s default values', name)),
    (2, format('insert into %s (%s) overriding system value select %2$s from only %1$s limit 20',
        name, columns)),
    (3, format('update only %s set (%s) = (select %2$s from only %1$s order by ctid desc limit 1) '
        'where ctid in (select ctid from only %1$s order by ctid limit 3 offset 2)', name, columns)),
    (4, format('update only %s set (%s) = row(%2$s) where ctid in (select ctid from only %1$s '
        'limit 20)', name, columns)),
    (5, format('delete from only %s where ctid in (select ctid from only %1$s offset 5 limit 3)',
        name)),
    (6, format('update %s set (%s) = row(%2$s) where tableoid::int %% 3 = 0 '
        'and pg_relation_size(tableoid) <= 8192', name, columns)),
    (7, case when nth % 17 = 0 then format('truncate only %s', name) end)
) s(step, statement) where statement is not null order by nth, step
\gexec

-- Many tables in one transaction, with parts of it undone; what fails is caught, as PL/pgSQL does.
do $$
declare
    r record;
begin
    for r in select * from round where columns is not null order by nth desc loop
        begin
            execute format('insert into %s (%s) overriding system value select %2$s from only %1$s '
                'order by ctid desc limit 5', r.name, r.columns);
            if r.nth % 5 = 0 then
                raise exception 'undone';
            end if;
        exception when others then null;
        end;
        begin
            execute format('update only %s set (%s) = row(%2$s) where ctid in '
                '(select ctid from only %1$s order by ctid desc limit 5)', r.name, r.columns);
            execute format('delete from only %s where ctid in '
                '(select ctid from only %1$s order by ctid desc limit 1)', r.name);
        exception when others then null;
        end;
    end loop;
end $$;
\o
select count(*) from round;
