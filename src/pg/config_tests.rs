//! Tests of reading connection strings with an environment.

use super::*;

fn with(text: &str, environment: &[(&str, &str)]) -> Result<Config> {
    let get = |name: &str| {
        environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
    };
    Config::parse_with(text, &get)
}

fn hosts(config: &Config) -> Vec<(&str, u16)> {
    config.hosts.iter().map(|h| (h.host.as_str(), h.port)).collect()
}

#[test]
fn libpqs_defaults_fill_what_nobody_gave() {
    let config = with("postgres://", &[]).unwrap();
    // By its socket, where a server of this machine has one.
    assert!(["localhost", "/var/run/postgresql", "/tmp"].contains(&hosts(&config)[0].0));
    assert_eq!(hosts(&config)[0].1, 5432);
    assert_eq!(hosts(&with("port=1", &[]).unwrap()), [("localhost", 1)]);
    assert_eq!(config.dbname, config.user);
    assert!(!config.user.is_empty());
    assert_eq!(config.ssl_mode, SslMode::Prefer);
    assert_eq!(config.connect_timeout, crate::limit::CONNECT_TIMEOUT);
    assert_eq!(with("user=ann", &[]).unwrap().dbname, "ann");
}

#[test]
fn a_service_that_would_say_where_is_not_passed_over() {
    let service = [("PGSERVICE", "shop")];
    let said = with("dbname=a", &service).unwrap_err().to_string();
    assert!(said.contains("PGSERVICE"), "{said}");
    assert!(with("host=h dbname=a", &service).is_ok());
}

#[test]
fn a_host_that_nobody_named_is_this_one_by_its_socket() {
    let dir = std::env::temp_dir().join(format!("walferry-sockets-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join(".s.PGSQL.7"), "").unwrap();
    let name = dir.display().to_string();
    assert_eq!(default_host(7, &["/nowhere", &name]), name);
    assert_eq!(default_host(8, &["/nowhere", &name]), "localhost");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn variables_fill_gaps_and_the_text_wins() {
    let environment = [
        ("PGHOST", "a,b"),
        ("PGHOSTADDR", ""),
        ("PGPORT", "1,2"),
        ("PGUSER", "ann"),
        ("PGDATABASE", "shop"),
        ("PGPASSWORD", "secret"),
        ("PGSSLMODE", "require"),
        ("PGCHANNELBINDING", "require"),
        ("PGTARGETSESSIONATTRS", "standby"),
        ("PGCONNECT_TIMEOUT", "3"),
        ("PGOPTIONS", "-c x=y"),
        ("PGAPPNAME", "app"),
    ];
    let config = with("", &environment).unwrap();
    assert_eq!(hosts(&config), [("a", 1), ("b", 2)]);
    assert_eq!((config.user.as_str(), config.dbname.as_str()), ("ann", "shop"));
    assert_eq!(config.password.as_ref().unwrap().expose_secret(), "secret");
    assert_eq!(config.ssl_mode, SslMode::Require);
    assert_eq!(config.channel_binding, ChannelBinding::Require);
    assert_eq!(config.target_session_attrs, TargetSessionAttrs::Standby);
    assert_eq!(config.connect_timeout, Duration::from_secs(3));
    assert_eq!(config.options.as_deref(), Some("-c x=y"));
    assert_eq!(config.application_name.as_deref(), Some("app"));
    let config = with("postgres://bob:x@h:9/d?sslmode=disable", &environment).unwrap();
    assert_eq!(hosts(&config), [("h", 9)]);
    assert_eq!((config.user.as_str(), config.dbname.as_str()), ("bob", "d"));
    assert_eq!(config.password.as_ref().unwrap().expose_secret(), "x");
    assert_eq!(config.ssl_mode, SslMode::Disable);
}

#[test]
fn one_port_serves_all_hosts_and_addresses_belong_to_names() {
    let config = with("host=a,b hostaddr=10.0.0.1,10.0.0.2 port=7", &[]).unwrap();
    assert_eq!(hosts(&config), [("a", 7), ("b", 7)]);
    assert_eq!(config.hosts[1].hostaddr.as_deref(), Some("10.0.0.2"));
    let config = with("hostaddr=::1", &[("PGHOST", "")]).unwrap();
    assert_eq!(hosts(&config), [("::1", 5432)]);
    assert!(with("host=h", &[("PGHOSTADDR", "10.9.9.9")]).unwrap().hosts[0].hostaddr.is_none());
    for bad in ["host=a,b port=1,2,3", "host=a,b hostaddr=1,2,3", "port=x", "port=0", "port=70000"]
    {
        assert!(with(bad, &[]).is_err(), "{bad}");
    }
}

#[test]
fn wrong_values_name_the_key_or_the_variable_they_came_from() {
    let said = |text, environment| with(text, environment).unwrap_err().to_string();
    let text = said("sslmode=verify_full", &[]);
    assert!(text.contains("connection string: sslmode") && text.contains("\"verify-full\"?"));
    assert!(said("", &[("PGSSLMODE", "yes")]).starts_with("PGSSLMODE must be one of disable"));
    assert!(said("", &[("PGPORT", "abc")]).starts_with("PGPORT is not a number"));
    assert!(said("connect_timeout=soon", &[]).contains("connect_timeout"));
    assert!(said("gssencmode=require", &[]).contains("GSSAPI is not spoken"));
    assert!(said("sslrootcert=system sslmode=require", &[]).contains("verify-full"));
    assert!(said("ssl_max_protocol_version=TLSv1.1", &[]).contains("leaves no version"));
    assert!(said("require_auth=md5,!none", &[]).contains("require_auth must list"));
}

#[test]
fn the_systems_authorities_mean_verify_full() {
    assert_eq!(with("sslrootcert=system", &[]).unwrap().ssl_mode, SslMode::VerifyFull);
}

#[test]
fn required_authentication_is_a_list_of_what_will_do_or_will_not() {
    let allowed = |text: &str, method| with(text, &[]).unwrap().require_auth.allows(method);
    assert!(allowed("", "password"));
    assert!(allowed("require_auth=md5,scram-sha-256", "md5"));
    assert!(!allowed("require_auth=scram-sha-256", "md5"));
    assert!(!allowed("require_auth=!password", "password"));
    assert!(allowed("require_auth=!password", "md5"));
}

#[test]
fn no_form_for_people_shows_the_password() {
    let config = with("postgres://u:hush@h/d", &[]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));
    assert_eq!(config.to_string(), "host=h port=5432 user=u dbname=d password=*** sslmode=prefer");
}

#[test]
fn a_child_process_gets_the_same_connection_through_its_environment() {
    let text = "postgres://u:p@h1:1,h2:2/d?sslmode=verify-ca&sslrootcert=/r&options=-c%20a%3Db";
    let first = with(text, &[]).unwrap();
    let variables = first.to_env();
    let again = Config::parse_with("", &|name| {
        variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    });
    let again = again.unwrap();
    assert_eq!(again.hosts, first.hosts);
    assert_eq!((&again.user, &again.dbname), (&first.user, &first.dbname));
    assert_eq!(again.password.unwrap().expose_secret(), "p");
    assert_eq!(again.ssl_mode, first.ssl_mode);
    assert_eq!(again.ssl_root_cert, first.ssl_root_cert);
    assert_eq!(again.options, first.options);
    assert_eq!(again.connect_timeout, first.connect_timeout);
}
