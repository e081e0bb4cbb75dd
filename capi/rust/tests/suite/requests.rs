//! Requests in flight, and what becomes of what they use.

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, OnceLock};
use std::thread;
use std::time::Duration;

use trtxpy::{executor, DType, Graph, Status, SubmitOptions};

use super::floats;
use crate::common::{block_on, eventually};

#[test]
fn a_request_is_a_future() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let (x, mut y) = (floats(&context, [1.0, 2.0, 3.0, 4.0]), floats(&context, [0.0; 4]));
    let completion = block_on(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap()).unwrap();
    assert!(completion.submitted_ns > 0 && completion.completed_ns >= completion.submitted_ns);
    assert!(completion.duration() < Duration::from_secs(60));
    // As soon as it is complete nothing of it has the tensor any more.
    assert_eq!(y.as_mut_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    for _ in 0..100 {
        block_on(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap()).unwrap();
        y.as_mut_slice::<f32>().unwrap().fill(0.0);
    }
    let outputs: Vec<_> = (0..20).map(|_| floats(&context, [0.0; 4])).collect();
    let requests: Vec<_> = outputs.iter().map(|y| graph.submit(&[("x", &x)], &[("y", y)]).unwrap()).collect();
    for request in requests {
        block_on(request).unwrap();
    }
    assert!(outputs.iter().all(|y| y.read_vec::<f32>().unwrap() == [1.0, 2.0, 3.0, 4.0]));
    drop((x, y, outputs));
    drop(graph);
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn a_request_can_be_waited_for() {
    let kit = kit!();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let request = graph.submit(&[("x", &x)], &[("y", &y)]).unwrap();
    assert_eq!(request.wait_timeout(Duration::ZERO), Ok(None));
    assert_eq!(request.wait_timeout(Duration::from_micros(100)), Ok(None));
    assert!(!request.is_complete());
    assert!(request.wait_timeout(Duration::MAX).unwrap().is_some());
    assert!(request.is_complete());
    assert!(request.wait_timeout(Duration::ZERO).unwrap().is_some());
    assert_eq!(request.cancel(), Ok(false));
    request.wait().unwrap();
    assert_eq!(y.read_vec::<f32>().unwrap(), [1.0; 4]);
}

#[test]
fn tensors_in_flight_are_busy() {
    let kit = kit!();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (mut x, mut y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let request = graph.submit(&[("x", &x)], &[("y", &y)]).unwrap();
    assert_eq!(y.read_vec::<f32>().unwrap_err().status, Status::Busy);
    assert_eq!(y.shape().unwrap(), [1, 4]); // asking is never refused
    assert_eq!(y.byte_len().unwrap(), 16);
    assert_eq!(y.data().unwrap_err().status, Status::Busy);
    assert_eq!(x.write_slice(&[1.0_f32; 4]).unwrap_err().status, Status::Busy);
    assert_eq!(x.read_vec::<f32>().unwrap(), [1.0; 4]);
    assert_eq!(x.as_mut_slice::<f32>().unwrap_err().status, Status::Busy);
    assert_eq!(y.as_mut_slice::<f32>().unwrap_err().status, Status::Busy);
    assert_eq!(y.resize(&[1]).unwrap_err().status, Status::Busy);
    assert_eq!(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap_err().status, Status::Busy);
    request.wait().unwrap();
    assert_eq!(y.as_mut_slice::<f32>().unwrap(), [1.0; 4]);
    x.write_slice(&[2.0_f32; 4]).unwrap();
}

#[test]
fn a_request_can_be_cancelled_and_is_by_its_drop() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let request = graph.submit(&[("x", &x)], &[("y", &y)]).unwrap();
    assert_eq!(request.cancel(), Ok(true));
    assert_eq!(block_on(request).unwrap_err().status, Status::Cancelled);
    drop(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap());
    eventually("both are cancelled", || graph.statistics().unwrap().cancelled == 2);
    eventually("the tensor is free", || y.write_slice(&[5.0_f32; 4]).is_ok());
    graph.submit(&[("x", &x)], &[("y", &y)]).unwrap().detach();
    eventually("the third is not", || graph.statistics().unwrap().completed == 1);
    eventually("the tensor is free", || y.read_vec::<f32>().is_ok_and(|content| content == [1.0; 4]));
    drop((x, y));
    drop(graph);
    drop(context);
    kit.settles(before);
}

#[test]
fn what_is_dropped_in_flight_lives_until_the_completion() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let request = graph.submit(&[("x", &x)], &[("y", &y)]).unwrap();
    drop(x);
    drop(y);
    assert_eq!(kit.open(), before + 5); // context, graph, tensors, request
    request.wait().unwrap();
    eventually("the tensors are destroyed", || kit.open() == before + 2);
    drop(graph);
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn a_request_that_is_forgotten_harms_nobody() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    mem::forget(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap());
    drop((x, y));
    drop(graph);
    drop(context); // all of them while the request uses them
    assert!(kit.open() > before);
    kit.settles(before + 1); // the request's handle was forgotten
}

#[test]
fn callbacks_may_submit_but_not_wait_and_may_panic() {
    let kit = kit!();
    // A callback must be 'static; so must what it uses, and that is the executor's context.
    let context_of_all = executor::context().unwrap();
    static GRAPH: OnceLock<Graph<'static>> = OnceLock::new();
    let graph_of_all = GRAPH.get_or_init(|| kit.graph(context_of_all, DType::Float32, &[1, 4]));
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let options = SubmitOptions::default();
    graph.submit_then(&[("x", &x)], &[("y", &y)], &options, |_| panic!("on purpose")).unwrap();
    eventually("the tensor is free", || y.read_vec::<f32>().is_ok());

    let (sender, receiver) = mpsc::channel();
    graph.submit_then(&[("x", &x)], &[("y", &y)], &options, move |outcome| sender.send(outcome).unwrap()).unwrap();
    assert!(receiver.recv().unwrap().is_ok());

    let (a, b, c) =
        (floats(context_of_all, [1.0; 4]), floats(context_of_all, [0.0; 4]), floats(context_of_all, [0.0; 4]));
    let input = floats(context_of_all, [2.0; 4]);
    let (sender, receiver) = mpsc::channel();
    graph_of_all
        .submit_then(&[("x", &input)], &[("y", &c)], &options, move |outcome| {
            let refused = graph_of_all.dispatch(&[("x", &a)], &[("y", &b)]).unwrap_err();
            let request = graph_of_all.submit(&[("x", &a)], &[("y", &b)]).unwrap();
            let waits = request.wait_timeout(Duration::from_secs(1)).unwrap_err();
            request.detach();
            sender.send((outcome.is_ok(), refused.status, waits.status)).unwrap();
        })
        .unwrap();
    assert_eq!(receiver.recv().unwrap(), (true, Status::InCallback, Status::InCallback));
    drop((x, y, input, c));
    drop(graph);
    drop(context);
    kit.settles(before);
}

#[test]
fn a_request_can_be_awaited_on_another_thread() {
    let kit = kit!();
    let context = kit.slow();
    let graph = kit.narrow(&context);
    let (x, y) = (floats(&context, [4.0; 4]), floats(&context, [0.0; 4]));
    let request = graph.submit(&[("x", &x)], &[("y", &y)]).unwrap();
    thread::scope(|scope| scope.spawn(|| block_on(request)).join().unwrap()).unwrap();
    assert_eq!(y.read_vec::<f32>().unwrap(), [4.0; 4]);
}

#[test]
fn a_task_that_gives_up_is_not_kept() {
    struct Wakes(AtomicUsize);
    impl std::task::Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let kit = kit!();
    let context = kit.slow();
    let graph = kit.narrow(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let mut request = Box::pin(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap());
    let wakes = Arc::new(Wakes(AtomicUsize::new(0)));
    let waker = wakes.clone().into();
    let mut task = std::task::Context::from_waker(&waker);
    assert!(std::future::Future::poll(request.as_mut(), &mut task).is_pending());
    assert!(std::future::Future::poll(request.as_mut(), &mut task).is_pending());
    drop(request);
    drop(waker);
    assert_eq!(Arc::strong_count(&wakes), 1);
    eventually("the tensor is free", || y.read_vec::<f32>().is_ok());
    assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
}
