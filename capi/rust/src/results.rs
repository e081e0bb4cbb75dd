//! Arrays in, arrays out: one-shot calls.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use crate::dtype::{self, DType, Element};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::library::text;
use crate::object::{Child, Handle, Object};
use crate::shape;

/// An input of [`Context::run`](crate::Context::run).
#[derive(Debug, Clone, Copy)]
pub struct Array<'a> {
    /// The input's name.
    pub name: &'a str,
    /// What its elements are.
    pub dtype: DType,
    /// Its shape.
    pub shape: &'a [i64],
    /// Its content, packed.
    pub data: &'a [u8],
}

impl<'a> Array<'a> {
    /// Of elements.
    pub fn new<T: Element>(name: &'a str, shape: &'a [i64], content: &'a [T]) -> Array<'a> {
        Array { name, dtype: T::DTYPE, shape, data: dtype::bytes_of(content) }
    }
}

struct Raw {
    name: String,
    dtype: DType,
    shape: Vec<i64>,
    data: *const c_void,
    bytes: usize,
}

// SAFETY: the library's memory, which nobody writes.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// What [`Context::run`](crate::Context::run) returns: the model's outputs.
pub struct Results<'ctx> {
    outputs: Vec<Raw>,
    _object: Object,
    _context: Child<'ctx>,
}

/// One output, borrowed from [`Results`].
#[derive(Debug, Clone, Copy)]
pub struct Output<'r> {
    /// Its name.
    pub name: &'r str,
    /// What its elements are: the model's own type.
    pub dtype: DType,
    /// Its shape.
    pub shape: &'r [i64],
    /// Its content, packed.
    pub data: &'r [u8],
}

impl Output<'_> {
    /// The elements. [`Status::DType`] if they are of another type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        dtype::check::<T>(self.dtype, &format!("output {:?}", self.name))?;
        dtype::elements_of(self.data).ok_or_else(|| {
            Error::new(Status::Internal, format!("output {:?} has {} bytes", self.name, self.data.len()))
        })
    }

    /// The elements as `f32`, whatever they are; see [`DType::to_f32`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        shape::elements(self.shape).and_then(|elements| self.dtype.to_f32(self.data, elements)).ok_or_else(|| {
            Error::new(
                Status::Internal,
                format!(
                    "output {:?}: {} bytes are no {} {}",
                    self.name,
                    self.data.len(),
                    self.dtype,
                    shape::text(self.shape)
                ),
            )
        })
    }
}

impl<'ctx> Results<'ctx> {
    pub(crate) fn create(
        context: &Arc<Object>,
        run: impl FnOnce(*mut ffi::trtxpy_results) -> ffi::trtxpy_status,
    ) -> Result<Results<'ctx>> {
        let library = context.library;
        let mut results = std::ptr::null_mut();
        library.check(run(&mut results))?;
        let object = Object::new(library, Handle::Results(results), Some(context.clone()));
        let mut count = 0;
        // SAFETY: an open handle; the number outlives the call.
        library.check(unsafe { (library.api.trtxpy_results_count)(results, &mut count) })?;
        let outputs = (0..count).map(|index| output(&object, index)).collect::<Result<_>>()?;
        Ok(Results { outputs, _object: object, _context: Child::new() })
    }

    /// How many outputs.
    pub fn len(&self) -> usize {
        self.outputs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    /// The output of that number, in the model's order.
    pub fn get(&self, index: usize) -> Option<Output<'_>> {
        self.outputs.get(index).map(view)
    }

    /// The output of that name.
    pub fn by_name(&self, name: &str) -> Option<Output<'_>> {
        self.outputs.iter().find(|output| output.name == name).map(view)
    }

    /// All outputs, in the model's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Output<'_>> {
        self.outputs.iter().map(view)
    }
}

fn view(raw: &Raw) -> Output<'_> {
    let data = if raw.bytes == 0 || raw.data.is_null() {
        &[]
    } else {
        // SAFETY: so many bytes of the library's, which stay until the results are destroyed: `raw` is theirs.
        unsafe { std::slice::from_raw_parts(raw.data.cast(), raw.bytes) }
    };
    Output { name: &raw.name, dtype: raw.dtype, shape: &raw.shape, data }
}

fn output(results: &Object, index: usize) -> Result<Raw> {
    let mut raw = ffi::trtxpy_array::default();
    let library = results.library;
    // SAFETY: an open handle; the struct outlives the call.
    library.check(unsafe { (library.api.trtxpy_results_get)(results.results(), index, &mut raw) })?;
    Ok(Raw {
        // SAFETY: valid until the results are destroyed.
        name: unsafe { text(raw.name) },
        dtype: DType::from_raw(raw.dtype)?,
        shape: shape::axes(&raw.shape),
        data: raw.data,
        bytes: raw.bytes,
    })
}

impl fmt::Debug for Results<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outputs =
            self.outputs.iter().map(|each| format!("{} {} {}", each.name, each.dtype, shape::text(&each.shape)));
        formatter.debug_list().entries(outputs).finish()
    }
}
