//! E0505
use trtxpy::{Context, GraphOptions, Result};

pub fn run(context: Context<'_>) -> Result<()> {
    let graph = context.graph_from_file("model.onnx", &GraphOptions::default())?;
    #[cfg(fail)]
    drop(context);
    graph.plan()?;
    Ok(())
}
