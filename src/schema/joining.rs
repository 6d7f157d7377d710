//! Tables that come to the source while it is followed: made on the target with their indexes,
//! empty, before anything of them is copied.
//!
//! pg_dump says how, as of the whole schema. All of a table is made in one transaction, in which
//! nobody else sees it; nothing of it survives a crash, and the next look begins anew.

use std::collections::HashMap;

use super::plan::{self, PostPhase};
use super::pre::{check_roles, known_settings, with_settings};
use super::{Error, Options, Result, dump, older, script};
use crate::id::QualifiedName;
use crate::pg::{Config, Session};

/// The statements of one transaction that makes `tables`, which the target lacks, as the source has
/// them now: columns, defaults, sequences of theirs, rights, indexes, the constraints that have
/// one, CHECK and replica identity. Foreign keys, triggers, rules and policies are left out.
///
/// Runs pg_dump. Errors: those of [`dump::dump`]; `Roles` and `TooNew` where the target lacks what
/// they speak of.
pub async fn making(
    source: (&Config, u32),
    target: &mut Session,
    tables: &[QualifiedName],
    options: &Options,
) -> Result<Vec<String>> {
    let (config, source_major) = source;
    let mut dump = dump::dump_tables(config, tables, options).await?;
    let major = target.major_version();
    if major < source_major {
        let fitted = older::fit(&dump, major).map_err(Error::Script)?;
        if !fitted.refused.is_empty() {
            let (peer, objects) = (target.peer().to_string(), fitted.refused);
            return Err(Error::TooNew { peer, major, objects });
        }
        dump = fitted.dump;
    }
    check_roles(target, &dump).await?;
    let known = known_settings(target).await?;
    let mut statements = script::statements(&dump.pre)?;
    let steps = plan::steps(&dump.post, &HashMap::new())?;
    let built = steps.into_iter().filter(|step| step.wave.phase() == PostPhase::Indexes);
    statements.extend(built.map(|step| step.statement));
    Ok(with_settings(statements, &known))
}
