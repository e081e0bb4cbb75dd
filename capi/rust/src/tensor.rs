//! Tensors: memory that requests read and write.

use std::fmt;
use std::sync::Arc;

use crate::dtype::{self, DType, Element};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::object::{Child, Handle, Object};
use crate::shape;

/// Where a tensor's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Location {
    /// Pinned memory of the library's.
    Host,
    /// Memory of the context's GPU.
    Device,
    /// Somebody else's, on the host, through DLPack.
    ForeignHost,
    /// Somebody else's, on the device, through DLPack.
    ForeignDevice,
}

impl Location {
    fn raw(self) -> ffi::trtxpy_location {
        match self {
            Location::Host => ffi::TRTXPY_HOST,
            Location::Device => ffi::TRTXPY_DEVICE,
            Location::ForeignHost => ffi::TRTXPY_FOREIGN_HOST,
            Location::ForeignDevice => ffi::TRTXPY_FOREIGN_DEVICE,
        }
    }

    fn from_raw(raw: ffi::trtxpy_location) -> Result<Location> {
        match raw {
            ffi::TRTXPY_HOST => Ok(Location::Host),
            ffi::TRTXPY_DEVICE => Ok(Location::Device),
            ffi::TRTXPY_FOREIGN_HOST => Ok(Location::ForeignHost),
            ffi::TRTXPY_FOREIGN_DEVICE => Ok(Location::ForeignDevice),
            other => Err(Error::new(Status::Unsupported, format!("this crate does not know location {other}"))),
        }
    }
}

/// Memory of one type and shape. Any thread may use it at any time: what cannot be done while a request in flight or another
/// call uses the tensor fails with [`Status::Busy`], as its method says. Asking for type, place, shape and size never does.
///
/// Dropped while a request in flight uses it, it lives until that is complete.
pub struct Tensor<'ctx> {
    pub(crate) object: Arc<Object>,
    dtype: DType,
    location: Location,
    _parent: Child<'ctx>,
}

impl<'ctx> Tensor<'ctx> {
    pub(crate) fn create(
        context: &Arc<Object>,
        dtype: DType,
        shape: &[i64],
        location: Location,
    ) -> Result<Tensor<'ctx>> {
        let desc = ffi::trtxpy_tensor_desc {
            dtype: dtype.raw(),
            location: location.raw(),
            shape: shape::raw(shape)?,
            ..Default::default()
        };
        let mut tensor = std::ptr::null_mut();
        let library = context.library;
        // SAFETY: an open handle; the struct outlives the call.
        library.check(unsafe { (library.api.trtxpy_tensor_create)(context.context(), &desc, &mut tensor) })?;
        let object = Object::new(library, Handle::Tensor(tensor), Some(context.clone()));
        Ok(Tensor { object: Arc::new(object), dtype, location, _parent: Child::new() })
    }

    /// Take a handle over, also if this fails.
    ///
    /// # Safety
    /// An open tensor of that parent, and nobody else destroys it.
    pub(crate) unsafe fn adopt(tensor: ffi::trtxpy_tensor, parent: &Arc<Object>) -> Result<Tensor<'ctx>> {
        let object = Object::new(parent.library, Handle::Tensor(tensor), Some(parent.clone()));
        let desc = describe(&object)?;
        Ok(Tensor {
            object: Arc::new(object),
            dtype: DType::from_raw(desc.dtype)?,
            location: Location::from_raw(desc.location)?,
            _parent: Child::new(),
        })
    }

    /// What the elements are.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory is.
    pub fn location(&self) -> Location {
        self.location
    }

    /// The shape now. Never [`Status::Busy`]; a request in flight may resize its outputs.
    pub fn shape(&self) -> Result<Vec<i64>> {
        Ok(shape::axes(&describe(&self.object)?.shape))
    }

    /// Bytes of the content now. As [`Tensor::shape`].
    pub fn byte_len(&self) -> Result<usize> {
        let mut bytes = 0;
        let library = self.object.library;
        // SAFETY: an open handle; the number outlives the call.
        library.check(unsafe { (library.api.trtxpy_tensor_bytes)(self.object.tensor(), &mut bytes) })?;
        Ok(bytes)
    }

    /// Another shape, the same type. The content is undefined, though never uninitialised, where the number of bytes changed.
    ///
    /// [`Status::Busy`] while a request in flight or another call uses the tensor, [`Status::Borrowed`] while a DLPack tensor that
    /// was exported does, [`Status::Unsupported`] for foreign memory and tensors of
    /// [`Graph::create_tensors`](crate::Graph::create_tensors).
    pub fn resize(&self, shape: &[i64]) -> Result<()> {
        let shape = shape::raw(shape)?;
        let library = self.object.library;
        // SAFETY: an open handle; the struct outlives the call.
        library.check(unsafe { (library.api.trtxpy_tensor_resize)(self.object.tensor(), &shape) })
    }

    /// The whole content, as bytes. [`Status::BufferSize`] if there are more or fewer; [`Status::Busy`] while a request in flight or
    /// another call uses the tensor.
    pub fn write_bytes(&self, content: &[u8]) -> Result<()> {
        let library = self.object.library;
        // SAFETY: an open handle; the library reads so many bytes and no more.
        library.check(unsafe {
            (library.api.trtxpy_tensor_write)(self.object.tensor(), content.as_ptr().cast(), content.len())
        })
    }

    /// The whole content, into bytes. [`Status::BufferSize`] if there is more or less room; [`Status::Busy`] while a request in
    /// flight or another call writes the tensor.
    pub fn read_bytes(&self, content: &mut [u8]) -> Result<()> {
        let library = self.object.library;
        // SAFETY: an open handle; the library writes so many bytes and no more.
        library.check(unsafe {
            (library.api.trtxpy_tensor_read)(self.object.tensor(), content.as_mut_ptr().cast(), content.len())
        })
    }

    /// The whole content, in the tensor's type. [`Status::DType`] if it is another; else as [`Tensor::write_bytes`].
    pub fn write_slice<T: Element>(&self, content: &[T]) -> Result<()> {
        dtype::check::<T>(self.dtype, "this tensor")?;
        self.write_bytes(dtype::bytes_of(content))
    }

    /// The whole content, into a slice of the tensor's type. Fails as [`Tensor::read_bytes`] does.
    pub fn read_into<T: Element>(&self, content: &mut [T]) -> Result<()> {
        dtype::check::<T>(self.dtype, "this tensor")?;
        self.read_bytes(dtype::bytes_of_mut(content))
    }

    /// The whole content, in the tensor's type. Fails as [`Tensor::read_bytes`] does.
    pub fn read_vec<T: Element>(&self) -> Result<Vec<T>> {
        dtype::check::<T>(self.dtype, "this tensor")?;
        let mut content = dtype::zeros(self.byte_len()? / std::mem::size_of::<T>());
        self.read_bytes(dtype::bytes_of_mut(&mut content))?;
        Ok(content)
    }

    /// The memory itself, to be read and written without a copy: pinned memory only.
    ///
    /// [`Status::Busy`] while a request in flight uses the tensor, [`Status::Unsupported`] for memory of a device or of somebody
    /// else.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        dtype::check::<T>(self.dtype, "this tensor")?;
        if self.location != Location::Host {
            return Err(Error::new(
                Status::Unsupported,
                format!("this tensor's memory is {:?}; only Location::Host can be borrowed", self.location),
            ));
        }
        if Arc::get_mut(&mut self.object).is_none() {
            return Err(Error::new(Status::Busy, "a request in flight uses this tensor; wait for it"));
        }
        let bytes = self.byte_len()?;
        let data = self.data()?;
        if bytes == 0 {
            return Ok(&mut []);
        }
        if data.is_null() || data as usize % std::mem::align_of::<T>() != 0 {
            return Err(Error::new(Status::Internal, format!("the library's memory is at {data:p}")));
        }
        // SAFETY: so many bytes of the library's own, initialised, aligned, and every pattern is a `T`. Nobody else has
        // them: no request in flight keeps this tensor, and none can be submitted while it is borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(data.cast(), bytes / std::mem::size_of::<T>()) })
    }

    /// The address of the memory, on the host or the device; NULL for no bytes. Valid until the tensor is resized or destroyed.
    /// Whoever reads or writes there keeps away while a request in flight uses the tensor.
    ///
    /// [`Status::Busy`] while a request in flight or another call writes a tensor that can be resized.
    pub fn data(&self) -> Result<*mut std::ffi::c_void> {
        let mut data = std::ptr::null_mut();
        let library = self.object.library;
        // SAFETY: an open handle; the pointer outlives the call.
        library.check(unsafe { (library.api.trtxpy_tensor_data)(self.object.tensor(), &mut data) })?;
        Ok(data)
    }

    /// For [`Runtime::api`](crate::Runtime::api). The tensor destroys it.
    pub fn as_raw(&self) -> ffi::trtxpy_tensor {
        self.object.tensor()
    }
}

impl fmt::Debug for Tensor<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = self.shape().map_or_else(|error| error.status.name().to_owned(), |shape| shape::text(&shape));
        write!(formatter, "Tensor({} {shape}, {:?})", self.dtype, self.location)
    }
}

fn describe(object: &Object) -> Result<ffi::trtxpy_tensor_desc> {
    let mut desc = ffi::trtxpy_tensor_desc::default();
    let library = object.library;
    // SAFETY: an open handle; the struct outlives the call.
    library.check(unsafe { (library.api.trtxpy_tensor_describe)(object.tensor(), &mut desc) })?;
    Ok(desc)
}
