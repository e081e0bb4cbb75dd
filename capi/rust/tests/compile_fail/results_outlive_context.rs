//! E0505
use trtxpy::{Context, GraphOptions, Result};

pub fn run(context: Context<'_>) -> Result<usize> {
    let results = context.run_zeroed(b"", None, &GraphOptions::default())?;
    #[cfg(fail)]
    drop(context);
    Ok(results.len())
}
