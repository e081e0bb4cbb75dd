//! Handles with an owner: what is behind a handle stays until nobody needs it, in Rust or in the library.
//!
//! The public types have lifetimes, so that a program that drops a parent too early does not compile. Beneath them every
//! object keeps its parent by an `Arc`, and a request in flight keeps all that it uses: `mem::forget` of anything leaves
//! handles open at worst, and never a handle that dangles.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::ffi;
use crate::library::Library;

/// In a type with a lifetime: its parent must still be there when it is dropped, not only when it is used.
pub(crate) struct Child<'parent>(PhantomData<&'parent ()>);

impl Child<'_> {
    pub(crate) fn new() -> Self {
        Child(PhantomData)
    }
}

impl Drop for Child<'_> {
    /// That there is one makes the compiler check the lifetime at the end of scopes, too.
    fn drop(&mut self) {}
}

/// A handle of some kind.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Handle {
    Context(ffi::trtxpy_context),
    Graph(ffi::trtxpy_graph),
    Tensor(ffi::trtxpy_tensor),
    Request(ffi::trtxpy_request),
    Queue(ffi::trtxpy_queue),
    Results(ffi::trtxpy_results),
}

/// An open object of the library's. Dropping it destroys it.
pub(crate) struct Object {
    pub(crate) library: &'static Library,
    handle: Handle,
    /// Dropped after this one.
    parent: Option<Arc<Object>>,
}

// SAFETY: handles are numbers that the library checks, and its functions may be called from any thread.
unsafe impl Send for Object {}
// SAFETY: as above; also by several threads at once.
unsafe impl Sync for Object {}

macro_rules! handle_of {
    ($($function:ident: $variant:ident -> $kind:ident;)*) => {
        $(pub(crate) fn $function(&self) -> ffi::$kind {
            match self.handle {
                Handle::$variant(handle) => handle,
                other => unreachable!("{other:?} where another kind was expected"),
            }
        })*
    };
}

impl Object {
    /// Takes the handle over.
    pub(crate) fn new(library: &'static Library, handle: Handle, parent: Option<Arc<Object>>) -> Object {
        Object { library, handle, parent }
    }

    handle_of! {
        context: Context -> trtxpy_context;
        graph: Graph -> trtxpy_graph;
        tensor: Tensor -> trtxpy_tensor;
        request: Request -> trtxpy_request;
        queue: Queue -> trtxpy_queue;
        results: Results -> trtxpy_results;
    }

    fn try_destroy(&self) -> ffi::trtxpy_status {
        let api = &self.library.api;
        // SAFETY: the handle is this object's own; whatever it is, the library checks it.
        unsafe {
            match self.handle {
                Handle::Context(handle) => (api.trtxpy_context_destroy)(handle),
                Handle::Graph(handle) => (api.trtxpy_graph_destroy)(handle),
                Handle::Tensor(handle) => (api.trtxpy_tensor_destroy)(handle),
                Handle::Request(handle) => (api.trtxpy_request_destroy)(handle),
                Handle::Queue(handle) => (api.trtxpy_queue_destroy)(handle),
                Handle::Results(handle) => (api.trtxpy_results_destroy)(handle),
            }
        }
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if self.try_destroy() == ffi::TRTXPY_BORROWED {
            // A DLPack tensor that was exported from it, or a call through a raw handle: it is tried again later.
            let again = Object { library: self.library, handle: self.handle, parent: self.parent.take() };
            adopt(Orphan::Object(again));
        } else {
            sweep();
        }
    }
}

/// What could not be destroyed yet.
pub(crate) enum Orphan {
    Object(Object),
    /// True once there is nothing left to do.
    Other(Box<dyn FnMut() -> bool + Send>),
}

static ORPHANS: Mutex<Vec<Orphan>> = Mutex::new(Vec::new());
static COUNT: AtomicUsize = AtomicUsize::new(0);

pub(crate) fn adopt(orphan: Orphan) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    ORPHANS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(orphan);
}

/// Give back what nobody uses any more. Objects come here when they are dropped.
pub(crate) fn sweep() {
    let mut again = COUNT.load(Ordering::Relaxed) > 0;
    while again {
        again = false;
        let waiting = std::mem::take(&mut *ORPHANS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        let mut kept = Vec::new();
        for orphan in waiting {
            match orphan {
                Orphan::Object(mut object) => {
                    let parent = object.parent.take();
                    if object.try_destroy() == ffi::TRTXPY_BORROWED {
                        object.parent = parent;
                        kept.push(Orphan::Object(object));
                    } else {
                        std::mem::forget(object); // it is destroyed, and has nothing else
                        COUNT.fetch_sub(1, Ordering::Relaxed);
                        drop(parent);
                        again = true;
                    }
                }
                Orphan::Other(mut finish) => {
                    if finish() {
                        COUNT.fetch_sub(1, Ordering::Relaxed);
                        drop(finish);
                        again = true;
                    } else {
                        kept.push(Orphan::Other(finish));
                    }
                }
            }
        }
        ORPHANS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).append(&mut kept);
    }
}

/// What a request uses: open until it is complete, whatever becomes of the values that the program has.
pub(crate) struct InFlight {
    objects: Vec<Arc<Object>>,
}

impl InFlight {
    pub(crate) fn new(objects: Vec<Arc<Object>>) -> InFlight {
        InFlight { objects }
    }

    /// The request is complete. What only the request kept comes back, to be dropped once that was said: destroying may
    /// take Python's lock, which who waits for the request may have.
    pub(crate) fn release(&mut self) -> Vec<Object> {
        std::mem::take(&mut self.objects).into_iter().filter_map(Arc::into_inner).collect()
    }
}
