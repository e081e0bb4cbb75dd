//! Tensors and their memory.

use std::mem;

use trtxpy::{Bool, DType, Location, Status, F16};

use super::floats;

#[test]
fn tensors_have_the_type_that_is_written_and_read() {
    let kit = kit!();
    let context = kit.context();
    let tensor = context.tensor_from(&[2, 3], &[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    assert_eq!((tensor.dtype(), tensor.location()), (DType::Float32, Location::Host));
    assert_eq!(tensor.shape().unwrap(), [2, 3]);
    assert_eq!(tensor.byte_len().unwrap(), 24);
    assert_eq!(tensor.read_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(tensor.read_vec::<i32>().unwrap_err().status, Status::DType);
    assert_eq!(tensor.write_slice(&[1_u8; 24]).unwrap_err().status, Status::DType);
    assert_eq!(tensor.write_slice(&[1.0_f32; 5]).unwrap_err().status, Status::BufferSize);
    assert_eq!(tensor.write_bytes(&[0; 23]).unwrap_err().status, Status::BufferSize);
    assert_eq!(tensor.read_into(&mut [0.0_f32; 7]).unwrap_err().status, Status::BufferSize);
    tensor.resize(&[4]).unwrap();
    tensor.write_slice(&[9.0_f32; 4]).unwrap();
    let mut content = [0.0_f32; 4];
    tensor.read_into(&mut content).unwrap();
    assert_eq!(content, [9.0; 4]);
    assert!(format!("{tensor:?}").contains("float32 (4)"), "{tensor:?}");
}

#[test]
fn tensors_of_every_type_begin_as_zeros() {
    let kit = kit!();
    let context = kit.context();
    for dtype in DType::ALL {
        let tensor = context.tensor(*dtype, &[3], Location::Host).unwrap();
        let mut content = vec![1; dtype.bytes(3).unwrap()];
        tensor.read_bytes(&mut content).unwrap();
        assert!(content.iter().all(|byte| *byte == 0), "{dtype}");
    }
    let halves = context.tensor_from(&[2], &[F16::from_f32(1.5), F16(0)]).unwrap();
    assert_eq!(halves.read_vec::<F16>().unwrap(), [F16(0x3e00), F16(0)]);
    let bools = context.tensor_from(&[1], &[Bool::from(true)]).unwrap();
    assert!(bool::from(bools.read_vec::<Bool>().unwrap()[0]));
}

#[test]
fn scalars_and_empty_tensors_are_tensors() {
    let kit = kit!();
    let context = kit.context();
    let mut scalar = context.tensor_from(&[], &[7_i64]).unwrap();
    assert_eq!(scalar.shape().unwrap(), [0_i64; 0]);
    assert_eq!(scalar.as_mut_slice::<i64>().unwrap(), [7]);
    let mut empty = context.tensor_from::<f32>(&[0, 5], &[]).unwrap();
    assert_eq!(empty.read_vec::<f32>().unwrap(), [0.0; 0]);
    assert_eq!(empty.as_mut_slice::<f32>().unwrap(), [0.0; 0]);
    assert_eq!(context.tensor(DType::Int8, &[1; 9], Location::Host).unwrap_err().status, Status::InvalidArgument);
    assert_eq!(context.tensor(DType::Int8, &[-1], Location::Host).unwrap_err().status, Status::InvalidArgument);
    assert_eq!(context.tensor(DType::Int8, &[1], Location::ForeignHost).unwrap_err().status, Status::InvalidArgument);
}

#[test]
fn memory_can_be_borrowed_without_a_copy() {
    let kit = kit!();
    let context = kit.context();
    let mut tensor = context.tensor(DType::Float32, &[4], Location::Host).unwrap();
    tensor.as_mut_slice::<f32>().unwrap().copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(tensor.read_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(tensor.data().unwrap() as *const f32, tensor.as_mut_slice::<f32>().unwrap().as_ptr());
    assert_eq!(tensor.as_mut_slice::<u32>().unwrap_err().status, Status::DType);
    let mut device = context.tensor(DType::Float32, &[4], Location::Device).unwrap();
    assert_eq!(device.as_mut_slice::<f32>().unwrap_err().status, Status::Unsupported);
}

#[test]
fn tensors_in_a_captured_graphs_memory() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let graph = kit.graph(&context, DType::Float32, &[-1, 4]);
    let (mut inputs, mut outputs) = graph.create_tensors(&[("x", &[2, 4])]).unwrap();
    inputs[0].as_mut_slice::<f32>().unwrap().fill(3.0);
    graph.dispatch(&[("x", &inputs[0])], &[("y", &outputs[0])]).unwrap();
    assert_eq!(outputs[0].as_mut_slice::<f32>().unwrap(), [3.0; 8]);
    assert_eq!(outputs[0].resize(&[1, 4]).unwrap_err().status, Status::Unsupported);
    drop((inputs, outputs));
    drop(graph);
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn what_dlpack_borrows_is_destroyed_later() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let tensor = floats(&context, [1.0, 2.0, 3.0, 4.0]);
    let mut managed = std::ptr::null_mut();
    // SAFETY: an open tensor; what is exported is given back below.
    assert_eq!(unsafe { (kit.runtime.api().trtxpy_tensor_to_dlpack)(tensor.as_raw(), &mut managed) }, 0);
    drop(tensor); // borrowed: it stays
    assert_eq!(kit.open(), before + 2);
    // SAFETY: just exported, and not used otherwise.
    let imported = unsafe { context.tensor_from_dlpack(managed) }.unwrap();
    assert_eq!(imported.location(), Location::ForeignHost);
    assert_eq!(imported.read_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    drop(imported); // its deleter is called: nobody borrows the first any more
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn a_tensor_that_is_forgotten_keeps_its_context() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    mem::forget(floats(&context, [0.0; 4]));
    drop(context);
    assert_eq!(kit.open(), before + 2);
}
