//! Completions by file descriptor.

use std::os::fd::AsRawFd;

use trtxpy::{DType, Queue, Status, SubmitOptions};

use super::floats;
use crate::common::eventually;

#[test]
fn a_queue_has_the_completions() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let queue = context.queue().unwrap();
    let x = floats(&context, [1.0; 4]);
    let mut outputs: Vec<_> = (0..40).map(|_| floats(&context, [0.0; 4])).collect();
    for (token, y) in outputs.iter().enumerate() {
        graph.submit_to(&queue, token as u64, &[("x", &x)], &[("y", y)], &SubmitOptions::default()).unwrap();
    }
    let refused = graph.submit_to(&queue, 99, &[("z", &x)], &[("y", &outputs[0])], &SubmitOptions::default());
    assert_eq!(refused.unwrap_err().status, Status::NotFound);
    assert_eq!(queue.pending(), 40);
    let mut tokens = Vec::new();
    while tokens.len() < 40 {
        assert!(readable(&queue, 20_000));
        for completion in queue.take(33).unwrap() {
            completion.outcome.unwrap();
            tokens.push(completion.token);
            assert_eq!(outputs[completion.token as usize].as_mut_slice::<f32>().unwrap(), [1.0; 4]);
        }
    }
    tokens.sort_unstable();
    assert!(tokens.iter().copied().eq(0..40));
    assert!(!readable(&queue, 0));
    assert!(queue.take(1).unwrap().is_empty());
    assert_eq!(queue.pending(), 0);
    drop((x, outputs));
    drop(queue);
    drop(graph);
    drop(context);
    kit.settles(before); // the library lets go of the queue after the completion
}

fn readable(queue: &Queue<'_>, timeout_ms: i32) -> bool {
    #[repr(C)]
    struct PollFd {
        fd: i32,
        events: i16,
        revents: i16,
    }
    extern "C" {
        fn poll(fds: *mut PollFd, count: std::ffi::c_ulong, timeout_ms: i32) -> i32;
    }
    let mut waiting = PollFd { fd: queue.as_raw_fd(), events: 1, revents: 0 };
    // SAFETY: one struct of poll's.
    unsafe { poll(&mut waiting, 1, timeout_ms) == 1 }
}

#[test]
fn a_queue_that_is_dropped_cancels() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.slow();
    let graph = kit.prepared(&context);
    let (x, y) = (floats(&context, [1.0; 4]), floats(&context, [0.0; 4]));
    let queue = context.queue().unwrap();
    let request = graph.submit_to(&queue, 1, &[("x", &x)], &[("y", &y)], &SubmitOptions::default()).unwrap();
    assert_eq!(request.cancel(), Ok(true));
    eventually("it is cancelled", || {
        queue.take(1).unwrap().iter().any(|each| each.outcome.as_ref().unwrap_err().status == Status::Cancelled)
    });
    drop(request);
    let _ = graph.submit_to(&queue, 2, &[("x", &x)], &[("y", &y)], &SubmitOptions::default()).unwrap();
    drop(queue);
    drop((x, y));
    drop(graph);
    drop(context);
    kit.settles(before);
}
