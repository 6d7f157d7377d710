//! Large and unfinished transactions: sent while in progress or at their commit, kept in memory, on
//! disk, or by the source; the end is the same.

mod equal;
mod measure;
mod streamed;
mod work;
