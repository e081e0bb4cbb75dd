//! E0505
use trtxpy::{Context, Result};

pub fn run(context: Context<'_>) -> Result<()> {
    let tensor = context.tensor_from(&[1], &[1.0_f32])?;
    #[cfg(fail)]
    drop(context);
    tensor.read_vec::<f32>()?;
    Ok(())
}
