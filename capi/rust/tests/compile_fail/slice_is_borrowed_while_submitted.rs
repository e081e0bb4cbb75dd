//! E0502
use trtxpy::{Graph, Result, Tensor};

pub fn run(graph: &Graph<'_>, x: &Tensor<'_>, y: &mut Tensor<'_>) -> Result<()> {
    let slice = y.as_mut_slice::<f32>()?;
    #[cfg(not(fail))]
    slice.fill(1.0);
    graph.dispatch(&[("x", x)], &[("y", y)])?;
    #[cfg(fail)]
    slice.fill(1.0);
    Ok(())
}
