//! ONNX models, built by hand: as much of protobuf as an Identity needs.

use trtxpy::DType;

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value > 127 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(field: u64, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3, &mut out);
    varint(value, &mut out);
    out
}

fn message(field: u64, parts: &[Vec<u8>]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = Vec::new();
    varint(field << 3 | 2, &mut out);
    varint(content.len() as u64, &mut out);
    out.extend(content);
    out
}

fn text(field: u64, value: &str) -> Vec<u8> {
    message(field, &[value.as_bytes().to_vec()])
}

fn element_type(dtype: DType) -> u64 {
    match dtype {
        DType::Float32 => 1,
        DType::UInt8 => 2,
        DType::Int8 => 3,
        DType::Int32 => 6,
        DType::Int64 => 7,
        DType::Bool => 9,
        DType::Float16 => 10,
        DType::UInt32 => 12,
        DType::UInt64 => 13,
        other => panic!("no test needs {other}"),
    }
}

fn value(field: u64, name: &str, dtype: DType, shape: &[i64]) -> Vec<u8> {
    let axis = |index: usize| {
        let axis = shape[index];
        message(1, &[if axis < 0 { text(2, &format!("n{index}")) } else { number(1, axis as u64) }])
    };
    let axes: Vec<_> = (0..shape.len()).map(axis).collect();
    let tensor = message(1, &[number(1, element_type(dtype)), message(2, &axes)]);
    message(field, &[text(1, name), message(2, &[tensor])])
}

/// y = x
pub fn identity(dtype: DType, shape: &[i64]) -> Vec<u8> {
    let node = message(1, &[text(1, "x"), text(2, "y"), text(4, "Identity")]);
    let graph = [node, text(2, "identity"), value(11, "x", dtype, shape), value(12, "y", dtype, shape)];
    [number(1, 8), message(7, &graph), message(8, &[text(1, ""), number(2, 17)])].concat()
}
