//! Many requests at once, as futures, on an executor of twenty lines.
//!
//! `cargo run --example async -- examples/digits/digits.onnx`: a model with one input and one output of float32.

use std::future::Future;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};
use std::time::Instant;

use trtxpy::{DType, Graph, GraphOptions, Location, Options, Result, Runtime, Tensor};

const REQUESTS: usize = 32;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Run one future on this thread, which sleeps while there is nothing to do.
fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// All of them are in flight before the first is awaited.
async fn run_all(graph: &Graph<'_>, inputs: &[Tensor<'_>], outputs: &[Tensor<'_>]) -> Result<usize> {
    let name_in = graph.inputs().next().map_or("", |input| &input.name);
    let name_out = graph.outputs().next().map_or("", |output| &output.name);
    let mut requests = Vec::new();
    for (input, output) in inputs.iter().zip(outputs) {
        requests.push(graph.submit(&[(name_in, input)], &[(name_out, output)])?);
    }
    let mut captured = 0;
    for request in requests {
        captured += usize::from(request.await?.captured);
    }
    Ok(captured)
}

fn run(path: &str) -> Result<()> {
    let runtime = Runtime::new()?;
    let context = runtime.context(&Options::default())?;
    let graph = context.graph_from_file(path, &GraphOptions::default())?;
    let open = |shape: &[i64]| shape.iter().map(|axis| (*axis).max(1)).collect::<Vec<_>>();
    let shape = graph.inputs().next().map(|input| open(&input.shape)).unwrap_or_default();
    let name = graph.inputs().next().map_or("", |input| &input.name);
    let found = graph.output_shapes(&[(name, &shape)])?.remove(0);
    let tensors = |shape: &[i64]| -> Result<Vec<_>> {
        (0..REQUESTS).map(|_| context.tensor(DType::Float32, shape, Location::Host)).collect()
    };
    let (inputs, outputs) = (tensors(&shape)?, tensors(&found)?);

    let began = Instant::now();
    let captured = block_on(run_all(&graph, &inputs, &outputs))?;
    println!("{REQUESTS} requests in {:?}, {captured} of them through a captured graph", began.elapsed());
    println!("the first: {:?}", outputs[0].read_vec::<f32>()?);
    Ok(())
}

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: async MODEL");
        return ExitCode::from(2);
    };
    match run(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
