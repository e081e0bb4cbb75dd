//! E0597
// Nobody uses it any more, and still it is dropped too late.
use trtxpy::{Context, Options, Runtime};

#[allow(unused_variables, unused_assignments)]
pub fn run() {
    #[cfg(not(fail))]
    let runtime = Runtime::new().unwrap();
    let context: Context<'_>;
    #[cfg(fail)]
    let runtime = Runtime::new().unwrap();
    context = runtime.context(&Options::default()).unwrap();
}
