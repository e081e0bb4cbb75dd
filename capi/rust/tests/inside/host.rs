//! What a Python extension in Rust does, without one of the crates for that: loaded by ctypes.PyDLL, so that its functions
//! are called with Python's lock held, and do not let go of it.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context as Task, Poll, Wake};
use std::time::Duration;

use trtxpy::{gen1, gen2, Context, DType, Graph, GraphOptions, Location, Options, Runtime, SubmitOptions};

static MODEL: OnceLock<Vec<u8>> = OnceLock::new();

#[repr(C)]
pub struct PyObject {
    _private: [u8; 0],
}

extern "C" {
    fn PyGILState_Ensure() -> i32;
    fn PyGILState_Release(state: i32);
    fn PyGILState_Check() -> i32;
}

/// # Safety
/// So many bytes are there.
#[no_mangle]
pub unsafe extern "C" fn host_model(bytes: *const u8, count: usize) {
    // SAFETY: the caller's word.
    let _ = MODEL.set(unsafe { std::slice::from_raw_parts(bytes, count) }.to_vec());
}

/// A waker that takes Python's lock, as one that wakes an event loop of Python's does.
struct Locks(std::thread::Thread);

impl Wake for Locks {
    fn wake(self: Arc<Self>) {
        // SAFETY: in a process that runs Python.
        unsafe {
            let state = PyGILState_Ensure();
            PyGILState_Release(state);
        }
        self.0.unpark();
    }
}

fn objects() -> (&'static Context<'static>, &'static Graph<'static>) {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    static CONTEXT: OnceLock<Context<'static>> = OnceLock::new();
    static GRAPH: OnceLock<Graph<'static>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| Runtime::new().unwrap());
    let context = CONTEXT.get_or_init(|| runtime.context(&Options::default()).unwrap());
    let open = || context.graph_from_onnx(MODEL.get().unwrap(), None, &GraphOptions::default()).unwrap();
    (context, GRAPH.get_or_init(open))
}

/// Once, before the threads: what it makes is the statics' above.
#[no_mangle]
pub extern "C" fn host_open() -> i32 {
    objects();
    0
}

static CALLED: AtomicI32 = AtomicI32::new(0);

/// How many callbacks came.
#[no_mangle]
pub extern "C" fn host_called() -> i32 {
    CALLED.load(Ordering::SeqCst)
}

/// One round of everything, with Python's lock; 0 if all went well.
#[no_mangle]
pub extern "C" fn host_round() -> i32 {
    std::panic::catch_unwind(round).unwrap_or(1)
}

fn round() -> i32 {
    // SAFETY: in a process that runs Python.
    let locked = || assert_eq!(unsafe { PyGILState_Check() }, 1);
    locked();
    let input = gen1::TrtxInput { name: "x".into(), shape: vec![1, 4], data: vec![1.0, 2.0, 3.0, 4.0] };
    let bytes = input.data.iter().flat_map(|each| each.to_ne_bytes()).collect();
    let output = gen1::run_trtx_with_inputs(MODEL.get().unwrap(), [input]).unwrap();
    assert_eq!(output[0].data, [1.0, 2.0, 3.0, 4.0]);
    let input = gen2::TrtxInput { name: "x".into(), data: bytes };
    let output = gen2::run_trtx_with_inputs(MODEL.get().unwrap(), [input.clone()]).unwrap();
    assert_eq!(output[0].data, input.data);
    locked();

    let (context, graph) = objects();
    let x = context.tensor_from(&[1, 4], &[5.0_f32; 4]).unwrap();
    let y = context.tensor(DType::Float32, &[1, 4], Location::Host).unwrap();
    graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap();
    graph.submit(&[("x", &x)], &[("y", &y)]).unwrap().wait().unwrap();

    // Polled once with a waker that takes the lock; then waited for with the lock held.
    let mut request = Box::pin(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap());
    let waker = Arc::new(Locks(std::thread::current())).into();
    let mut task = Task::from_waker(&waker);
    let mut request = pin!(&mut request);
    if request.as_mut().poll(&mut task).is_pending() {
        assert!(request.wait_timeout(Duration::from_secs(60)).unwrap().is_some());
    }
    assert!(matches!(request.as_mut().poll(&mut task), Poll::Ready(Ok(_))));

    // What the request alone keeps is destroyed on the library's thread, which takes the lock for it.
    let temporary = context.tensor(DType::Float32, &[1, 4], Location::Host).unwrap();
    let request = graph.submit(&[("x", &x)], &[("y", &temporary)]).unwrap();
    drop(temporary);
    request.wait().unwrap();

    let queue = context.queue().unwrap();
    let _ = graph.submit_to(&queue, 1, &[("x", &x)], &[("y", &y)], &SubmitOptions::default()).unwrap();
    drop(queue);
    let options = SubmitOptions::default();
    graph
        .submit_then(&[("x", &x)], &[("y", &y)], &options, |outcome| {
            assert!(outcome.is_ok());
            CALLED.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
    locked();
    0
}
