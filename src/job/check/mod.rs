//! stub
use crate::id::JobName; use crate::catalog::Selection; use crate::pg::Config; use super::Result;
#[derive(Debug,Clone,Copy,PartialEq,Eq,serde::Serialize)] pub enum Level{Error,Warning,Info}
#[derive(Debug,Clone,serde::Serialize)] pub struct Finding{pub level:Level,pub object:String,pub message:String,pub fix:Option<String>}
impl std::fmt::Display for Finding { fn fmt(&self,f:&mut std::fmt::Formatter<'_>)->std::fmt::Result{write!(f,"{}",self.message)}}
pub struct Report{pub findings:Vec<Finding>} impl Report{pub fn ready(&self)->bool{true}}
pub struct CheckOptions{pub job:JobName,pub selection:Selection,pub copy_jobs:usize,pub owners:bool}
pub async fn run(_:&Config,_:&Config,_:&CheckOptions)->Result<Report>{todo!()}
