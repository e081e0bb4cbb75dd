//! The suite on a library in C that has no Python, and what only that can show.

mod common;
mod suite;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use common::Kit;
use trtxpy::{executor, DType, Options, Runtime, RuntimeOptions, Status};

static ALONE: Mutex<()> = Mutex::new(());

fn identity(dtype: DType, shape: &[i64]) -> Vec<u8> {
    let axes: Vec<_> = shape.iter().map(i64::to_string).collect();
    let axes = if axes.is_empty() { "scalar".into() } else { axes.join("x") };
    format!("identity {dtype} {axes}").into_bytes()
}

pub fn kit() -> Option<Kit> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let runtime = RUNTIME.get_or_init(|| {
        let library = Some(common::fake_library("libfake.so", &[]));
        executor::configure(Options::default()).unwrap();
        Runtime::with_options(&RuntimeOptions { library, python: None }).unwrap()
    });
    Some(Kit { runtime, identity, fake: true, _alone: alone })
}

#[test]
fn a_process_has_one_library() {
    let _kit = kit();
    let other = common::fake_library("libother.so", &[]);
    let error = Runtime::with_options(&RuntimeOptions { library: Some(other), python: None }).unwrap_err();
    assert_eq!(error.status, Status::Library);
    assert!(error.message.contains("loaded already"), "{error}");
    assert!(Runtime::new().is_ok());
}

#[test]
fn python_that_is_not_there_is_the_librarys_error() {
    let _kit = kit();
    let options = RuntimeOptions { library: None, python: Some(PathBuf::from("/nowhere")) };
    assert_eq!(Runtime::with_options(&options).unwrap_err().status, Status::Python);
}

/// In a process of its own: a process loads one library.
#[test]
fn a_library_that_does_not_fit_is_refused() {
    if let Some(library) = std::env::var_os("TRTXPY_TEST_UNFIT") {
        let options = RuntimeOptions { library: Some(library.into()), python: None };
        println!("said: {}", Runtime::with_options(&options).unwrap_err());
        return;
    }
    let cases = [
        ("libold.so", &["-DFAKE_ABI=0x00000005"][..], "its ABI is 0.5; this crate was written for 1.x"),
        ("libnew.so", &["-DFAKE_ABI=0x00020000"], "its ABI is 2.0; this crate was written for 1.x"),
        ("libpart.so", &["-DFAKE_INCOMPLETE"], "it lacks trtxpy_shutdown"),
    ];
    for (name, options, expected) in cases {
        let library = common::fake_library(name, options);
        let said = common::run(
            Command::new(std::env::current_exe().unwrap())
                .args(["a_library_that_does_not_fit_is_refused", "--exact", "--nocapture"])
                .env("TRTXPY_TEST_UNFIT", &library),
        );
        assert!(said.contains("said: TRTXPY_RUST_LIBRARY: ") && said.contains(expected), "{said}");
    }
}

/// In a process of its own, with nothing set and nothing found.
#[test]
fn a_library_that_is_nowhere_says_where_it_was_looked_for() {
    if std::env::var_os("TRTXPY_TEST_NOWHERE").is_some() {
        println!("said: {}", Runtime::new().unwrap_err());
        return;
    }
    let run = |variables: &[(&str, &str)]| {
        common::run(
            Command::new(std::env::current_exe().unwrap())
                .args(["a_library_that_is_nowhere_says_where_it_was_looked_for", "--exact", "--nocapture"])
                .env_clear()
                .env("TRTXPY_TEST_NOWHERE", "1")
                .envs(variables.iter().copied()),
        )
    };
    let said = run(&[("PATH", "/nowhere"), ("VIRTUAL_ENV", "/nowhere/env")]);
    for part in ["TRTXPY_LIBRARY", "/nowhere/env/bin/python3 (VIRTUAL_ENV)", "python3 (PATH)", "the dynamic linker"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let said = run(&[("TRTXPY_LIBRARY", "/nowhere/lib.so")]);
    assert!(said.contains("/nowhere/lib.so") && said.contains("(TRTXPY_LIBRARY)"), "{said}");
    let said = run(&[("TRTXPY_PYTHON", "/bin/false"), ("VIRTUAL_ENV", "/nowhere/env")]);
    assert!(said.contains("/bin/false (TRTXPY_PYTHON)") && !said.contains("VIRTUAL_ENV)"), "{said}");
}

/// In processes of their own: by TRTXPY_LIBRARY, and by what a Python prints.
#[test]
fn a_library_is_found_by_the_environment() {
    if std::env::var_os("TRTXPY_TEST_FOUND").is_some() {
        println!("found: {}", Runtime::new().unwrap().library_path().display());
        return;
    }
    let library = common::fake_library("libfound.so", &[]);
    let python = common::scratch("env/bin/python3");
    std::fs::create_dir_all(python.parent().unwrap()).unwrap();
    std::fs::write(
        &python,
        format!("#!/bin/sh\n[ \"$*\" = '-I -m trtx_py.capi --path' ] && echo {}\n", library.display()),
    )
    .unwrap();
    common::run(Command::new("chmod").arg("+x").arg(&python));
    let environment = python.parent().unwrap().parent().unwrap();
    let path = format!("{}:/usr/bin:/bin", python.parent().unwrap().display());
    let cases = [
        ("TRTXPY_LIBRARY", library.to_str().unwrap()),
        ("TRTXPY_PYTHON", python.to_str().unwrap()),
        ("TRTXPY_PYTHON", environment.to_str().unwrap()),
        ("VIRTUAL_ENV", environment.to_str().unwrap()),
        ("PATH", &path),
    ];
    for (name, value) in cases {
        let said = common::run(
            Command::new(std::env::current_exe().unwrap())
                .args(["a_library_is_found_by_the_environment", "--exact", "--nocapture"])
                .env_clear()
                .env("TRTXPY_TEST_FOUND", "1")
                .env(name, value),
        );
        assert!(said.contains(&format!("found: {}", library.display())), "{name}: {said}");
    }
}

#[cfg(feature = "mock")]
#[test]
fn power_chooses_how_results_are_waited_for() {
    use trtxpy::PowerPreference::{Default as Balanced, HighPerformance, LowPower};
    let kit = kit().unwrap();
    for (power, mode) in [(HighPerformance, "latency"), (Balanced, "balanced"), (LowPower, "efficient")] {
        let context = kit.runtime.context(&Options { power, ..Options::default() }).unwrap();
        assert_eq!(context.info().unwrap().device_name, mode); // the fake says it there
    }
}

/// The variable is the process's, so this has one of its own.
#[cfg(feature = "gpu")]
#[test]
fn a_mock_does_not_pass_for_a_gpu() {
    if std::env::var_os("TRTX_BACKEND").is_none() {
        for (backend, outcome) in [("mock", "refused"), ("tensorrt", "Gpu")] {
            let said = common::run(
                Command::new(std::env::current_exe().unwrap())
                    .args(["a_mock_does_not_pass_for_a_gpu", "--exact", "--nocapture"])
                    .env("TRTX_BACKEND", backend),
            );
            assert!(said.contains(&format!("outcome: {outcome}")), "{said}");
        }
        return;
    }
    let kit = kit().unwrap();
    match kit.runtime.context(&Options { accelerated: true, ..Options::default() }) {
        Ok(context) => println!("outcome: {:?}", context.backend()),
        Err(error) => {
            assert_eq!(error.status, Status::Unavailable, "{error}");
            println!("outcome: refused");
        }
    }
}

#[cfg(feature = "mock")]
#[test]
fn a_request_that_fails_says_why_everywhere() {
    use trtxpy::{GraphOptions, Location, SubmitOptions};
    let kit = kit().unwrap();
    let context = kit.runtime.context(&Options::default()).unwrap();
    let graph = context.graph_from_onnx(b"identity float32 4 fail", None, &GraphOptions::default()).unwrap();
    let x = context.tensor_from(&[4], &[1.0_f32; 4]).unwrap();
    let y = context.tensor(DType::Float32, &[4], Location::Host).unwrap();
    let told = |error: trtxpy::Error| error.status == Status::Execution && error.message == "it fails, as it was told";
    assert!(told(graph.dispatch(&[("x", &x)], &[("y", &y)]).unwrap_err()));
    assert!(told(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap().wait().unwrap_err()));
    assert!(told(common::block_on(graph.submit(&[("x", &x)], &[("y", &y)]).unwrap()).unwrap_err()));
    let queue = context.queue().unwrap();
    graph.submit_to(&queue, 7, &[("x", &x)], &[("y", &y)], &SubmitOptions::default()).unwrap();
    let mut taken = Vec::new();
    common::eventually("a completion", || {
        taken = queue.take(9).unwrap();
        !taken.is_empty()
    });
    assert!(taken.len() == 1 && taken[0].token == 7 && told(taken.remove(0).outcome.unwrap_err()));
    assert_eq!(graph.statistics().unwrap().failed, 4);
}

#[cfg(not(feature = "mock"))]
#[test]
fn the_mock_needs_the_feature() {
    let kit = kit().unwrap();
    let error = kit.runtime.context(&Options::default()).unwrap_err();
    assert_eq!(error.status, Status::Feature);
    assert!(error.message.contains("\"mock\""), "{error}");
    let fallback = Some(trtxpy::Backend::Mock);
    let error = kit.runtime.context(&Options { accelerated: true, fallback, ..Options::default() }).unwrap_err();
    assert_eq!(error.status, Status::Feature);
    assert!(error.message.starts_with("the fallback: Mock"), "{error}");
    let trtxpy::gen1::GraphError::TrtxRuntimeFailed(text) = trtxpy::gen1::run_trtx_zeroed(b"", &[]).unwrap_err();
    assert!(text.starts_with("TRTXPY_RUST_FEATURE: "), "{text}");
    let _ = (kit.identity)(DType::Int8, &[1]);
}
