//! What a job is, from the first look to the end.

pub mod check;
