//! E0505
use trtxpy::{Graph, Result, Tensor};

pub fn run(graph: Graph<'_>, x: &Tensor<'_>, y: &Tensor<'_>) -> Result<()> {
    let request = graph.submit(&[("x", x)], &[("y", y)])?;
    #[cfg(fail)]
    drop(graph);
    request.wait()?;
    Ok(())
}
