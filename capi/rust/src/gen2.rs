//! The second generation of executors: bytes in, bytes and their type out; a serialized engine, or ONNX.
//!
//! The signatures are those that rustnn's second TensorRT executor had; inputs are also taken as a slice. Graphs are kept by
//! content: a second call neither builds nor loads. All calls share one context; see [`executor`].

use std::collections::HashMap;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::executor;
use crate::gen1::from_axes;
use crate::graph::{DispatchOptions, GraphOptions, TensorInfo};
use crate::results::Array;
use crate::shape;
use crate::tensor::{Location, Tensor};

pub use crate::gen1::GraphError;

/// An input: the bytes of its elements, packed, of the type that the engine has there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrtxInput {
    /// Its name.
    pub name: String,
    /// Its bytes. They say how long the axis is that is not fixed, where there is just one.
    pub data: Vec<u8>,
}

/// An output's name, shape and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrtxOutput {
    /// Its name.
    pub name: String,
    /// Its shape; empty for a scalar.
    pub shape: Vec<i64>,
    /// `"float32"`, say; see [`DType::name`].
    pub data_type: String,
}

/// An output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrtxOutputWithData {
    /// Its name.
    pub name: String,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// The bytes of its elements, packed.
    pub data: Vec<u8>,
    /// `"float32"`, say; see [`DType::name`].
    pub data_type: String,
}

/// What an input of [`run_trtx_zeroed`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperandDescriptor {
    /// What its elements are.
    pub data_type: DType,
    /// Its shape; empty for a scalar.
    pub shape: Vec<u32>,
}

/// Run an engine, or an ONNX model, on zeros of these types and shapes. Without inputs, at the model's own shapes: 1 for
/// every axis that is not fixed.
pub fn run_trtx_zeroed(
    model_bytes: &[u8],
    inputs: &HashMap<String, OperandDescriptor>,
) -> std::result::Result<Vec<TrtxOutput>, GraphError> {
    let context = executor::context()?;
    let options = GraphOptions::default();
    let results = if inputs.is_empty() {
        context.run_zeroed(model_bytes, None, &options)?
    } else {
        let zeros: Vec<(&str, DType, Vec<i64>, Vec<u8>)> = inputs
            .iter()
            .map(|(name, operand)| {
                let shape: Vec<i64> = operand.shape.iter().map(|axis| i64::from(*axis)).collect();
                let bytes = shape::elements(&shape).and_then(|elements| operand.data_type.bytes(elements));
                let bytes =
                    bytes.ok_or_else(|| Error::invalid(format!("input {name:?} is too large: {:?}", operand.shape)))?;
                Ok((name.as_str(), operand.data_type, shape, vec![0; bytes]))
            })
            .collect::<Result<_>>()?;
        let arrays: Vec<_> =
            zeros.iter().map(|(name, dtype, shape, data)| Array { name, dtype: *dtype, shape, data }).collect();
        context.run(model_bytes, None, &arrays, &options)?
    };
    Ok(results
        .iter()
        .map(|output| TrtxOutput {
            name: output.name.to_owned(),
            shape: output.shape.to_vec(),
            data_type: output.dtype.name().to_owned(),
        })
        .collect())
}

/// Run a serialized engine, or an ONNX model, on these inputs.
pub fn run_trtx_with_inputs(
    engine_bytes: &[u8],
    inputs: impl AsRef<[TrtxInput]>,
) -> std::result::Result<Vec<TrtxOutputWithData>, GraphError> {
    let executor = executor::get()?;
    let graph = executor.graph(engine_bytes)?;
    let given: Vec<_> = inputs
        .as_ref()
        .iter()
        .map(|input| {
            let info = graph
                .inputs()
                .find(|info| info.name == input.name)
                .ok_or_else(|| Error::invalid(format!("there is no input {:?}", input.name)))?;
            let tensor = executor.context.tensor(info.dtype, &shape_of(info, input.data.len())?, Location::Host)?;
            tensor.write_bytes(&input.data)?;
            Ok((input.name.as_str(), tensor))
        })
        .collect::<Result<_>>()?;
    let found: Vec<_> = graph
        .outputs()
        .map(|info| {
            let least: Vec<i64> = info.shape.iter().map(|axis| if *axis < 0 { 1 } else { *axis }).collect();
            Ok((info.name.as_str(), executor.context.tensor(info.dtype, &least, Location::Host)?))
        })
        .collect::<Result<_>>()?;
    let options = DispatchOptions { resize_outputs: true, ..DispatchOptions::default() };
    graph.dispatch_with(&bindings(&given), &bindings(&found), &options)?;
    Ok(found.iter().map(|(name, tensor)| output(name, tensor)).collect::<Result<_>>()?)
}

fn bindings<'a>(tensors: &'a [(&str, Tensor<'_>)]) -> Vec<(&'a str, &'a Tensor<'a>)> {
    tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
}

fn output(name: &str, tensor: &Tensor<'_>) -> Result<TrtxOutputWithData> {
    let mut data = vec![0; tensor.byte_len()?];
    tensor.read_bytes(&mut data)?;
    Ok(TrtxOutputWithData {
        name: name.to_owned(),
        shape: from_axes(&tensor.shape()?)?,
        data,
        data_type: tensor.dtype().name().to_owned(),
    })
}

/// The shape of an input of so many bytes, which are whole elements.
fn shape_of(info: &TensorInfo, bytes: usize) -> Result<Vec<i64>> {
    let wrong = |why: &str| {
        let expected =
            format!("input {:?} has {bytes} bytes; expected {} {}", info.name, info.dtype, shape::text(&info.shape));
        Err(Error::invalid(format!("{expected}{why}")))
    };
    let open: Vec<_> = (0..info.shape.len()).filter(|index| info.shape[*index] < 0).collect();
    let [open] = open[..] else {
        if !open.is_empty() {
            return wrong(", whose open axes cannot be told from the number of bytes");
        }
        let fits = shape::elements(&info.shape).and_then(|elements| info.dtype.bytes(elements)) == Some(bytes);
        return if fits { Ok(info.shape.clone()) } else { wrong("") };
    };
    let mut shape = info.shape.clone();
    shape[open] = 1;
    let Some(elements) = shape::elements(&shape).filter(|elements| *elements > 0) else {
        return wrong(", whose open axis cannot be told from the number of bytes");
    };
    if info.dtype.bits() < 8 && elements % 2 != 0 {
        return wrong(", whose open axis cannot be told from the number of bytes");
    }
    match info.dtype.bytes(elements) {
        Some(each) if each > 0 && bytes % each == 0 => {
            shape[open] = (bytes / each) as i64;
            Ok(shape)
        }
        _ => wrong(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dtype: DType, shape: &[i64], bytes: usize) -> Option<Vec<i64>> {
        let info = TensorInfo { name: "x".into(), dtype, engine_dtype: dtype, shape: shape.to_vec() };
        shape_of(&info, bytes).ok()
    }

    #[test]
    fn shapes_are_told_from_bytes() {
        assert_eq!(shape(DType::Float32, &[2, 3], 24), Some(vec![2, 3]));
        assert_eq!(shape(DType::Float32, &[2, 3], 20), None);
        assert_eq!(shape(DType::Float32, &[], 4), Some(vec![]));
        assert_eq!(shape(DType::Float16, &[-1, 3], 30), Some(vec![5, 3]));
        assert_eq!(shape(DType::Float16, &[-1, 3], 31), None);
        assert_eq!(shape(DType::Float32, &[-1, 3], 0), Some(vec![0, 3]));
        assert_eq!(shape(DType::Float32, &[-1, -1], 4), None);
        assert_eq!(shape(DType::Float32, &[-1, 0], 0), None);
        assert_eq!(shape(DType::Int4, &[-1, 4], 6), Some(vec![3, 4]));
        assert_eq!(shape(DType::Int4, &[-1, 3], 6), None);
        assert_eq!(shape(DType::Int4, &[3], 2), Some(vec![3]));
    }
}
