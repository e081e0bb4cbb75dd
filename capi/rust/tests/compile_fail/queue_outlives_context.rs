//! E0505
use trtxpy::{Context, Result};

pub fn run(context: Context<'_>) -> Result<()> {
    let queue = context.queue()?;
    #[cfg(fail)]
    drop(context);
    queue.take(1)?;
    Ok(())
}
