//! The suite on the library that TRTXPY_LIBRARY names, and models of this repository. Skipped without one, but for
//! TRTXPY_REQUIRE_LIBRARY=1.

mod common;
mod suite;

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use common::Kit;
use trtxpy::{executor, Options, Runtime, RuntimeOptions};

pub fn kit() -> Option<Kit> {
    static ALONE: Mutex<()> = Mutex::new(());
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let library = std::env::var_os("TRTXPY_LIBRARY").map(PathBuf::from).filter(|path| path.is_file());
    if library.is_none() {
        let required = std::env::var("TRTXPY_REQUIRE_LIBRARY").is_ok_and(|value| value == "1");
        assert!(!required, "TRTXPY_REQUIRE_LIBRARY is 1, and TRTXPY_LIBRARY names no file");
        println!("skipped: TRTXPY_LIBRARY names no file");
        return None;
    }
    let runtime = RUNTIME.get_or_init(|| {
        executor::configure(Options::default()).unwrap();
        Runtime::with_options(&RuntimeOptions { library, python: None }).unwrap()
    });
    Some(Kit { runtime, identity: common::onnx::identity, fake: false, _alone: alone })
}

#[cfg(feature = "mock")]
mod digits {
    use trtxpy::{gen1, gen2, Context, DType, GraphOptions, Location, Options, ProfileRange};

    fn path() -> std::path::PathBuf {
        crate::common::manifest().join("../../examples/digits/digits.onnx")
    }

    fn context(kit: &crate::common::Kit) -> Context<'static> {
        kit.runtime.context(&Options::default()).unwrap()
    }

    /// Something like an image; its probabilities, all ways in.
    fn image() -> Vec<f32> {
        (0..64).map(|index| (index % 17) as f32 / 17.0).collect()
    }

    #[test]
    fn all_ways_in_agree() {
        let Some(kit) = crate::kit() else { return };
        let context = context(&kit);
        let graph = context.graph_from_file(path(), &GraphOptions::default()).unwrap();
        assert_eq!(graph.inputs().next().unwrap().shape, [-1, 1, 8, 8]);
        let x = context.tensor_from(&[1, 1, 8, 8], &image()).unwrap();
        let y = context.tensor(DType::Float32, &[1, 10], Location::Host).unwrap();
        graph.dispatch(&[("image", &x)], &[("probabilities", &y)]).unwrap();
        let expected = y.read_vec::<f32>().unwrap();
        assert!((expected.iter().sum::<f32>() - 1.0).abs() < 1e-3, "{expected:?}");
        let request = graph.submit(&[("image", &x)], &[("probabilities", &y)]).unwrap();
        let completion = crate::common::block_on(request).unwrap();
        assert!(completion.captured);
        assert_eq!(y.read_vec::<f32>().unwrap(), expected);

        let model = std::fs::read(path()).unwrap();
        let input = gen1::TrtxInput { name: "image".into(), shape: vec![1, 1, 8, 8], data: image() };
        let outputs = gen1::run_trtx_with_inputs(&model, [input]).unwrap();
        assert_eq!((&outputs[0].shape[..], &outputs[0].data), (&[1, 10][..], &expected));
        let bytes: Vec<u8> = image().iter().flat_map(|each| each.to_ne_bytes()).collect();
        let input = gen2::TrtxInput { name: "image".into(), data: bytes };
        let outputs = gen2::run_trtx_with_inputs(&graph.plan().unwrap(), [input]).unwrap();
        let expected: Vec<u8> = expected.iter().flat_map(|each| each.to_ne_bytes()).collect();
        assert_eq!((&outputs[0].data_type[..], &outputs[0].data), ("float32", &expected));
    }

    #[test]
    fn device_tensors_and_options() {
        let Some(kit) = crate::kit() else { return };
        let context = context(&kit);
        let range =
            ProfileRange { name: "image".into(), min: vec![1, 1, 8, 8], opt: vec![2, 1, 8, 8], max: vec![4, 1, 8, 8] };
        let options = GraphOptions {
            ranges: vec![range],
            lanes: 2,
            slots: 3,
            optimization_level: Some(1),
            ..GraphOptions::default()
        };
        let graph = context.graph_from_file(path(), &options).unwrap();
        let x = context.tensor(DType::Float32, &[2, 1, 8, 8], Location::Device).unwrap();
        x.write_slice(&[0.5_f32; 128]).unwrap();
        let y = context.tensor(DType::Float32, &[2, 10], Location::Device).unwrap();
        graph.dispatch(&[("image", &x)], &[("probabilities", &y)]).unwrap();
        assert!((y.read_vec::<f32>().unwrap().iter().sum::<f32>() - 2.0).abs() < 1e-3);
        let large = context.tensor(DType::Float32, &[5, 1, 8, 8], Location::Host).unwrap();
        let error = graph.dispatch(&[("image", &large)], &[("probabilities", &y)]).unwrap_err();
        assert_eq!(error.status, trtxpy::Status::Shape, "{error}");
        let budget = Options { max_device_bytes: 1024, ..Options::default() };
        let context = kit.runtime.context(&budget).unwrap();
        let error = context.tensor(DType::UInt8, &[4096], Location::Device).unwrap_err();
        assert_eq!(error.status, trtxpy::Status::OutOfMemory, "{error}");
    }
}
