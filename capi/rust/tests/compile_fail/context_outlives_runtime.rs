//! E0505
use trtxpy::{Options, Result, Runtime};

pub fn run() -> Result<()> {
    let runtime = Runtime::new()?;
    let context = runtime.context(&Options::default())?;
    #[cfg(fail)]
    drop(runtime);
    context.info()?;
    Ok(())
}
