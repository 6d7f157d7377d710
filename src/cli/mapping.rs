//! `[[map]]` of walferry.toml, with the key that hash masks need: of WALFERRY_MAP_KEY, or of a
//! file.

use std::sync::Arc;

use crate::config::{self, File};
use crate::job::store::JobOptions;
use crate::map::Map;
use crate::pg::Config;
use crate::secret::SecretString;

/// Reads `[[map]]`, and the key that it may need.
pub fn read(file: &File) -> Result<Option<Arc<Map>>, config::Error> {
    if file.map.is_empty() {
        return Ok(None);
    }
    let variable = std::env::var("WALFERRY_MAP_KEY").ok().filter(|text| !text.is_empty());
    let key = match (variable, &file.map_key_file) {
        (Some(key), _) => Some(key),
        (None, Some(path)) => {
            let shown = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|source| config::Error::Read { path: shown, source })?;
            Some(text.trim_end_matches(['\n', '\r']).to_string())
        }
        (None, None) => None,
    };
    let map = Map::read(&file.map, key.map(SecretString::from));
    let value = |message| config::Error::Value { option: "[[map]]", message };
    Ok(map.map_err(value)?.map(Arc::new))
}

/// The source as its sessions have to be made for a map with hash masks.
pub fn keyed(source: Config, map: Option<&Map>) -> Config {
    source.with_secret_options(map.and_then(Map::secret_settings))
}

/// What a job with a map cannot be.
pub fn refuse_others(options: &JobOptions) -> Result<(), config::Error> {
    let other = match (&options.map, options.tables_only, &options.publication) {
        (Some(_), true, _) => "--tables-only",
        (Some(_), _, Some(_)) => "--publication",
        _ => return Ok(()),
    };
    let message = "does not go together with [[map]]: leave one of the two out".to_string();
    Err(config::Error::Value { option: other, message })
}
