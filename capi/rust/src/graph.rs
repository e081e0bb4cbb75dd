//! Models, built and loaded, and the requests of them.

use std::ffi::CString;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::library::text;
use crate::object::{Child, Handle, InFlight, Object};
use crate::queue::{Queue, QueuedRequest};
use crate::request::{self, Completion, Request};
use crate::shape::{self, NamedShapes};
use crate::tensor::Tensor;

/// Tensors by the graph's names, in any order.
pub type Bindings<'a> = [(&'a str, &'a Tensor<'a>)];

/// The shapes that one input with axes that are not fixed may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileRange {
    /// The input.
    pub name: String,
    /// The least.
    pub min: Vec<i64>,
    /// What TensorRT optimises for.
    pub opt: Vec<i64>,
    /// The greatest.
    pub max: Vec<i64>,
}

/// How a model is built and served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GraphOptions {
    /// Of the inputs with axes that are not fixed; empty: the first axis 1, 8, 32 and others 1, 128, 512. Not for plans.
    pub ranges: Vec<ProfileRange>,
    /// `"fp16"`, say, as BuilderConfig.precision of trtx_py. None: as the model says.
    pub precision: Option<String>,
    /// 0 to 5; None: TensorRT's own.
    pub optimization_level: Option<u8>,
    /// Streams with contexts of their own; 0: 1.
    pub lanes: u32,
    /// Requests in flight on each lane; 0: the default.
    pub slots: u32,
    /// Shapes kept captured; 0: the default.
    pub max_graphs: u32,
    /// Capture nothing.
    pub no_cuda_graphs: bool,
}

/// [`GraphOptions`] for C, and what it points to.
pub(crate) struct RawGraphOptions {
    pub(crate) raw: ffi::trtxpy_graph_options,
    _ranges: Vec<ffi::trtxpy_profile_range>,
    _texts: Vec<CString>,
}

impl GraphOptions {
    pub(crate) fn raw(&self) -> Result<RawGraphOptions> {
        let mut raw = ffi::trtxpy_graph_options {
            lanes: self.lanes,
            slots: self.slots,
            max_graphs: self.max_graphs,
            no_cuda_graphs: self.no_cuda_graphs.into(),
            ..Default::default()
        };
        if let Some(level) = self.optimization_level {
            raw.optimization_level = level.into();
        }
        let mut texts = Vec::new();
        let mut ranges = Vec::new();
        for range in &self.ranges {
            let name = shape::name("ProfileRange::name", &range.name)?;
            ranges.push(ffi::trtxpy_profile_range {
                name: name.as_ptr(),
                min: shape::raw(&range.min)?,
                opt: shape::raw(&range.opt)?,
                max: shape::raw(&range.max)?,
            });
            texts.push(name);
        }
        if !ranges.is_empty() {
            raw.ranges = ranges.as_ptr();
            raw.range_count = ranges.len();
        }
        if let Some(precision) = &self.precision {
            let precision = shape::name("GraphOptions::precision", precision)?;
            raw.precision = precision.as_ptr();
            texts.push(precision);
        }
        Ok(RawGraphOptions { raw, _ranges: ranges, _texts: texts })
    }
}

/// An input or output of a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// The model's type, which tensors must have.
    pub dtype: DType,
    /// The type it is computed in.
    pub engine_dtype: DType,
    /// -1 for axes that are not fixed. Empty for a scalar: the library gives every tensor's rank, 0 to 8.
    pub shape: Vec<i64>,
}

/// Requests of a graph since it was opened, and what is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GraphStatistics {
    /// Requests of any kind.
    pub submitted: u64,
    /// Those that succeeded.
    pub completed: u64,
    /// Those that failed, but for the cancelled ones.
    pub failed: u64,
    /// Those that were cancelled.
    pub cancelled: u64,
    /// Of the submitted: through a captured graph.
    pub captured: u64,
    /// Of the submitted: through Python.
    pub uncaptured: u64,
    /// Of the captured: on tensors of [`Graph::create_tensors`].
    pub zero_copy: u64,
    /// Not complete yet.
    pub in_flight: u64,
    /// Of these: waiting for a slot.
    pub queued: u64,
    /// Shapes that are captured.
    pub shapes: u64,
    /// Slots for them.
    pub slots: u64,
}

/// How [`Graph::dispatch_with`] runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DispatchOptions {
    /// Then the request is cancelled and the call fails with [`Status::Timeout`]. None: never.
    pub timeout: Option<Duration>,
    /// Resize outputs of another shape; else they are [`Status::Shape`].
    pub resize_outputs: bool,
}

/// How [`Graph::submit_with`] and its like run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SubmitOptions {
    /// Resize outputs of another shape; else they are [`Status::Shape`].
    pub resize_outputs: bool,
}

struct Port {
    info: TensorInfo,
    name: CString,
}

/// A model, ready to run.
pub struct Graph<'ctx> {
    pub(crate) object: Arc<Object>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    _context: Child<'ctx>,
}

/// Bindings for C, and what they point to.
pub(crate) struct RawBindings {
    inputs: Vec<ffi::trtxpy_binding>,
    outputs: Vec<ffi::trtxpy_binding>,
    _names: Vec<CString>,
}

impl<'ctx> Graph<'ctx> {
    pub(crate) fn create(
        context: &Arc<Object>,
        open: impl FnOnce(*mut ffi::trtxpy_graph) -> ffi::trtxpy_status,
    ) -> Result<Graph<'ctx>> {
        let mut graph = std::ptr::null_mut();
        context.library.check(open(&mut graph))?;
        let object = Object::new(context.library, Handle::Graph(graph), Some(context.clone()));
        let inputs = ports(&object, ffi::TRTXPY_INPUT)?;
        let outputs = ports(&object, ffi::TRTXPY_OUTPUT)?;
        Ok(Graph { object: Arc::new(object), inputs, outputs, _context: Child::new() })
    }

    /// The inputs, in the graph's order.
    pub fn inputs(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.inputs.iter().map(|port| &port.info)
    }

    /// The outputs, in the graph's order.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.outputs.iter().map(|port| &port.info)
    }

    /// The plan that was built or loaded, for [`Context::graph_from_plan`](crate::Context::graph_from_plan).
    pub fn plan(&self) -> Result<Vec<u8>> {
        let library = self.object.library;
        let mut bytes = 0;
        // SAFETY: an open handle; NULL only asks for the size.
        library.check(unsafe {
            (library.api.trtxpy_graph_get_plan)(self.object.graph(), std::ptr::null_mut(), &mut bytes)
        })?;
        let mut plan = vec![0; bytes];
        // SAFETY: an open handle, and so much room.
        library.check(unsafe {
            (library.api.trtxpy_graph_get_plan)(self.object.graph(), plan.as_mut_ptr().cast(), &mut bytes)
        })?;
        plan.truncate(bytes);
        Ok(plan)
    }

    /// Get ready for requests of these input shapes. Requests do it by themselves at first use.
    ///
    /// [`Status::Unsupported`] if the shape cannot be captured: requests of it work, and take Python's lock.
    pub fn prepare(&self, inputs: &[(&str, &[i64])]) -> Result<()> {
        let shapes = NamedShapes::new(inputs)?;
        let library = self.object.library;
        // SAFETY: an open handle; the shapes outlive the call.
        library.check(unsafe {
            (library.api.trtxpy_graph_prepare)(self.object.graph(), shapes.raw.as_ptr(), shapes.raw.len())
        })
    }

    /// The outputs' shapes for these input shapes, in the order of [`Graph::outputs`]. Prepares.
    ///
    /// [`Status::Unsupported`] if they depend on data.
    pub fn output_shapes(&self, inputs: &[(&str, &[i64])]) -> Result<Vec<Vec<i64>>> {
        let shapes = NamedShapes::new(inputs)?;
        let mut found = vec![ffi::trtxpy_shape::default(); self.outputs.len()];
        let library = self.object.library;
        // SAFETY: an open handle; the shapes outlive the call, and there is room for as many as are said.
        library.check(unsafe {
            (library.api.trtxpy_graph_output_shapes)(
                self.object.graph(),
                shapes.raw.as_ptr(),
                shapes.raw.len(),
                found.as_mut_ptr(),
                found.len(),
            )
        })?;
        Ok(found.iter().map(shape::axes).collect())
    }

    /// Tensors in the pinned memory that one captured graph reads and writes, for every input and output, in the graph's
    /// order: a dispatch with just these copies nothing on the host.
    ///
    /// They take one of the graph's slots until all are dropped. [`Status::Busy`] if none is left; [`Status::Unsupported`]
    /// if types are converted or the shape cannot be captured.
    pub fn create_tensors(&self, shapes: &[(&str, &[i64])]) -> Result<(Vec<Tensor<'_>>, Vec<Tensor<'_>>)> {
        let shapes = NamedShapes::new(shapes)?;
        let mut inputs = vec![std::ptr::null_mut(); self.inputs.len()];
        let mut outputs = vec![std::ptr::null_mut(); self.outputs.len()];
        let library = self.object.library;
        // SAFETY: an open handle; the shapes outlive the call, and there is room for as many handles as are said.
        library.check(unsafe {
            (library.api.trtxpy_graph_create_tensors)(
                self.object.graph(),
                shapes.raw.as_ptr(),
                shapes.raw.len(),
                inputs.as_mut_ptr(),
                inputs.len(),
                outputs.as_mut_ptr(),
                outputs.len(),
            )
        })?;
        let adopt = |handles: Vec<ffi::trtxpy_tensor>| -> Vec<Result<Tensor<'_>>> {
            // SAFETY: just made, each of them nobody else's. All are adopted before one's failure is looked at.
            handles.into_iter().map(|handle| unsafe { Tensor::adopt(handle, &self.object) }).collect()
        };
        let (inputs, outputs) = (adopt(inputs), adopt(outputs));
        Ok((inputs.into_iter().collect::<Result<_>>()?, outputs.into_iter().collect::<Result<_>>()?))
    }

    /// Requests since the graph was opened, and what is captured.
    pub fn statistics(&self) -> Result<GraphStatistics> {
        let mut raw = ffi::trtxpy_graph_statistics::default();
        let library = self.object.library;
        // SAFETY: an open handle; the struct outlives the call.
        library.check(unsafe { (library.api.trtxpy_graph_get_statistics)(self.object.graph(), &mut raw) })?;
        Ok(GraphStatistics {
            submitted: raw.submitted,
            completed: raw.completed,
            failed: raw.failed,
            cancelled: raw.cancelled,
            captured: raw.captured,
            uncaptured: raw.uncaptured,
            zero_copy: raw.zero_copy,
            in_flight: raw.in_flight,
            queued: raw.queued,
            shapes: raw.shapes,
            slots: raw.slots,
        })
    }

    /// Run and wait: every input and every output of the graph, by name. On failure the outputs' content is undefined.
    ///
    /// A tensor may be an input more than once, and of several requests at once. [`Status::Busy`] if another request in flight or
    /// call writes an input, or uses an output in any way, or an output is given twice or is an input, too: nothing ran then.
    pub fn dispatch(&self, inputs: &Bindings<'_>, outputs: &Bindings<'_>) -> Result<()> {
        self.dispatch_with(inputs, outputs, &DispatchOptions::default())
    }

    /// As [`Graph::dispatch`]. After a timeout the tensors stay in use until the GPU is done.
    pub fn dispatch_with(
        &self,
        inputs: &Bindings<'_>,
        outputs: &Bindings<'_>,
        options: &DispatchOptions,
    ) -> Result<()> {
        if let Some(timeout) = options.timeout {
            // The request outlives the call, and keeps what it uses.
            let submit = SubmitOptions { resize_outputs: options.resize_outputs };
            return self.submit_with(inputs, outputs, &submit)?.wait_or_cancel(timeout);
        }
        let bindings = self.bind(inputs, outputs)?;
        let raw = ffi::trtxpy_dispatch_options { resize_outputs: options.resize_outputs.into(), ..Default::default() };
        let library = self.object.library;
        // SAFETY: an open handle; bindings and options outlive the call, and so do the tensors.
        library.check(unsafe {
            (library.api.trtxpy_dispatch)(
                self.object.graph(),
                bindings.inputs.as_ptr(),
                bindings.inputs.len(),
                bindings.outputs.as_ptr(),
                bindings.outputs.len(),
                &raw,
            )
        })
    }

    /// As [`Graph::dispatch`], without waiting: a future. Dropping it cancels the request.
    ///
    /// [`Status::Busy`] as [`Graph::dispatch`]. Until the completion the tensors are in use: writing or resizing them is
    /// [`Status::Busy`], and so is reading outputs. They may be dropped.
    pub fn submit(&self, inputs: &Bindings<'_>, outputs: &Bindings<'_>) -> Result<Request<'_>> {
        self.submit_with(inputs, outputs, &SubmitOptions::default())
    }

    /// As [`Graph::submit`], and [`Status::Busy`] as there.
    pub fn submit_with(
        &self,
        inputs: &Bindings<'_>,
        outputs: &Bindings<'_>,
        options: &SubmitOptions,
    ) -> Result<Request<'_>> {
        let bindings = self.bind(inputs, outputs)?;
        let in_flight = self.in_flight(inputs, outputs);
        request::submit(self.object.library, in_flight, |raw, request| {
            raw.resize_outputs = options.resize_outputs.into();
            self.submit_raw(&bindings, raw, request)
        })
    }

    /// As [`Graph::submit`], and `callback` is called when it is complete, exactly once, unless this fails, as it does with
    /// [`Status::Busy`]. It may be called before this returns.
    ///
    /// It runs on a thread of the library's, one callback at a time: calls that would wait for a request fail there with
    /// [`Status::InCallback`]. A panic in it is caught. The request is not cancelled when this graph is dropped.
    pub fn submit_then(
        &self,
        inputs: &Bindings<'_>,
        outputs: &Bindings<'_>,
        options: &SubmitOptions,
        callback: impl FnOnce(Result<Completion>) + Send + 'static,
    ) -> Result<()> {
        let bindings = self.bind(inputs, outputs)?;
        let in_flight = self.in_flight(inputs, outputs);
        request::submit_then(in_flight, Box::new(callback), |raw| {
            raw.resize_outputs = options.resize_outputs.into();
            self.object.library.check(self.submit_raw(&bindings, raw, std::ptr::null_mut()))
        })
    }

    /// As [`Graph::submit`], and [`Status::Busy`] as there; the completion goes to the queue, with the token. Dropping what is
    /// returned does not cancel.
    pub fn submit_to<'q>(
        &self,
        queue: &'q Queue<'_>,
        token: u64,
        inputs: &Bindings<'_>,
        outputs: &Bindings<'_>,
        options: &SubmitOptions,
    ) -> Result<QueuedRequest<'q>> {
        let bindings = self.bind(inputs, outputs)?;
        queue.submit(token, self.in_flight(inputs, outputs), |raw, request| {
            raw.resize_outputs = options.resize_outputs.into();
            self.object.library.check(self.submit_raw(&bindings, raw, request))
        })
    }

    /// For [`Runtime::api`](crate::Runtime::api). The graph destroys it.
    pub fn as_raw(&self) -> ffi::trtxpy_graph {
        self.object.graph()
    }

    fn bind(&self, inputs: &Bindings<'_>, outputs: &Bindings<'_>) -> Result<RawBindings> {
        let mut names = Vec::new();
        let mut bind = |given: &Bindings<'_>, ports: &[Port]| {
            let mut raw = Vec::with_capacity(given.len());
            for (index, (name, tensor)) in given.iter().enumerate() {
                let known = ports.get(index).filter(|port| port.info.name == *name);
                let known = known.or_else(|| ports.iter().find(|port| port.info.name == *name));
                let pointer = match known {
                    Some(port) => port.name.as_ptr(),
                    None => {
                        names.push(shape::name("tensor name", name)?); // the library says that there is none
                        names[names.len() - 1].as_ptr()
                    }
                };
                raw.push(ffi::trtxpy_binding { name: pointer, tensor: tensor.object.tensor() });
            }
            Ok::<_, Error>(raw)
        };
        let inputs = bind(inputs, &self.inputs)?;
        let outputs = bind(outputs, &self.outputs)?;
        Ok(RawBindings { inputs, outputs, _names: names })
    }

    fn in_flight(&self, inputs: &Bindings<'_>, outputs: &Bindings<'_>) -> InFlight {
        let tensors = inputs.iter().chain(outputs).map(|(_, tensor)| tensor.object.clone());
        InFlight::new(tensors.chain([self.object.clone()]).collect())
    }

    fn submit_raw(
        &self,
        bindings: &RawBindings,
        options: &ffi::trtxpy_submit_options,
        request: *mut ffi::trtxpy_request,
    ) -> ffi::trtxpy_status {
        // SAFETY: an open handle; bindings and options outlive the call, and who calls this keeps the tensors, the graph
        // and what the options point to until the completion.
        unsafe {
            (self.object.library.api.trtxpy_submit)(
                self.object.graph(),
                bindings.inputs.as_ptr(),
                bindings.inputs.len(),
                bindings.outputs.as_ptr(),
                bindings.outputs.len(),
                options,
                request,
            )
        }
    }
}

impl fmt::Debug for Graph<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |ports: &[Port]| ports.iter().map(|port| port.info.name.clone()).collect::<Vec<_>>();
        formatter
            .debug_struct("Graph")
            .field("inputs", &names(&self.inputs))
            .field("outputs", &names(&self.outputs))
            .finish_non_exhaustive()
    }
}

fn ports(graph: &Object, direction: ffi::trtxpy_direction) -> Result<Vec<Port>> {
    let library = graph.library;
    let mut count = 0;
    // SAFETY: an open handle; the number outlives the call.
    library.check(unsafe { (library.api.trtxpy_graph_tensor_count)(graph.graph(), direction, &mut count) })?;
    (0..count)
        .map(|index| {
            let mut raw = ffi::trtxpy_tensor_info::default();
            // SAFETY: an open handle; the struct outlives the call.
            library
                .check(unsafe { (library.api.trtxpy_graph_tensor_info)(graph.graph(), direction, index, &mut raw) })?;
            // SAFETY: valid until the graph is destroyed.
            let name = unsafe { text(raw.name) };
            let info = TensorInfo {
                dtype: DType::from_raw(raw.dtype)?,
                engine_dtype: DType::from_raw(raw.engine_dtype)?,
                shape: shape::axes(&raw.shape),
                name: name.clone(),
            };
            let name = CString::new(name)
                .map_err(|_| Error::new(Status::Internal, "a name out of a NUL-terminated string has a NUL"))?;
            Ok(Port { info, name })
        })
        .collect()
}
