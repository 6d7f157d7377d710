//! What a server says of its own tables and sequences, as plain data.
//!
//! Copy, verify, check and the cutover all ask the same questions, and rooms of one floor do not
//! import each other, so the answers live here, a floor below them. Queries run on PostgreSQL 10
//! to 18 and name every schema, as sessions have an empty search_path. Nothing here writes.

pub mod client;
pub mod describe;
pub mod foreign_key;
pub mod mark;
pub mod publication;
pub mod select;
pub mod sequence;
pub mod table;

pub use client::CLIENT;
pub use describe::describe;
pub use foreign_key::{ForeignKey, foreign_keys};
pub use mark::mark;
pub use publication::{Publication, Published, published_of};
pub use select::{PatternError, Selection};
pub use sequence::{Sequence, sequences};
pub use table::{Column, Named, Table, TableKind, list_of, named, oids, plain_of, tables};
