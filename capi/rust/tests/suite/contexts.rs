//! Which context is chosen.

use trtxpy::{Backend, Context, Graph, Options, Queue, Request, Results, Runtime, Status, Tensor};

#[test]
fn everything_may_go_to_other_threads() {
    fn check<T: Send + Sync>() {}
    check::<Runtime>();
    check::<Context<'_>>();
    check::<Graph<'_>>();
    check::<Tensor<'_>>();
    check::<Request<'_>>();
    check::<Queue<'_>>();
    check::<Results<'_>>();
}

#[test]
fn the_library_says_what_it_is() {
    let kit = kit!();
    assert_eq!(kit.runtime.abi_version().0, 1);
    assert!(kit.runtime.version().contains('.'));
    assert!(kit.runtime.library_path().is_file());
    assert!(format!("{:?}", kit.runtime).contains(".so"));
}

#[test]
fn what_is_not_accelerated_is_the_mock() {
    let kit = kit!();
    let context = kit.context();
    assert_eq!(context.backend(), Backend::Mock);
    assert_eq!(context.fallback_reason(), None);
    let info = context.info().unwrap();
    assert!(info.is_mock && info.backend == "mock" && !info.tensorrt_version.is_empty(), "{info:?}");
    for backend in ["tensorrt", "", "mocking"] {
        let options = Options { backend: Some(backend.into()), ..Options::default() };
        assert_eq!(kit.runtime.context(&options).unwrap_err().status, Status::InvalidArgument);
    }
}

#[cfg(not(feature = "gpu"))]
#[test]
fn a_gpu_needs_the_feature_or_a_named_fallback() {
    let kit = kit!();
    let mut options = Options { accelerated: true, ..Options::default() };
    let error = kit.runtime.context(&options).unwrap_err();
    assert_eq!(error.status, Status::Feature);
    assert!(error.message.contains("\"gpu\""), "{error}");
    options.fallback = Some(Backend::Gpu);
    assert_eq!(kit.runtime.context(&options).unwrap_err().status, Status::Feature);
    options.fallback = Some(Backend::Mock);
    let context = kit.runtime.context(&options).unwrap();
    assert_eq!(context.backend(), Backend::Mock);
    assert_eq!(context.fallback_reason(), Some(&error));
}

#[cfg(feature = "gpu")]
#[test]
fn a_gpu_that_is_not_there_is_an_error_or_the_fallback() {
    let kit = kit!();
    let mut options = Options { accelerated: true, ..Options::default() };
    match kit.runtime.context(&options) {
        Ok(context) => assert!(context.backend() == Backend::Gpu && !context.info().unwrap().is_mock),
        Err(error) => {
            assert_eq!(error.status, Status::Unavailable, "{error}");
            options.fallback = Some(Backend::Mock);
            let context = kit.runtime.context(&options).unwrap();
            assert_eq!(context.backend(), Backend::Mock);
            assert_eq!(context.fallback_reason(), Some(&error));
        }
    }
    let wrong =
        Options { accelerated: true, backend: Some("nonsense".into()), fallback: Some(Backend::Mock), ..options };
    assert_eq!(kit.runtime.context(&wrong).unwrap_err().status, Status::InvalidArgument);
}
