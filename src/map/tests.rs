//! Sections are read as they are meant, and refused where they mean nothing.

use super::*;

fn section(toml: &str) -> Section {
    toml::from_str(toml).unwrap()
}

fn read(toml: &str) -> Result<Map, String> {
    Map::read(&[section(toml)], Some("0123456789abcdef".into())).map(Option::unwrap)
}

fn name(schema: &str, table: &str) -> QualifiedName {
    QualifiedName::new(schema, table)
}

#[test]
fn a_section_says_names_columns_masks_and_rows() {
    let map = read(
        "table = \"shop.customer\"\nto = 'crm.\"Odd.Name\"'\nexclude-columns = [\"ssn\"]\n\
         where = \"region = 'eu'\"\nrename = { full_name = \"name\" }\n\
         mask = { email = \"hash\", phone = \"partial:3,2\", note = \"null\" }\n",
    )
    .unwrap();
    let table = map.of(&name("shop", "customer")).unwrap();
    assert_eq!(table.target, name("crm", "Odd.Name"));
    assert!(table.keeps("email") && !table.keeps("ssn"));
    assert_eq!((table.written("full_name"), table.written("email")), ("name", "email"));
    assert_eq!(table.one_way().len(), 5);
    let all = ["email", "phone", "region", "note"];
    assert_eq!(table.filter_depends(&all), ["region"]);
    assert_eq!(table.depends("email", &all), ["email"]);
    assert!(table.depends("note", &all).is_empty());
    assert!(map.of(&name("shop", "other")).is_none());
    assert!(is_left_out(&table.left_out()) && !is_left_out(&table.target));
}

#[test]
fn a_schema_is_renamed_and_its_tables_sections_add_to_that() {
    let sections = ["table = 'a.*'\nto = 'b.*'", "table = 'a.t'\nmask = {x = 'null'}"].map(section);
    let map = Map::read(&sections, None).unwrap().unwrap();
    assert_eq!(map.target_of(&name("a", "u")), name("b", "u"));
    assert_eq!(map.target_of(&name("a", "t")), name("b", "t"));
    assert_eq!(map.target_of(&name("c", "t")), name("c", "t"));
    assert!(map.of(&name("a", "u")).unwrap().one_way().is_empty());
    assert_eq!(map.patterns(), ["\"a\".\"t\"", "\"a\".*"]);
}

#[test]
fn a_slice_chooses_rows_and_makes_another_map() {
    let shard: Shard = toml::from_str("table = 'a.t'\ncolumn = 'k'\nby = 'mod'").unwrap();
    let typed = Typed { name: "k", type_name: "integer", type_oid: 23 };
    let slices = shard.slices(&typed, 2).unwrap();
    let of = |slice: &Slice, shared| {
        let tables = [(name("a", "t"), Some(slice.clone())), (name("a", "ref"), None)].into();
        Map::sliced(&tables, shared)
    };
    let map = of(&slices[1], true);
    let table = map.of(&name("a", "t")).unwrap();
    assert_eq!(table.condition().unwrap(), "(coalesce((\"k\" % 2 + 2) % 2, 0) = 1)");
    assert_eq!(table.filter_depends(&["k", "x"]), ["k"]);
    assert!(table.shared && table.unsliced().is_some() && table.one_way().len() == 1);
    let filtered = TableMap { filter: Some("x > 1".to_string()), ..table.clone() };
    assert!(filtered.unsliced().is_none(), "the source is asked anyway");
    let both = filtered.condition().unwrap().replace('\n', "");
    assert_eq!(both, "(((x > 1) is true) and (coalesce((\"k\" % 2 + 2) % 2, 0) = 1))");
    let whole = map.of(&name("a", "ref")).unwrap();
    assert!(!whole.chooses() && !whole.computes() && map.of(&name("a", "z")).is_none());
    let digests = [map, of(&slices[0], true), of(&slices[1], false)];
    let digests = digests.map(|map| map.digest().to_string());
    assert!(digests[0] != digests[1] && digests[0] != digests[2], "{digests:?}");
}

#[test]
fn what_means_nothing_is_refused_by_name() {
    for (toml, word) in [
        ("table = 'a'", "schema.table"),
        ("table = 'a.t'\nto = 'b.*'", "all of a schema"),
        ("table = 'a.*'", "other.*"),
        ("table = 'a.*'\nto = 'b.*'\nwhere = 'x'", "for each table"),
        ("table = 'walferry.job'", "no job moves"),
        ("table = 'a.t'\nmask = {x = 'rot13'}", "rot13"),
        ("table = 'a.t'\nmask = {x = 'partial:1'}", "partial"),
        ("table = 'a.t'\nmask = {x = 'sql:'}", "empty"),
        ("table = 'a.t'\nmask = {x = 'sql:walferry_row::text'}", "whole row"),
        ("table = 'a.t'\nwhere = 'U&\"\\0061\" > 1'", "plainly"),
        ("table = 'a.t'\nexclude-columns = ['x']\nmask = {x = 'null'}", "left out as well"),
        ("table = 'a.t'\nexclude-columns = ['x']\ninclude-columns = ['y']", "not both"),
        ("table = 'a.t'\nrename = {x = 'z', y = 'z'}", "two columns become z"),
    ] {
        let refused = read(toml).unwrap_err();
        assert!(refused.contains(word), "{toml}: {refused}");
    }
    let twice = ["table = 'a.t'", "table = '\"a\".t'"].map(section);
    assert!(Map::read(&twice, None).unwrap_err().contains("twice"));
    assert!(toml::from_str::<Section>("table = 'a.t'\nrenames = {}").is_err());
}

#[test]
fn a_key_is_asked_for_where_it_is_needed_and_shown_nowhere() {
    let hash = [section("table = 'a.t'\nmask = {x = 'hash'}")];
    for key in [None, Some("short".into())] {
        assert!(Map::read(&hash, key).unwrap_err().contains("WALFERRY_MAP_KEY"));
    }
    let with = |key: &str| Map::read(&hash, Some(key.into())).unwrap().unwrap();
    let (one, other) = (with("a key of some length"), with("a key of other length"));
    assert_ne!(one.digest(), other.digest());
    assert_eq!(one.digest(), with("a key of some length").digest());
    assert!(!format!("{one:?}").contains("some length"), "{one:?}");
    let settings = one.secret_settings().unwrap();
    assert!(!settings.expose_secret().contains("some length"));
    let plain = [section("table = 'a.t'\nto = 'a.u'")];
    let plain = Map::read(&plain, Some("a key of some length".into())).unwrap().unwrap();
    assert!(plain.secret_settings().is_none());
}

#[test]
fn masks_are_for_types_that_can_hold_them() {
    let typed = |type_name, type_oid| Typed { name: "x", type_name, type_oid };
    let map = |mask: &str| {
        let toml = format!("table = 'a.t'\nmask = {{x = \"{mask}\"}}");
        read(&toml).unwrap().of(&name("a", "t")).unwrap()
    };
    let cut = map("hash").expression(&typed("character varying(20)", 1043)).unwrap();
    assert!(cut.contains("'hex'), 20)") && cut.ends_with("::character varying(20)"), "{cut}");
    assert!(map("hash").expression(&typed("numeric(8,2)", 1700)).is_err());
    assert!(map("hash").expression(&typed("date", 1082)).unwrap_err().contains("date"));
    assert!(map("partial:1,1").expression(&typed("integer", 23)).is_err());
    assert_eq!(map("null").expression(&typed("date", 1082)).unwrap(), "(null)::date");
    let quoted = map("constant:it's").expression(&typed("text", 25)).unwrap();
    assert_eq!(quoted, "('it''s')::text");
    let breaks = |mask: Mask, column: Typed<'_>| mask.breaks_key(&column).is_some();
    assert!(!breaks(Mask::Hash, typed("text", 25)) && !breaks(Mask::Hash, typed("bigint", 20)));
    assert!(breaks(Mask::Hash, typed("integer", 23)) && breaks(Mask::Null, typed("text", 25)));
    assert!(breaks(Mask::Hash, typed("character varying(8)", 1043)));
}
