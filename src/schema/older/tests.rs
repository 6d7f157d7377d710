//! What becomes of statements.

use super::*;

fn fitted(pre: &str, major: u32) -> Fitted {
    fit(&Dump { pre: pre.to_string(), post: String::new() }, major).unwrap()
}

/// What is made of one statement; empty where it is left out.
fn becomes(sql: &str, major: u32) -> String {
    let fitted = fitted(&format!("{sql};"), major);
    assert_eq!(fitted.refused, [], "{sql}");
    fitted.dump.pre.trim_end().trim_end_matches(';').to_string()
}

#[test]
fn what_says_nothing_of_rows_is_left_out_or_written_the_old_way() {
    let cases = [
        (
            "CREATE TRIGGER a BEFORE INSERT ON public.t FOR EACH ROW EXECUTE FUNCTION f.g()",
            10,
            "CREATE TRIGGER a BEFORE INSERT ON public.t FOR EACH ROW EXECUTE PROCEDURE f.g()",
        ),
        (
            "CREATE TYPE public.r AS RANGE (\n    subtype = timestamp without time zone,\n    \
             multirange_type_name = public.m,\n    subtype_diff = public.d\n)",
            13,
            "CREATE TYPE public.r AS RANGE (\n    subtype = timestamp without time zone, \
             subtype_diff = public.d\n)",
        ),
        (
            "CREATE TABLE public.t (a int)\nWITH (fillfactor='70', vacuum_truncate='off', \
             toast.vacuum_truncate='off')",
            11,
            "CREATE TABLE public.t (a int)\nWITH (fillfactor='70')",
        ),
        (
            "CREATE INDEX i ON public.t USING btree (a) WITH (deduplicate_items='off')",
            12,
            "CREATE INDEX i ON public.t USING btree (a) ",
        ),
        ("GRANT SELECT,MAINTAIN ON TABLE public.t TO a", 16, "GRANT SELECT ON TABLE public.t TO a"),
        ("GRANT MAINTAIN ON TABLE public.t TO a WITH GRANT OPTION", 16, ""),
        ("ALTER TABLE ONLY public.t ALTER COLUMN a SET COMPRESSION lz4", 13, ""),
        ("CREATE STATISTICS public.s (mcv) ON a, b FROM public.t", 11, ""),
        (
            "CREATE STATISTICS public.s (ndistinct) ON a, b FROM public.t",
            11,
            "CREATE STATISTICS public.s (ndistinct) ON a, b FROM public.t",
        ),
        ("CREATE STATISTICS public.s ON a, (b + 1) FROM public.t", 13, ""),
        ("CREATE UNLOGGED SEQUENCE public.s", 14, "CREATE  SEQUENCE public.s"),
    ];
    for (sql, major, expected) in cases {
        assert_eq!(becomes(sql, major), expected);
        assert_eq!(becomes(sql, 18), sql);
    }
}

#[test]
fn what_hangs_on_statistics_left_out_goes_with_them() {
    let made = "CREATE STATISTICS public.s ON (a + 1) FROM public.t;\n";
    let more = "ALTER STATISTICS public.s OWNER TO o;\nCOMMENT ON STATISTICS public.s IS 'x';\n";
    let fitted = fitted(&format!("{made}{more}"), 13);
    assert_eq!(fitted.dump.pre, "");
    assert_eq!(fitted.left_out.len(), 3);
}

#[test]
fn what_would_mean_something_else_is_refused_by_name() {
    let cases = [
        ("CREATE TABLE public.t (a int, b int GENERATED ALWAYS AS (a) STORED)", 11, 12),
        ("CREATE TABLE public.t (a int, b int GENERATED ALWAYS AS ((a + 1)))", 17, 18),
        ("ALTER TABLE ONLY public.t ADD CONSTRAINT u UNIQUE NULLS NOT DISTINCT (a)", 14, 15),
        ("CREATE UNIQUE INDEX u ON public.t USING btree (a) NULLS NOT DISTINCT", 14, 15),
        ("CREATE INDEX u ON public.t USING btree (a) INCLUDE (b)", 10, 11),
        ("ALTER TABLE ONLY public.t ADD CONSTRAINT u UNIQUE (a, v WITHOUT OVERLAPS)", 17, 18),
        (
            "ALTER TABLE ONLY public.t ADD CONSTRAINT u FOREIGN KEY (a, PERIOD v) REFERENCES \
             public.o(a, PERIOD v)",
            17,
            18,
        ),
        ("ALTER TABLE public.t ADD CONSTRAINT u CHECK ((a > 0)) NOT ENFORCED", 17, 18),
        ("CREATE TABLE public.t (a int, CONSTRAINT n NOT NULL a)", 17, 18),
        ("CREATE VIEW public.v WITH (security_invoker='true') AS\n SELECT 1", 14, 15),
        ("CREATE FUNCTION public.f() RETURNS int\n BEGIN ATOMIC\n SELECT 1;\nEND", 13, 14),
    ];
    for (sql, major, since) in cases {
        let found = fitted(&format!("{sql};"), major).refused;
        assert_eq!(found.len(), 1, "{sql}: {found:?}");
        assert_eq!(found[0].since, since, "{sql}");
        assert!(found[0].object.contains("public."), "{sql}: {found:?}");
        assert_eq!(fitted(&format!("{sql};"), since).refused, [], "{sql}");
    }
}

#[test]
fn old_words_and_names_that_look_new_stay() {
    for sql in [
        "CREATE TABLE public.t (a int CONSTRAINT n NOT NULL, period int, include int)",
        "CREATE TABLE public.t (a int GENERATED ALWAYS AS IDENTITY)",
        "ALTER TABLE ONLY public.t ADD CONSTRAINT u UNIQUE (a, period)",
        "COMMENT ON TABLE public.t IS 'NULLS NOT DISTINCT, NOT ENFORCED'",
        "CREATE INDEX i ON public.t USING gin (a) WITH (fastupdate='on')",
        "GRANT SELECT(maintain) ON TABLE public.maintain TO maintain",
    ] {
        assert_eq!(becomes(sql, 10), sql);
    }
}

#[test]
fn what_old_partitioned_tables_cannot_have_is_refused() {
    let tree = "CREATE TABLE public.p (a int) PARTITION BY LIST (a);\n";
    for (sql, since) in [
        ("ALTER TABLE ONLY public.p ADD CONSTRAINT k PRIMARY KEY (a)", 11),
        ("CREATE INDEX i ON ONLY public.p USING btree (a)", 11),
        ("CREATE TRIGGER g BEFORE INSERT ON public.p FOR EACH ROW EXECUTE PROCEDURE f.f()", 13),
        ("ALTER TABLE ONLY public.t ADD CONSTRAINT k FOREIGN KEY (a) REFERENCES public.p(a)", 12),
    ] {
        assert_eq!(fitted(&format!("{tree}{sql};"), since - 1).refused.len(), 1, "{sql}");
        assert_eq!(fitted(&format!("{tree}{sql};"), since).refused, [], "{sql}");
        assert_eq!(fitted(&format!("{sql};"), since - 1).refused, [], "{sql}");
    }
}
