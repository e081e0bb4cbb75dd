//! A device and a TensorRT: which one, and what is made on it.

use std::ffi::{c_void, CString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::dtype::{DType, Element};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::graph::{Graph, GraphOptions};
use crate::library::{text, Library};
use crate::object::{Child, Handle, Object};
use crate::queue::Queue;
use crate::results::{Array, Results};
use crate::shape;
use crate::tensor::{Location, Tensor};

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The mock, on the CPU. Cargo feature `mock`.
    Mock,
    /// TensorRT, on an NVIDIA GPU. Cargo feature `gpu`.
    Gpu,
}

/// What a program would rather save: how results are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PowerPreference {
    /// Sleep until shortly before a result is due, then spin.
    #[default]
    Default,
    /// Spin: the least latency, a busy core.
    HighPerformance,
    /// Sleep.
    LowPower,
}

/// How a context is chosen. `Options::default()` is the mock.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Whether a GPU computes, [`Backend::Gpu`], or the CPU, [`Backend::Mock`].
    pub accelerated: bool,
    /// How results are waited for.
    pub power: PowerPreference,
    /// What to take if the backend that `accelerated` says is not compiled in or not to be had here. None: that is an error.
    pub fallback: Option<Backend>,
    /// The library's name for a backend of the chosen kind: `"tensorrt_rtx"`, `"mock:instant"`. None: TRTX_BACKEND or the best
    /// that is installed, for a GPU; `"mock"` for the mock. Not for the fallback, which has the default name.
    pub backend: Option<String>,
    /// Number of the GPU.
    pub device: i32,
    /// Budget for device memory; 0: none.
    pub max_device_bytes: u64,
    /// The lean library that runs plans of another TensorRT. None: TRTX_LEAN_LIBRARY.
    pub lean_library: Option<PathBuf>,
    /// How many engines [`Context::run`] keeps; 0: 8.
    pub max_cached_models: u32,
    /// Load plans that carry code for the CPU.
    pub allow_host_code: bool,
}

/// What a context is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextInfo {
    /// The library's name for the backend.
    pub backend: String,
    /// The version of TensorRT that plans must fit.
    pub tensorrt_version: String,
    /// The device's name.
    pub device_name: String,
    /// `"9.0"`, say.
    pub compute_capability: String,
    /// Device memory in all.
    pub device_bytes: u64,
    /// Number of the device.
    pub device: i32,
    /// Nothing of it is a GPU.
    pub is_mock: bool,
}

/// Memory, open objects and cached models of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ContextStatistics {
    /// Device memory that trtx_py has allocated.
    pub device_bytes: u64,
    /// The most there was.
    pub device_peak_bytes: u64,
    /// Open allocations of device memory.
    pub device_allocations: u64,
    /// Pinned memory that trtx_py has allocated.
    pub pinned_bytes: u64,
    /// The most there was.
    pub pinned_peak_bytes: u64,
    /// Open allocations of pinned memory.
    pub pinned_allocations: u64,
    /// Open graphs.
    pub graphs: u64,
    /// Open tensors.
    pub tensors: u64,
    /// Open queues.
    pub queues: u64,
    /// Requests in flight.
    pub requests: u64,
    /// Models that [`Context::run`] keeps.
    pub cached_models: u64,
    /// Calls that found their model kept.
    pub cache_hits: u64,
    /// Calls that did not.
    pub cache_misses: u64,
}

/// A device and a TensorRT. Parent of graphs, tensors and queues.
pub struct Context<'rt> {
    pub(crate) object: Arc<Object>,
    backend: Backend,
    fallback_reason: Option<Error>,
    _runtime: Child<'rt>,
}

impl<'rt> Context<'rt> {
    pub(crate) fn create(library: &'static Library, options: &Options) -> Result<Context<'rt>> {
        let wanted = if options.accelerated { Backend::Gpu } else { Backend::Mock };
        let first = open(library, wanted, options.backend.as_deref(), options);
        let (object, backend, fallback_reason) = match (first, options.fallback) {
            (Ok(object), _) => (object, wanted, None),
            (Err(error), Some(fallback)) if fallback != wanted && may_fall_back(&error) => {
                let object = open(library, fallback, None, options).map_err(|second| {
                    Error::new(
                        second.status,
                        format!("the fallback: {}. It was taken because: {}", second.message, error.message),
                    )
                })?;
                (object, fallback, Some(error))
            }
            (Err(error), _) => return Err(error),
        };
        Ok(Context { object: Arc::new(object), backend, fallback_reason, _runtime: Child::new() })
    }

    /// What was chosen.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Why the fallback was taken; `None` if it was not.
    pub fn fallback_reason(&self) -> Option<&Error> {
        self.fallback_reason.as_ref()
    }

    /// Backend, device and versions.
    pub fn info(&self) -> Result<ContextInfo> {
        describe(&self.object)
    }

    /// Memory, open objects, cached models.
    pub fn statistics(&self) -> Result<ContextStatistics> {
        let mut raw = ffi::trtxpy_context_statistics::default();
        let library = self.object.library;
        // SAFETY: an open handle; the struct outlives the call.
        library.check(unsafe { (library.api.trtxpy_context_get_statistics)(self.object.context(), &mut raw) })?;
        Ok(ContextStatistics {
            device_bytes: raw.device_bytes,
            device_peak_bytes: raw.device_peak_bytes,
            device_allocations: raw.device_allocations,
            pinned_bytes: raw.pinned_bytes,
            pinned_peak_bytes: raw.pinned_peak_bytes,
            pinned_allocations: raw.pinned_allocations,
            graphs: raw.graphs,
            tensors: raw.tensors,
            queues: raw.queues,
            requests: raw.requests,
            cached_models: raw.cached_models,
            cache_hits: raw.cache_hits,
            cache_misses: raw.cache_misses,
        })
    }

    /// Build and load an ONNX model. `weights`: what its tensors with external data refer to. May take minutes with TensorRT.
    pub fn graph_from_onnx(&self, model: &[u8], weights: Option<&[u8]>, options: &GraphOptions) -> Result<Graph<'_>> {
        let options = options.raw()?;
        let (weights, weights_bytes) = blob(weights);
        let library = self.object.library;
        Graph::create(&self.object, |graph| {
            // SAFETY: an open handle; the slices and the options outlive the call.
            unsafe {
                (library.api.trtxpy_graph_from_onnx)(
                    self.object.context(),
                    model.as_ptr().cast(),
                    model.len(),
                    weights,
                    weights_bytes,
                    &options.raw,
                    graph,
                )
            }
        })
    }

    /// Load a plan: what trtx_py saved, or TensorRT's own.
    pub fn graph_from_plan(&self, plan: &[u8], options: &GraphOptions) -> Result<Graph<'_>> {
        let options = options.raw()?;
        let library = self.object.library;
        Graph::create(&self.object, |graph| {
            // SAFETY: an open handle; the slice and the options outlive the call.
            unsafe {
                (library.api.trtxpy_graph_from_plan)(
                    self.object.context(),
                    plan.as_ptr().cast(),
                    plan.len(),
                    &options.raw,
                    graph,
                )
            }
        })
    }

    /// An ONNX model, its external data beside it, or a plan: told by the content.
    pub fn graph_from_file(&self, path: impl AsRef<Path>, options: &GraphOptions) -> Result<Graph<'_>> {
        let options = options.raw()?;
        let path = path_text(path.as_ref())?;
        let library = self.object.library;
        Graph::create(&self.object, |graph| {
            // SAFETY: an open handle; the path and the options outlive the call.
            unsafe { (library.api.trtxpy_graph_from_file)(self.object.context(), path.as_ptr(), &options.raw, graph) }
        })
    }

    /// A tensor of zeros, in pinned memory or on the device.
    pub fn tensor(&self, dtype: DType, shape: &[i64], location: Location) -> Result<Tensor<'_>> {
        Tensor::create(&self.object, dtype, shape, location)
    }

    /// A tensor in pinned memory with this content.
    pub fn tensor_from<T: Element>(&self, shape: &[i64], content: &[T]) -> Result<Tensor<'_>> {
        let tensor = self.tensor(T::DTYPE, shape, Location::Host)?;
        tensor.write_slice(content)?;
        Ok(tensor)
    }

    /// Take a DLPack tensor over: its deleter is called when the tensor is dropped, or not at all if this fails.
    ///
    /// # Safety
    /// `managed` is a valid tensor of DLPack's unversioned struct, whose producer's work on it is done.
    pub unsafe fn tensor_from_dlpack(&self, managed: *mut ffi::DLManagedTensor) -> Result<Tensor<'_>> {
        let mut tensor = std::ptr::null_mut();
        let library = self.object.library;
        // SAFETY: an open handle, and the caller's word.
        library
            .check(unsafe { (library.api.trtxpy_tensor_from_dlpack)(self.object.context(), managed, &mut tensor) })?;
        // SAFETY: just made, and nobody else's.
        unsafe { Tensor::adopt(tensor, &self.object) }
    }

    /// Completions for an event loop of the program's own.
    pub fn queue(&self) -> Result<Queue<'_>> {
        Queue::create(&self.object)
    }

    /// Run an ONNX model or a plan on these inputs. The engine is kept by content and options: a second call does not build.
    pub fn run(
        &self,
        model: &[u8],
        weights: Option<&[u8]>,
        inputs: &[Array<'_>],
        options: &GraphOptions,
    ) -> Result<Results<'_>> {
        let options = options.raw()?;
        let names: Vec<_> = inputs.iter().map(|input| shape::name("input name", input.name)).collect::<Result<_>>()?;
        let arrays: Vec<_> = inputs
            .iter()
            .zip(&names)
            .map(|(input, name)| {
                Ok(ffi::trtxpy_array {
                    name: name.as_ptr(),
                    dtype: input.dtype.raw(),
                    shape: shape::raw(input.shape)?,
                    data: input.data.as_ptr().cast(),
                    bytes: input.data.len(),
                    ..Default::default()
                })
            })
            .collect::<Result<_>>()?;
        let (weights, weights_bytes) = blob(weights);
        let library = self.object.library;
        Results::create(&self.object, |results| {
            // SAFETY: an open handle; slices, arrays and options outlive the call.
            unsafe {
                (library.api.trtxpy_run)(
                    self.object.context(),
                    model.as_ptr().cast(),
                    model.len(),
                    weights,
                    weights_bytes,
                    arrays.as_ptr(),
                    arrays.len(),
                    &options.raw,
                    results,
                )
            }
        })
    }

    /// The same on zeros, at the model's own shapes: 1 for every axis that is not fixed.
    pub fn run_zeroed(&self, model: &[u8], weights: Option<&[u8]>, options: &GraphOptions) -> Result<Results<'_>> {
        let options = options.raw()?;
        let (weights, weights_bytes) = blob(weights);
        let library = self.object.library;
        Results::create(&self.object, |results| {
            // SAFETY: an open handle; slices and options outlive the call.
            unsafe {
                (library.api.trtxpy_run_zeroed)(
                    self.object.context(),
                    model.as_ptr().cast(),
                    model.len(),
                    weights,
                    weights_bytes,
                    &options.raw,
                    results,
                )
            }
        })
    }

    /// For [`Runtime::api`](crate::Runtime::api). The context destroys it.
    pub fn as_raw(&self) -> ffi::trtxpy_context {
        self.object.context()
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Context")
            .field("backend", &self.backend)
            .field("fallback_reason", &self.fallback_reason)
            .finish_non_exhaustive()
    }
}

fn blob(bytes: Option<&[u8]>) -> (*const c_void, usize) {
    bytes.map_or((std::ptr::null(), 0), |bytes| (bytes.as_ptr().cast(), bytes.len()))
}

fn path_text(path: &Path) -> Result<CString> {
    let text = path.to_str().ok_or_else(|| Error::invalid(format!("the path {path:?} is not UTF-8")))?;
    shape::name("path", text)
}

/// Whether another backend could do what this one cannot: not after a wrong option, a full device, a missing Python.
fn may_fall_back(error: &Error) -> bool {
    matches!(error.status, Status::Feature | Status::Unavailable | Status::Cuda)
}

fn require_feature(backend: Backend) -> Result<()> {
    let (compiled, feature, asked) = match backend {
        Backend::Mock => (cfg!(feature = "mock"), "mock", "accelerated: false"),
        Backend::Gpu => (cfg!(feature = "gpu"), "gpu", "accelerated: true"),
    };
    if compiled {
        return Ok(());
    }
    Err(Error::new(
        Status::Feature,
        format!(
            "{backend:?} ({asked}, or the fallback) is not compiled in: build trtxpy with the Cargo feature \"{feature}\""
        ),
    ))
}

fn open(library: &'static Library, backend: Backend, name: Option<&str>, options: &Options) -> Result<Object> {
    require_feature(backend)?;
    let name = match (backend, name) {
        (Backend::Mock, Some(name)) if name != "mock" && !name.starts_with("mock:") => {
            return Err(Error::invalid(format!(
                "Options::backend is {name:?}, and accelerated is false; expected \"mock\" or \"mock:...\""
            )));
        }
        (Backend::Mock, None) => Some("mock"),
        (_, name) => name,
    };
    let name = name.map(|name| shape::name("Options::backend", name)).transpose()?;
    let lean_library = options.lean_library.as_deref().map(path_text).transpose()?;
    let raw = ffi::trtxpy_context_options {
        backend: name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()),
        device: options.device,
        completion: match options.power {
            PowerPreference::HighPerformance => ffi::TRTXPY_LATENCY,
            PowerPreference::Default => ffi::TRTXPY_BALANCED,
            PowerPreference::LowPower => ffi::TRTXPY_EFFICIENT,
        },
        max_device_bytes: options.max_device_bytes,
        lean_library: lean_library.as_ref().map_or(std::ptr::null(), |path| path.as_ptr()),
        max_cached_models: options.max_cached_models,
        allow_host_code: options.allow_host_code.into(),
        ..Default::default()
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: the struct and its strings outlive the call.
    library.check(unsafe { (library.api.trtxpy_context_create)(&raw, &mut context) })?;
    let object = Object::new(library, Handle::Context(context), None);
    if backend == Backend::Gpu {
        // TRTX_BACKEND may name the mock, and a mock that passes for a GPU is worse than an error.
        let info = describe(&object)?;
        if info.is_mock {
            return Err(Error::new(
                Status::Unavailable,
                format!("accelerated was asked for, and the backend is {:?}; see TRTX_BACKEND", info.backend),
            ));
        }
    }
    Ok(object)
}

fn describe(object: &Object) -> Result<ContextInfo> {
    let mut raw = ffi::trtxpy_context_info::default();
    let library = object.library;
    // SAFETY: an open handle; the struct outlives the call.
    library.check(unsafe { (library.api.trtxpy_context_describe)(object.context(), &mut raw) })?;
    // SAFETY: the strings are valid until the context is destroyed.
    unsafe {
        Ok(ContextInfo {
            backend: text(raw.backend),
            tensorrt_version: text(raw.tensorrt_version),
            device_name: text(raw.device_name),
            compute_capability: text(raw.compute_capability),
            device_bytes: raw.device_bytes,
            device: raw.device,
            is_mock: raw.is_mock != 0,
        })
    }
}
