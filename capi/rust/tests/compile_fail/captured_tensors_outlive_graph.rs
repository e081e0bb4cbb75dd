//! E0505
use trtxpy::{Graph, Result};

pub fn run(graph: Graph<'_>) -> Result<()> {
    let (inputs, _outputs) = graph.create_tensors(&[("x", &[1])])?;
    #[cfg(fail)]
    drop(graph);
    inputs[0].read_vec::<f32>()?;
    Ok(())
}
