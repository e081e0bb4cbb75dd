//! Graphs, and requests that are waited for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use trtxpy::{DType, DispatchOptions, GraphOptions, Location, Status, SubmitOptions, Tensor};

use super::floats;
use crate::common::{block_on, scratch};

#[test]
fn a_graph_says_what_it_takes_and_gives() {
    let kit = kit!();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let input = graph.inputs().next().unwrap();
    assert_eq!((graph.inputs().len(), graph.outputs().len()), (1, 1));
    assert_eq!((input.name.as_str(), input.dtype, &input.shape[..]), ("x", DType::Float32, &[-1, 4][..]));
    assert_eq!(graph.output_shapes(&[("x", &[3, 4])]).unwrap(), [[3, 4]]);
    graph.prepare(&[("x", &[2, 4])]).unwrap();
    assert_eq!(graph.prepare(&[("z", &[2, 4])]).unwrap_err().status, Status::NotFound);
    assert_eq!(graph.prepare(&[("x\0", &[2, 4])]).unwrap_err().status, Status::InvalidArgument);
    assert!(format!("{graph:?}").contains("\"x\""), "{graph:?}");
}

#[test]
fn plans_and_files_are_graphs_too() {
    let kit = kit!();
    let context = kit.context();
    let plan = kit.graph(&context, DType::Float32, &[1, 4]).plan().unwrap();
    let graph = context.graph_from_plan(&plan, &GraphOptions::default()).unwrap();
    let (x, y) = (floats(&context, [1.0, 2.0, 3.0, 4.0]), floats(&context, [0.0; 4]));
    graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap();
    assert_eq!(y.read_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    for (name, content) in [("a.plan", &plan), ("a.onnx", &(kit.identity)(DType::Float32, &[1, 4]))] {
        let path = scratch(name);
        std::fs::write(&path, content).unwrap();
        let graph = context.graph_from_file(&path, &GraphOptions::default()).unwrap();
        assert_eq!(graph.inputs().next().unwrap().name, "x");
    }
    let error = context.graph_from_file("/nowhere/model.onnx", &GraphOptions::default()).unwrap_err();
    assert_eq!(error.status, Status::NotFound);
    let error = context.graph_from_onnx(b"nonsense", None, &GraphOptions::default()).unwrap_err();
    assert_eq!(error.status, Status::Parse);
    assert!(!error.message.is_empty());
    assert_eq!(context.graph_from_plan(b"nonsense", &GraphOptions::default()).unwrap_err().status, Status::Plan);
    assert!(context.graph_from_onnx(b"", None, &GraphOptions::default()).is_err());
}

#[test]
fn dispatch_runs_the_graph() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let (x, y) = (floats(&context, [1.0, -2.0, 3.5, 0.0]), floats(&context, [0.0; 4]));
    graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap();
    assert_eq!(y.read_vec::<f32>().unwrap(), [1.0, -2.0, 3.5, 0.0]);
    assert_eq!(graph.statistics().unwrap().completed, 1);
    assert_eq!(context.statistics().unwrap().tensors, 2);
    drop((x, y));
    drop(graph);
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn what_does_not_fit_a_graph_is_refused() {
    let kit = kit!();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let refused = |inputs: &[(&str, &Tensor<'_>)], outputs: &[(&str, &Tensor<'_>)]| {
        let status = graph.dispatch(inputs, outputs).unwrap_err().status;
        assert_eq!(graph.submit(inputs, outputs).unwrap_err().status, status);
        status
    };
    assert_eq!(refused(&[("z", &x)], &[("y", &y)]), Status::NotFound);
    assert_eq!(refused(&[("x", &x)], &[("a\0", &y)]), Status::InvalidArgument);
    assert_eq!(refused(&[], &[("y", &y)]), Status::InvalidArgument);
    assert_eq!(refused(&[("x", &x)], &[("y", &x)]), Status::Busy);
    let integers = context.tensor_from(&[1, 4], &[1_i32; 4]).unwrap();
    assert_eq!(refused(&[("x", &integers)], &[("y", &y)]), Status::DType);
    let long = context.tensor(DType::Float32, &[1, 5], Location::Host).unwrap();
    assert_eq!(refused(&[("x", &long)], &[("y", &y)]), Status::Shape);
    let other = kit.context();
    let foreign = floats(&other, [0.0; 4]);
    assert_eq!(refused(&[("x", &foreign)], &[("y", &y)]), Status::InvalidArgument);
}

#[test]
fn outputs_are_resized_if_asked_for() {
    let kit = kit!();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let x = context.tensor_from(&[3, 4], &[2.0_f32; 12]).unwrap();
    let y = context.tensor(DType::Float32, &[1, 1], Location::Host).unwrap();
    assert_eq!(graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap_err().status, Status::Shape);
    let options = DispatchOptions { resize_outputs: true, ..DispatchOptions::default() };
    graph.dispatch_with(&[("x", &x)], &[("y", &y)], &options).unwrap();
    assert_eq!((y.shape().unwrap(), y.read_vec::<f32>().unwrap()), (vec![3, 4], vec![2.0; 12]));
    y.resize(&[0]).unwrap();
    let request = graph.submit_with(&[("x", &x)], &[("y", &y)], &SubmitOptions { resize_outputs: true }).unwrap();
    request.wait().unwrap();
    assert_eq!(y.shape().unwrap(), [3, 4]);
}

#[test]
fn many_threads_use_one_graph() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for number in 0..8 {
            let (context, graph, done) = (&context, &graph, &done);
            scope.spawn(move || {
                let (x, y) = (floats(context, [number as f32; 4]), floats(context, [0.0; 4]));
                for round in 0..50 {
                    if round % 2 == 0 {
                        graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap();
                    } else {
                        block_on(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap()).unwrap();
                    }
                    assert_eq!(y.read_vec::<f32>().unwrap(), [number as f32; 4]);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(done.into_inner(), 400);
    assert_eq!(graph.statistics().unwrap().completed, 400);
    drop(graph);
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn a_timeout_cancels() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let mut options = DispatchOptions { timeout: Some(Duration::from_millis(1)), ..DispatchOptions::default() };
    let error = graph.dispatch_with(&[("x", &x)], &[("y", &y)], &options).unwrap_err();
    assert_eq!(error.status, Status::Timeout, "{error}");
    drop(y); // in flight still
    let y = floats(&context, [0.0; 4]);
    options.timeout = Some(Duration::from_secs(60));
    graph.dispatch_with(&[("x", &x)], &[("y", &y)], &options).unwrap();
    assert_eq!(y.read_vec::<f32>().unwrap(), [1.0; 4]);
    drop((x, y));
    drop(graph);
    drop(context);
    kit.settles(before);
}

#[test]
fn a_thousand_cycles_leave_nothing() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    for cycle in 0..1000 {
        let (x, y) = (floats(&context, [cycle as f32; 4]), floats(&context, [0.0; 4]));
        match cycle % 4 {
            0 => graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap(),
            1 => drop(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap()),
            2 => drop(block_on(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap()).unwrap()),
            _ => {
                let queue = context.queue().unwrap();
                let _ = graph.submit_to(&queue, 1, &[("x", &x)], &[("y", &y)], &SubmitOptions::default()).unwrap();
            }
        }
        if cycle % 50 == 0 {
            let other = kit.context();
            kit.graph(&other, DType::Float32, &[1, 4]).plan().unwrap();
        }
    }
    drop(graph);
    drop(context);
    kit.settles(before);
}
