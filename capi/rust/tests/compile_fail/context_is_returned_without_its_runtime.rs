//! E0515
#[allow(unused_imports)]
use trtxpy::{Context, Options, Result, Runtime};

#[cfg(fail)]
pub fn run() -> Result<Context<'static>> {
    let runtime = Runtime::new()?;
    runtime.context(&Options::default())
}

#[cfg(not(fail))]
pub fn run(runtime: &'static Runtime) -> Result<Context<'static>> {
    runtime.context(&Options::default())
}
