//! E0505
use trtxpy::Results;

pub fn run(results: Results<'_>) -> Option<usize> {
    let output = results.get(0)?;
    #[cfg(fail)]
    drop(results);
    Some(output.data.len())
}
