//! Run a model on ones and print what comes out.
//!
//! `cargo run --example dispatch -- MODEL [--accelerated] [--fallback]`. MODEL: ONNX or a plan. --accelerated: on a GPU, with
//! the Cargo feature `gpu`; --fallback: else on the mock.

use std::process::ExitCode;

use trtxpy::{Backend, DType, DispatchOptions, Error, GraphOptions, Location, Options, Result, Runtime, Tensor};

fn main() -> ExitCode {
    let (flags, paths): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let [path] = &paths[..] else {
        eprintln!("usage: dispatch MODEL [--accelerated] [--fallback]");
        return ExitCode::from(2);
    };
    let has = |flag: &str| flags.iter().any(|each| each == flag);
    let options = Options {
        accelerated: has("--accelerated"),
        fallback: has("--fallback").then_some(Backend::Mock),
        ..Options::default()
    };
    match run(path, &options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &str, options: &Options) -> Result<()> {
    let runtime = Runtime::new()?;
    let context = runtime.context(options)?;
    let info = context.info()?;
    println!("{:?}: {} on {}, TensorRT {}", context.backend(), info.backend, info.device_name, info.tensorrt_version);
    if let Some(reason) = context.fallback_reason() {
        println!("a fallback, because: {reason}");
    }
    let graph = context.graph_from_file(path, &GraphOptions::default())?;

    let mut inputs = Vec::new();
    for input in graph.inputs() {
        let shape: Vec<i64> = input.shape.iter().map(|axis| (*axis).max(1)).collect(); // 1 for what is not fixed
        println!("input {}: {} {:?} of {:?}", input.name, input.dtype, shape, input.shape);
        let tensor = context.tensor(input.dtype, &shape, Location::Host)?;
        fill(&tensor)?;
        inputs.push((input.name.as_str(), tensor));
    }
    let mut outputs = Vec::new();
    for output in graph.outputs() {
        let shape: Vec<i64> = output.shape.iter().map(|axis| (*axis).max(1)).collect();
        outputs.push((output.name.as_str(), context.tensor(output.dtype, &shape, Location::Host)?));
    }

    let given: Vec<_> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let found: Vec<_> = outputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
    graph.dispatch_with(&given, &found, &DispatchOptions { resize_outputs: true, ..DispatchOptions::default() })?;

    for (name, tensor) in &outputs {
        let shape = tensor.shape()?;
        let mut bytes = vec![0; tensor.byte_len()?];
        tensor.read_bytes(&mut bytes)?;
        let elements = shape.iter().product::<i64>() as usize;
        let values = tensor.dtype().to_f32(&bytes, elements).unwrap_or_default();
        println!("output {name}: {} {shape:?}: {:?}", tensor.dtype(), &values[..values.len().min(10)]);
    }
    Ok(())
}

/// With ones where that is simple, else zeros, which it has already.
fn fill(tensor: &Tensor<'_>) -> Result<()> {
    let elements = tensor.shape()?.iter().product::<i64>();
    let elements = usize::try_from(elements)
        .map_err(|_| Error { status: trtxpy::Status::Shape, message: format!("{tensor:?} has no size") })?;
    match tensor.dtype() {
        DType::Float32 => tensor.write_slice(&vec![1.0_f32; elements]),
        DType::Int32 => tensor.write_slice(&vec![1_i32; elements]),
        DType::Int64 => tensor.write_slice(&vec![1_i64; elements]),
        _ => Ok(()),
    }
}
