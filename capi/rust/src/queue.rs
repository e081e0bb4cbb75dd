//! Completions for programs that have an event loop of their own.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::object::{self, Child, Handle, InFlight, Object, Orphan};
use crate::request::{self, Completion};

/// What [`Queue::take`] returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueCompletion {
    /// As submitted.
    pub token: u64,
    /// What the request came to.
    pub outcome: Result<Completion>,
}

struct Pending {
    token: u64,
    in_flight: InFlight,
    /// None if the library had no memory for a handle, or before it came.
    request: Option<Arc<Object>>,
}

/// What the library's queue has, or will have: by numbers of this crate's.
#[derive(Default)]
struct Book {
    last: u64,
    pending: HashMap<u64, Pending>,
}

struct Inner {
    object: Arc<Object>,
    book: Mutex<Book>,
    fd: RawFd,
}

/// A queue of completions, and a descriptor that is readable while there is something to take.
///
/// Dropping it cancels what is in flight with it, and waits for that.
pub struct Queue<'ctx> {
    inner: Arc<Inner>,
    _context: Child<'ctx>,
}

/// A request whose completion goes to a queue. Dropping it does nothing to the request.
pub struct QueuedRequest<'q> {
    request: Option<Arc<Object>>,
    _queue: Child<'q>,
}

impl QueuedRequest<'_> {
    /// As [`Request::cancel`](crate::Request::cancel). False if it is complete already.
    pub fn cancel(&self) -> Result<bool> {
        self.request.as_deref().map_or(Ok(false), request::cancel)
    }
}

impl fmt::Debug for QueuedRequest<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("QueuedRequest").finish_non_exhaustive()
    }
}

impl Inner {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn take(&self, most: usize) -> Result<Vec<QueueCompletion>> {
        const BATCH: usize = 16;
        let library = self.object.library;
        let mut found = Vec::new();
        while found.len() < most {
            let mut raw = vec![ffi::trtxpy_completion::default(); BATCH.min(most - found.len())];
            let mut taken = 0;
            // SAFETY: an open handle, and so much room.
            let status = unsafe {
                (library.api.trtxpy_queue_take)(self.object.queue(), raw.as_mut_ptr(), raw.len(), &mut taken)
            };
            if let Err(error) = library.check(status) {
                return if found.is_empty() { Err(error) } else { Ok(found) };
            }
            for completion in &raw[..taken] {
                let pending = self.book().pending.remove(&completion.result.token);
                let Some(mut pending) = pending else { continue }; // submitted through the raw handle
                pending.in_flight.release();
                let outcome = match Status::from_raw(completion.status) {
                    None => Ok(Completion::from_raw(&completion.result)),
                    Some(status) => Err(Error::new(status, message_of(completion))),
                };
                found.push(QueueCompletion { token: pending.token, outcome });
            }
            if taken < raw.len() {
                break;
            }
        }
        Ok(found)
    }
}

fn message_of(completion: &ffi::trtxpy_completion) -> String {
    let bytes: Vec<u8> = completion.message.iter().map(|each| *each as u8).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map_or_else(|_| String::from_utf8_lossy(&bytes).into_owned(), |text| text.to_string_lossy().into_owned())
}

impl<'ctx> Queue<'ctx> {
    pub(crate) fn create(context: &Arc<Object>) -> Result<Queue<'ctx>> {
        let library = context.library;
        let mut queue = std::ptr::null_mut();
        // SAFETY: an open handle; the pointer outlives the call.
        library.check(unsafe { (library.api.trtxpy_queue_create)(context.context(), &mut queue) })?;
        let object = Object::new(library, Handle::Queue(queue), Some(context.clone()));
        let mut fd = -1;
        // SAFETY: an open handle; the number outlives the call.
        library.check(unsafe { (library.api.trtxpy_queue_fd)(queue, &mut fd) })?;
        let inner = Inner { object: Arc::new(object), book: Mutex::default(), fd };
        Ok(Queue { inner: Arc::new(inner), _context: Child::new() })
    }

    /// Up to `most` completions, oldest first. Never waits. The requests' tensors are free again.
    pub fn take(&self, most: usize) -> Result<Vec<QueueCompletion>> {
        self.inner.take(most)
    }

    /// Requests whose completion was not taken yet.
    pub fn pending(&self) -> usize {
        self.inner.book().pending.len()
    }

    /// For [`Runtime::api`](crate::Runtime::api). The queue destroys it.
    pub fn as_raw(&self) -> ffi::trtxpy_queue {
        self.inner.object.queue()
    }

    pub(crate) fn submit<'q>(
        &'q self,
        token: u64,
        in_flight: InFlight,
        submit: impl FnOnce(&mut ffi::trtxpy_submit_options, *mut ffi::trtxpy_request) -> Result<()>,
    ) -> Result<QueuedRequest<'q>> {
        let number = {
            let mut book = self.inner.book();
            book.last += 1;
            let number = book.last;
            book.pending.insert(number, Pending { token, in_flight, request: None });
            number
        };
        let mut options =
            ffi::trtxpy_submit_options { queue: self.inner.object.queue(), token: number, ..Default::default() };
        let mut request = std::ptr::null_mut();
        if let Err(error) = submit(&mut options, &mut request) {
            let refused = self.inner.book().pending.remove(&number);
            drop(refused);
            return Err(error);
        }
        let request = (!request.is_null())
            .then(|| Arc::new(Object::new(self.inner.object.library, Handle::Request(request), None)));
        if let Some(pending) = self.inner.book().pending.get_mut(&number) {
            pending.request.clone_from(&request);
        }
        Ok(QueuedRequest { request, _queue: Child::new() })
    }
}

impl AsFd for Queue<'_> {
    /// Readable while there is something to take. Only poll it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the queue.
        unsafe { BorrowedFd::borrow_raw(self.inner.fd) }
    }
}

impl AsRawFd for Queue<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.fd
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        let requests: Vec<_> =
            self.inner.book().pending.values().filter_map(|pending| pending.request.clone()).collect();
        for request in &requests {
            let _ = request::cancel(request);
        }
        // In a callback this fails, and the rest is done later.
        let complete = requests.iter().all(|request| request::wait(request, u64::MAX).is_ok());
        drop(requests);
        let _ = self.inner.take(usize::MAX);
        let deadline = Instant::now() + Duration::from_secs(1);
        while complete && self.pending() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(20)); // the library tells who waits first, and the queue next
            let _ = self.inner.take(usize::MAX);
        }
        if self.pending() > 0 {
            let inner = self.inner.clone();
            object::adopt(Orphan::Other(Box::new(move || {
                let _ = inner.take(usize::MAX);
                inner.book().pending.is_empty()
            })));
        }
    }
}

impl fmt::Debug for Queue<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Queue").field("pending", &self.pending()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_end_at_their_nul_or_at_the_end() {
        let mut completion = ffi::trtxpy_completion::default();
        assert_eq!(message_of(&completion), "");
        completion.message[0] = b'a' as _;
        assert_eq!(message_of(&completion), "a");
        completion.message = [b'b' as _; 512];
        assert_eq!(message_of(&completion).len(), 512);
    }
}
