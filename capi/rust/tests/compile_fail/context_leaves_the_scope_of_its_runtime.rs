//! E0597
use trtxpy::{Context, Options, Result, Runtime};

pub fn run() -> Result<()> {
    #[cfg(not(fail))]
    let runtime = Runtime::new()?;
    let context: Context<'_>;
    {
        #[cfg(fail)]
        let runtime = Runtime::new()?;
        context = runtime.context(&Options::default())?;
    }
    context.info()?;
    Ok(())
}
