//! stub
use super::server::Server;
pub struct Pgbouncer; impl Pgbouncer{pub fn start(_:&Server,_:&str)->std::io::Result<Self>{todo!()} pub fn uri(&self,_:&str)->String{todo!()} pub fn admin_uri(&self)->String{todo!()} pub fn ini_path(&self)->&std::path::Path{todo!()}}
