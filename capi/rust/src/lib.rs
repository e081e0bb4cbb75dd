#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

mod context;
mod dtype;
mod error;
pub mod executor;
pub mod ffi;
pub mod gen1;
pub mod gen2;
mod graph;
mod library;
mod object;
mod queue;
mod request;
mod results;
mod runtime;
mod shape;
mod tensor;

pub use context::{Backend, Context, ContextInfo, ContextStatistics, Options, PowerPreference};
pub use dtype::{Bool, DType, Element, BF16, F16, F8};
pub use error::{Error, Result, Status};
pub use graph::{
    Bindings, DispatchOptions, Graph, GraphOptions, GraphStatistics, ProfileRange, SubmitOptions, TensorInfo,
};
pub use queue::{Queue, QueueCompletion, QueuedRequest};
pub use request::{Completion, Request};
pub use results::{Array, Output, Results};
pub use runtime::{Runtime, RuntimeOptions};
pub use tensor::{Location, Tensor};
