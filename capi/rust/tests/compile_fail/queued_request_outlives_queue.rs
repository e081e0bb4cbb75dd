//! E0505
use trtxpy::{Graph, Queue, Result, SubmitOptions, Tensor};

pub fn run(graph: &Graph<'_>, queue: Queue<'_>, x: &Tensor<'_>, y: &Tensor<'_>) -> Result<()> {
    let request = graph.submit_to(&queue, 1, &[("x", x)], &[("y", y)], &SubmitOptions::default())?;
    #[cfg(fail)]
    drop(queue);
    request.cancel()?;
    Ok(())
}
