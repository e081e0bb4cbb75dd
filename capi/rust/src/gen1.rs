//! The first generation of executors: `f32` in, `f32` out, nothing held between calls.
//!
//! The signatures are those that rustnn's first TensorRT executor had, so that a call of it needs another path and no other
//! change; inputs are also taken as a `Vec`. Unlike there, the engine is kept by content: a second call does not build.
//! All calls share one context; see [`executor`].

use std::fmt;

use crate::error::{Error, Result};
use crate::executor;
use crate::graph::GraphOptions;
use crate::results::{Array, Results};
use crate::shape;

/// An input: `f32`. A model that has another type there is refused.
#[derive(Debug, Clone, PartialEq)]
pub struct TrtxInput {
    /// Its name.
    pub name: String,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: Vec<f32>,
}

/// An output's name and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrtxOutput {
    /// Its name.
    pub name: String,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
}

/// An output.
#[derive(Debug, Clone, PartialEq)]
pub struct TrtxOutputWithData {
    /// Its name.
    pub name: String,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its elements, converted if the model's type is another: exact for floats of up to 32 bits and integers up to 2^24,
    /// rounded for larger integers; a bool is 0 or 1.
    pub data: Vec<f32>,
}

/// Errors, as executors of these generations have them: one variant, a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GraphError {
    /// Status and text of what failed.
    TrtxRuntimeFailed(String),
}

impl fmt::Display for GraphError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GraphError::TrtxRuntimeFailed(text) => write!(formatter, "TensorRT: {text}"),
        }
    }
}

impl std::error::Error for GraphError {}

impl From<Error> for GraphError {
    fn from(error: Error) -> GraphError {
        GraphError::TrtxRuntimeFailed(error.to_string())
    }
}

/// Run an ONNX model on zeros of the inputs' shapes; their data is not looked at. Without inputs, at the model's own shapes:
/// 1 for every axis that is not fixed.
pub fn run_trtx_zeroed(
    onnx_model_bytes: &[u8],
    inputs: impl AsRef<[TrtxInput]>,
) -> std::result::Result<Vec<TrtxOutput>, GraphError> {
    let inputs = inputs.as_ref();
    let context = executor::context()?;
    let options = GraphOptions::default();
    let results = if inputs.is_empty() {
        context.run_zeroed(onnx_model_bytes, None, &options)?
    } else {
        let zeros: Vec<_> = inputs
            .iter()
            .map(|input| {
                let shape = to_axes(&input.name, &input.shape)?;
                let elements = shape::elements(&shape)
                    .filter(|elements| *elements <= isize::MAX as usize / 4)
                    .ok_or_else(|| Error::invalid(format!("input {:?} is too large: {:?}", input.name, input.shape)))?;
                Ok(TrtxInput { data: vec![0.0; elements], ..input.clone_without_data() })
            })
            .collect::<Result<_>>()?;
        run(onnx_model_bytes, &zeros)?
    };
    Ok(results
        .iter()
        .map(|output| Ok(TrtxOutput { name: output.name.to_owned(), shape: from_axes(output.shape)? }))
        .collect::<Result<_>>()?)
}

/// Run an ONNX model, or a plan, on these inputs.
pub fn run_trtx_with_inputs(
    onnx_model_bytes: &[u8],
    inputs: impl AsRef<[TrtxInput]>,
) -> std::result::Result<Vec<TrtxOutputWithData>, GraphError> {
    let results = run(onnx_model_bytes, inputs.as_ref())?;
    Ok(results
        .iter()
        .map(|output| {
            Ok(TrtxOutputWithData {
                name: output.name.to_owned(),
                shape: from_axes(output.shape)?,
                data: output.to_f32()?,
            })
        })
        .collect::<Result<_>>()?)
}

impl TrtxInput {
    fn clone_without_data(&self) -> TrtxInput {
        TrtxInput { name: self.name.clone(), shape: self.shape.clone(), data: Vec::new() }
    }
}

fn run(model: &[u8], inputs: &[TrtxInput]) -> Result<Results<'static>> {
    let shapes: Vec<_> = inputs.iter().map(|input| to_axes(&input.name, &input.shape)).collect::<Result<_>>()?;
    let arrays: Vec<_> =
        inputs.iter().zip(&shapes).map(|(input, shape)| Array::new(&input.name, shape, &input.data)).collect();
    executor::context()?.run(model, None, &arrays, &GraphOptions::default())
}

pub(crate) fn to_axes(name: &str, shape: &[usize]) -> Result<Vec<i64>> {
    let axes = shape.iter().map(|axis| i64::try_from(*axis)).collect::<std::result::Result<_, _>>();
    axes.map_err(|_| Error::invalid(format!("input {name:?} is too large: {shape:?}")))
}

pub(crate) fn from_axes(shape: &[i64]) -> Result<Vec<usize>> {
    let axes = shape.iter().map(|axis| usize::try_from(*axis)).collect::<std::result::Result<_, _>>();
    axes.map_err(|_| Error::invalid(format!("an output has the shape {}", shape::text(shape))))
}
