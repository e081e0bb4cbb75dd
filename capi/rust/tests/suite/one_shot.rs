//! One call for everything: `run`, `gen1`, `gen2`.

use std::thread;

use trtxpy::{executor, gen1, gen2, Array, DType, GraphOptions, Options, Status};

#[test]
fn one_call_does_it_all() {
    let kit = kit!();
    let before = kit.open();
    let context = kit.context();
    let model = (kit.identity)(DType::Int64, &[-1]);
    let input = [Array::new("x", &[3], &[1_i64, -2, 3])];
    for _ in 0..2 {
        let results = context.run(&model, None, &input, &GraphOptions::default()).unwrap();
        assert_eq!((results.len(), results.is_empty()), (1, false));
        let output = results.by_name("y").unwrap();
        assert_eq!((output.dtype, output.shape), (DType::Int64, &[3][..]));
        assert_eq!(output.to_vec::<i64>().unwrap(), [1, -2, 3]);
        assert_eq!(output.to_f32().unwrap(), [1.0, -2.0, 3.0]);
        assert_eq!(output.to_vec::<f32>().unwrap_err().status, Status::DType);
        assert!(results.get(1).is_none() && results.by_name("z").is_none());
    }
    let zeros = context.run_zeroed(&model, None, &GraphOptions::default()).unwrap();
    assert_eq!(zeros.iter().next().unwrap().to_vec::<i64>().unwrap(), [0]);
    assert!(format!("{zeros:?}").contains("y int64 (1)"), "{zeros:?}");
    drop(zeros);
    let wrong = [Array::new("z", &[3], &[1_i64, 2, 3])];
    assert_eq!(context.run(&model, None, &wrong, &GraphOptions::default()).unwrap_err().status, Status::NotFound);
    assert!(context.run(&model, None, &[], &GraphOptions::default()).is_err());
    drop(context);
    assert_eq!(kit.open(), before);
}

#[test]
fn the_first_generation() {
    let kit = kit!();
    let input = |data: &[f32]| gen1::TrtxInput { name: "x".into(), shape: vec![2, 2], data: data.to_vec() };
    let model = (kit.identity)(DType::Float32, &[-1, 2]);
    let outputs = gen1::run_trtx_with_inputs(&model, &[input(&[1.0, 2.0, 3.0, 4.0])]).unwrap();
    assert_eq!(outputs.len(), 1);
    assert_eq!((outputs[0].name.as_str(), &outputs[0].shape[..]), ("y", &[2, 2][..]));
    assert_eq!(outputs[0].data, [1.0, 2.0, 3.0, 4.0]);
    let again = gen1::run_trtx_with_inputs(&model, vec![input(&[1.0, 2.0, 3.0, 4.0])]).unwrap();
    assert_eq!(again, outputs);
    let zeroed = gen1::run_trtx_zeroed(&model, &[input(&[])]).unwrap();
    assert_eq!(zeroed, [gen1::TrtxOutput { name: "y".into(), shape: vec![2, 2] }]);
    let zeroed = gen1::run_trtx_zeroed(&model, &[]).unwrap();
    assert_eq!(zeroed, [gen1::TrtxOutput { name: "y".into(), shape: vec![1, 2] }]);
    let scalar = gen1::TrtxInput { name: "x".into(), shape: vec![], data: vec![5.0] };
    let outputs = gen1::run_trtx_with_inputs(&(kit.identity)(DType::Float32, &[]), [scalar]).unwrap();
    assert!(outputs[0].shape.is_empty() && outputs[0].data == [5.0]);

    let gen1::GraphError::TrtxRuntimeFailed(text) = gen1::run_trtx_with_inputs(&model, &[input(&[1.0])]).unwrap_err();
    assert!(text.starts_with("TRTXPY_BUFFER_SIZE: "), "{text}");
    let error = gen1::run_trtx_zeroed(&[0; 100], &[input(&[])]).unwrap_err();
    assert!(error.to_string().starts_with("TensorRT: TRTXPY_"), "{error}");
    let huge = gen1::TrtxInput { name: "x".into(), shape: vec![usize::MAX, 2], data: vec![] };
    assert!(gen1::run_trtx_zeroed(&model, std::slice::from_ref(&huge)).unwrap_err().to_string().contains("too large"));
    assert!(gen1::run_trtx_with_inputs(&model, [huge]).unwrap_err().to_string().contains("too large"));
}

#[test]
fn the_second_generation() {
    let kit = kit!();
    let input = |data: &[i32]| gen2::TrtxInput {
        name: "x".into(),
        data: data.iter().flat_map(|each| each.to_ne_bytes()).collect(),
    };
    let model = (kit.identity)(DType::Int32, &[-1, 2]);
    let plan = kit.graph(&kit.context(), DType::Int32, &[-1, 2]).plan().unwrap();
    for bytes in [&model, &plan, &plan] {
        let outputs = gen2::run_trtx_with_inputs(bytes, &[input(&[1, 2, 3, 4])]).unwrap();
        assert_eq!((outputs[0].name.as_str(), &outputs[0].shape[..]), ("y", &[2, 2][..]));
        assert_eq!(outputs[0].data_type, "int32");
        assert_eq!(outputs[0].data, input(&[1, 2, 3, 4]).data);
    }
    assert!(gen2::run_trtx_with_inputs(&plan, vec![input(&[1, 2])]).is_ok());
    let operand = gen2::OperandDescriptor { data_type: DType::Int32, shape: vec![3, 2] };
    let zeroed = gen2::run_trtx_zeroed(&plan, &[("x".to_owned(), operand)].into()).unwrap();
    assert_eq!(zeroed, [gen2::TrtxOutput { name: "y".into(), shape: vec![3, 2], data_type: "int32".into() }]);
    assert_eq!(gen2::run_trtx_zeroed(&model, &Default::default()).unwrap()[0].shape, [1, 2]);

    let said = |error: gen2::GraphError| error.to_string();
    assert!(said(gen2::run_trtx_with_inputs(&plan, &[input(&[1, 2, 3])]).unwrap_err()).contains("12 bytes"));
    assert!(said(gen2::run_trtx_with_inputs(b"nonsense", &[]).unwrap_err()).contains("TRTXPY_P"));
    assert!(gen2::run_trtx_with_inputs(&plan, &[]).is_err());
    let mut other = input(&[1, 2]);
    other.name = "z".into();
    assert!(said(gen2::run_trtx_with_inputs(&plan, &[other]).unwrap_err()).contains("no input \"z\""));
}

#[test]
fn the_executor_keeps_a_few_graphs_and_one_context() {
    let kit = kit!();
    let context = executor::context().unwrap();
    assert_eq!(executor::configure(Options::default()).unwrap_err().status, Status::Busy);
    for size in 1..=12 {
        let model = (kit.identity)(DType::UInt8, &[size]);
        let input = gen2::TrtxInput { name: "x".into(), data: vec![7; size as usize] };
        assert_eq!(gen2::run_trtx_with_inputs(&model, [input]).unwrap()[0].data, vec![7; size as usize]);
    }
    let before = kit.open();
    for size in 20..=30 {
        let model = (kit.identity)(DType::UInt8, &[size]);
        let input = gen2::TrtxInput { name: "x".into(), data: vec![7; size as usize] };
        gen2::run_trtx_with_inputs(&model, [input]).unwrap();
    }
    assert_eq!(kit.open(), before); // eight of them, however many there were
    assert!(std::ptr::eq(context, executor::context().unwrap()));
}

#[test]
fn threads_share_the_executor() {
    let kit = kit!();
    let model = (kit.identity)(DType::Float32, &[3]);
    thread::scope(|scope| {
        for number in 0..6 {
            let model = &model;
            scope.spawn(move || {
                let data = vec![number as f32; 3];
                let first = gen1::TrtxInput { name: "x".into(), shape: vec![3], data: data.clone() };
                assert_eq!(gen1::run_trtx_with_inputs(model, [first]).unwrap()[0].data, data);
                let bytes: Vec<u8> = data.iter().flat_map(|each| each.to_ne_bytes()).collect();
                let second = gen2::TrtxInput { name: "x".into(), data: bytes.clone() };
                assert_eq!(gen2::run_trtx_with_inputs(model, [second]).unwrap()[0].data, bytes);
            });
        }
    });
}
