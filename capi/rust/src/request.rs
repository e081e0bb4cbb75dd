//! Requests that complete later: a future over the library's callback.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::fmt;
use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::library::{text, Library};
use crate::object::{Child, Handle, InFlight, Object};

/// What a request came to. Times are of CLOCK_MONOTONIC, in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// When it was submitted.
    pub submitted_ns: u64,
    /// When it was launched.
    pub launched_ns: u64,
    /// When it was complete.
    pub completed_ns: u64,
    /// Through a captured graph, not through Python.
    pub captured: bool,
}

impl Completion {
    pub(crate) fn from_raw(raw: &ffi::trtxpy_result) -> Completion {
        Completion {
            submitted_ns: raw.submitted_ns,
            launched_ns: raw.launched_ns,
            completed_ns: raw.completed_ns,
            captured: raw.captured != 0,
        }
    }

    /// From submission to completion.
    pub fn duration(&self) -> Duration {
        Duration::from_nanos(self.completed_ns.saturating_sub(self.submitted_ns))
    }
}

#[derive(Default)]
struct State {
    outcome: Option<Result<Completion>>,
    waker: Option<Waker>,
}

/// What the callback and the future have in common.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn complete(&self, outcome: Result<Completion>) {
        let mut state = self.lock();
        state.outcome = Some(outcome);
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn outcome(&self) -> Option<Result<Completion>> {
        self.lock().outcome.clone()
    }

    /// None after the deadline.
    fn wait(&self, deadline: Option<Instant>) -> Option<Result<Completion>> {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return Some(outcome.clone());
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
                    self.changed.wait_timeout(state, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0
                }
            };
        }
    }
}

type Callback = Box<dyn FnOnce(Result<Completion>) + Send>;

enum Target {
    Future(Arc<Shared>),
    Callback(Callback),
}

/// What the library's callback gets as userdata.
struct Delivery {
    in_flight: InFlight,
    target: Target,
}

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

fn in_callback() -> bool {
    IN_CALLBACK.with(Cell::get)
}

unsafe extern "C" fn complete(
    status: ffi::trtxpy_status,
    message: *const c_char,
    result: *const ffi::trtxpy_result,
    userdata: *mut c_void,
) {
    let outside = IN_CALLBACK.with(|inside| inside.replace(true));
    // SAFETY: what was submitted; the library calls back exactly once.
    let delivery = unsafe { Box::from_raw(userdata.cast::<Delivery>()) };
    let outcome = match Status::from_raw(status) {
        // SAFETY: valid during the call.
        None => Ok(Completion::from_raw(unsafe { &*result })),
        // SAFETY: NULL or a string that is valid during the call.
        Some(status) => Err(Error::new(status, unsafe { text(message) })),
    };
    // The panic hook has said it. A payload may panic again when it is dropped; what comes of that is not dropped.
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let Delivery { mut in_flight, target } = *delivery;
        let remains = in_flight.release();
        match target {
            Target::Future(shared) => shared.complete(outcome),
            Target::Callback(callback) => callback(outcome),
        }
        drop(remains);
    }));
    if let Err(again) = caught.or_else(|payload| catch_unwind(AssertUnwindSafe(|| drop(payload)))) {
        std::mem::forget(again);
    }
    IN_CALLBACK.with(|inside| inside.set(outside));
}

fn deliver_to(in_flight: InFlight, target: Target) -> (ffi::trtxpy_submit_options, *mut Delivery) {
    let delivery = Box::into_raw(Box::new(Delivery { in_flight, target }));
    let options =
        ffi::trtxpy_submit_options { callback: Some(complete), userdata: delivery.cast(), ..Default::default() };
    (options, delivery)
}

/// `submit`: as trtxpy_submit.
pub(crate) fn submit<'g>(
    library: &'static Library,
    in_flight: InFlight,
    submit: impl FnOnce(&mut ffi::trtxpy_submit_options, *mut ffi::trtxpy_request) -> ffi::trtxpy_status,
) -> Result<Request<'g>> {
    let shared = Arc::new(Shared::default());
    let (mut options, delivery) = deliver_to(in_flight, Target::Future(shared.clone()));
    let mut request = std::ptr::null_mut();
    if let Err(error) = library.check(submit(&mut options, &mut request)) {
        // SAFETY: a failure that is returned makes no completion.
        drop(unsafe { Box::from_raw(delivery) });
        return Err(error);
    }
    // There may be no handle, for want of memory: the request cannot be cancelled then.
    let object = (!request.is_null()).then(|| Object::new(library, Handle::Request(request), None));
    Ok(Request { shared, object, cancel_on_drop: true, _graph: Child::new() })
}

pub(crate) fn submit_then(
    in_flight: InFlight,
    callback: Callback,
    submit: impl FnOnce(&mut ffi::trtxpy_submit_options) -> Result<()>,
) -> Result<()> {
    let (mut options, delivery) = deliver_to(in_flight, Target::Callback(callback));
    let submitted = submit(&mut options);
    if submitted.is_err() {
        // SAFETY: a failure that is returned makes no completion.
        drop(unsafe { Box::from_raw(delivery) });
    }
    submitted
}

/// Cancel. False if it is complete already.
pub(crate) fn cancel(request: &Object) -> Result<bool> {
    let library = request.library;
    // SAFETY: an open handle.
    match unsafe { (library.api.trtxpy_request_cancel)(request.request()) } {
        ffi::TRTXPY_NOT_FOUND => Ok(false),
        status => library.check(status).map(|()| true),
    }
}

/// Wait until it is complete, in the library; its callback may still be running. False after the timeout.
pub(crate) fn wait(request: &Object, timeout_ns: u64) -> Result<bool> {
    let library = request.library;
    let mut outcome = ffi::TRTXPY_OK;
    // SAFETY: an open handle; the status outlives the call.
    match unsafe { (library.api.trtxpy_request_wait)(request.request(), timeout_ns, &mut outcome) } {
        ffi::TRTXPY_TIMEOUT | ffi::TRTXPY_NOT_READY => Ok(false),
        status => library.check(status).map(|()| true),
    }
}

/// A request in flight: a future of its [`Completion`], or of its error.
///
/// Dropping it cancels the request; [`Request::detach`] does not. Either way, and if it is forgotten, the request keeps the
/// tensors and the graph that it uses until the library is done with them.
#[must_use = "dropping a request cancels it"]
pub struct Request<'g> {
    shared: Arc<Shared>,
    object: Option<Object>,
    cancel_on_drop: bool,
    _graph: Child<'g>,
}

impl Request<'_> {
    /// Wait for it. [`Status::InCallback`] in a callback or a waker that the library calls.
    pub fn wait(self) -> Result<Completion> {
        let outcome = self.wait_until(None)?;
        outcome.unwrap_or_else(|| Err(Error::new(Status::Internal, "a wait without a deadline had one")))
    }

    /// Wait so long. `None` if it is still in flight then; it goes on.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<Completion>> {
        self.wait_until(Some(timeout))?.transpose()
    }

    /// Whether it is complete.
    pub fn is_complete(&self) -> bool {
        self.shared.lock().outcome.is_some()
    }

    /// Cancel it. True: it completes with [`Status::Cancelled`], at once if it was not launched, else when the GPU is done
    /// with the tensors. False: it is complete already.
    pub fn cancel(&self) -> Result<bool> {
        match &self.object {
            Some(request) if !self.is_complete() => cancel(request),
            _ => Ok(false),
        }
    }

    /// Let it go on without anybody who waits for it.
    pub fn detach(mut self) {
        self.cancel_on_drop = false;
    }

    pub(crate) fn wait_or_cancel(self, timeout: Duration) -> Result<()> {
        if self.wait_timeout(timeout)?.is_some() {
            return Ok(());
        }
        if self.cancel()? {
            return Err(Error::new(
                Status::Timeout,
                format!("no result within {timeout:?}; the request was cancelled"),
            ));
        }
        self.wait().map(drop) // it was complete in that moment
    }

    fn wait_until(&self, timeout: Option<Duration>) -> Result<Option<Result<Completion>>> {
        if let Some(outcome) = self.shared.outcome() {
            return Ok(Some(outcome));
        }
        if timeout == Some(Duration::ZERO) {
            return Ok(None);
        }
        let Some(request) = &self.object else {
            if in_callback() {
                return Err(Error::new(Status::InCallback, "Request::wait waits, and a callback must not"));
            }
            let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
            return Ok(self.shared.wait(deadline));
        };
        // The library lets go of Python's lock meanwhile, if this thread has it.
        let timeout_ns =
            timeout.map_or(u64::MAX, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX - 1));
        if !wait(request, timeout_ns)? {
            return Ok(None);
        }
        Ok(self.shared.wait(None)) // the callback comes next, and does nothing before it says so
    }
}

impl Future for Request<'_> {
    type Output = Result<Completion>;

    fn poll(self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Self::Output> {
        if let Some(outcome) = self.shared.outcome() {
            return Poll::Ready(outcome);
        }
        // Wakers are the executor's code, which may wait for anything: cloned and dropped without the lock.
        let mut waker = Some(task.waker().clone());
        let mut state = self.shared.lock();
        if let Some(outcome) = &state.outcome {
            let outcome = outcome.clone();
            drop(state);
            return Poll::Ready(outcome);
        }
        std::mem::swap(&mut state.waker, &mut waker);
        drop(state);
        drop(waker);
        Poll::Pending
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if self.cancel_on_drop {
            let _ = self.cancel(); // complete already, or the library is gone
        }
        let waker = self.shared.lock().waker.take();
        drop(waker); // the task is not kept until the completion
    }
}

impl fmt::Debug for Request<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Request").field("outcome", &self.shared.outcome()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliver(target: Target, status: ffi::trtxpy_status, message: Option<&std::ffi::CStr>) {
        let (options, _) = deliver_to(InFlight::new(Vec::new()), target);
        // SAFETY: a struct of integers.
        let result: ffi::trtxpy_result = unsafe { std::mem::zeroed() };
        let message = message.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
        // SAFETY: as the library calls it.
        unsafe { complete(status, message, &result, options.userdata) };
    }

    #[test]
    fn a_panic_does_not_leave_the_callback() {
        deliver(Target::Callback(Box::new(|_| panic!("on purpose"))), ffi::TRTXPY_OK, None);
        assert!(!in_callback());
    }

    #[test]
    fn a_panic_that_panics_when_dropped_does_not_either() {
        struct Twice;
        impl Drop for Twice {
            fn drop(&mut self) {
                panic!("on purpose, again");
            }
        }
        deliver(Target::Callback(Box::new(|_| std::panic::panic_any(Twice))), ffi::TRTXPY_OK, None);
        assert!(!in_callback());
    }

    #[test]
    fn a_waker_that_panics_does_not_either() {
        struct Panics;
        impl std::task::Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("on purpose");
            }
        }
        let shared = Arc::new(Shared::default());
        shared.lock().waker = Some(Arc::new(Panics).into());
        deliver(Target::Future(shared.clone()), ffi::TRTXPY_OK, None);
        assert!(matches!(shared.outcome(), Some(Ok(_))));
    }

    #[test]
    fn what_was_said_arrives() {
        let shared = Arc::new(Shared::default());
        assert!(shared.wait(Some(Instant::now())).is_none());
        deliver(Target::Future(shared.clone()), ffi::TRTXPY_EXECUTION, Some(c"it broke"));
        assert_eq!(shared.wait(None), Some(Err(Error::new(Status::Execution, "it broke"))));
    }

    #[test]
    fn a_request_without_a_handle_is_waited_for_all_the_same() {
        let shared = Arc::new(Shared::default());
        let request = Request { shared: shared.clone(), object: None, cancel_on_drop: true, _graph: Child::new() };
        assert_eq!(request.wait_timeout(Duration::from_millis(1)), Ok(None));
        assert_eq!(request.cancel(), Ok(false));
        let other = Request { shared: shared.clone(), object: None, cancel_on_drop: true, _graph: Child::new() };
        deliver(
            Target::Callback(Box::new(move |_| assert_eq!(other.wait().unwrap_err().status, Status::InCallback))),
            ffi::TRTXPY_OK,
            None,
        );
        let thread = std::thread::spawn(move || deliver(Target::Future(shared), ffi::TRTXPY_OK, None));
        assert!(request.wait().is_ok());
        thread.join().unwrap();
    }
}
