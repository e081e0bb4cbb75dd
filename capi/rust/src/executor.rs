//! The one context behind [`gen1`](crate::gen1) and [`gen2`](crate::gen2), whose callers hold nothing.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::context::{Context, Options};
use crate::error::{Error, Result, Status};
use crate::graph::{Graph, GraphOptions};
use crate::runtime::Runtime;

/// How many graphs [`Executor::graph`] keeps.
const MOST_GRAPHS: usize = 8;

/// Length and two independent, keyed hashes.
type Key = (usize, u64, u64);

pub(crate) struct Executor {
    pub(crate) context: Context<'static>,
    hashers: (RandomState, RandomState),
    /// Latest last.
    graphs: Mutex<Vec<(Key, Arc<Graph<'static>>)>>,
}

static OPTIONS: Mutex<Option<Options>> = Mutex::new(None);
static EXECUTOR: Mutex<Option<&'static Executor>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Say how the context of `gen1` and `gen2` is chosen, before their first call. Otherwise it is accelerated if the Cargo
/// feature `gpu` is on, else the mock, without a fallback.
///
/// # Errors
/// [`Status::Busy`] if the context is there already: nothing has changed.
pub fn configure(options: Options) -> Result<()> {
    let executor = lock(&EXECUTOR);
    if executor.is_some() {
        return Err(Error::new(
            Status::Busy,
            "the executor's context is there already; configure it before its first use",
        ));
    }
    *lock(&OPTIONS) = Some(options);
    Ok(())
}

/// The context of `gen1` and `gen2`, made by the first who asks. A failure is not kept: the next call tries again.
pub fn context() -> Result<&'static Context<'static>> {
    Ok(&get()?.context)
}

pub(crate) fn get() -> Result<&'static Executor> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(executor) = *lock(&EXECUTOR) {
        return Ok(executor);
    }
    // No lock is held while the library is called: it may wait for Python's, which a thread that waits for ours may have.
    let runtime = match RUNTIME.get() {
        Some(runtime) => runtime,
        None => {
            let runtime = Runtime::new()?;
            RUNTIME.get_or_init(|| runtime)
        }
    };
    let options = lock(&OPTIONS).clone();
    let options = options.unwrap_or_else(|| Options { accelerated: cfg!(feature = "gpu"), ..Options::default() });
    let made = Executor {
        context: runtime.context(&options)?,
        hashers: (RandomState::new(), RandomState::new()),
        graphs: Mutex::default(),
    };
    let mut executor = lock(&EXECUTOR);
    if let Some(first) = *executor {
        drop(executor); // before what came second
        return Ok(first);
    }
    Ok(executor.insert(Box::leak(Box::new(made))))
}

impl Executor {
    /// The graph of a model or a plan, kept by content. Threads that ask for a new one at the same moment may each open it.
    pub(crate) fn graph(&'static self, model: &[u8]) -> Result<Arc<Graph<'static>>> {
        let key = self.key(model);
        if let Some(graph) = kept(&mut lock(&self.graphs), key) {
            return Ok(graph);
        }
        let opened = Arc::new(self.open(model)?); // as above, without a lock
        let mut graphs = lock(&self.graphs);
        let first = kept(&mut graphs, key);
        let graph = first.unwrap_or_else(|| {
            graphs.push((key, opened.clone()));
            opened.clone()
        });
        let surplus = (graphs.len() > MOST_GRAPHS).then(|| graphs.remove(0));
        drop(graphs);
        drop(surplus);
        Ok(graph)
    }

    fn key(&self, model: &[u8]) -> Key {
        let hash = |state: &RandomState| {
            let mut hasher = state.build_hasher();
            hasher.write(model);
            hasher.finish()
        };
        (model.len(), hash(&self.hashers.0), hash(&self.hashers.1))
    }

    /// What the bytes are is not known for sure before they are read: the likelier first.
    fn open(&self, model: &[u8]) -> Result<Graph<'_>> {
        let options = GraphOptions::default();
        let open = |as_plan: bool| {
            if as_plan {
                self.context.graph_from_plan(model, &options)
            } else {
                self.context.graph_from_onnx(model, None, &options)
            }
        };
        let likely_plan = model.first() != Some(&8); // an ONNX model begins with field 1, its ir_version
        match open(likely_plan) {
            Err(error) if matches!(error.status, Status::Parse | Status::Plan) => {
                open(!likely_plan).map_err(|second| match second.status {
                    Status::Parse | Status::Plan => error,
                    _ => second,
                })
            }
            opened => opened,
        }
    }
}

/// And it is the latest then.
fn kept(graphs: &mut Vec<(Key, Arc<Graph<'static>>)>, key: Key) -> Option<Arc<Graph<'static>>> {
    let found = graphs.remove(graphs.iter().position(|(each, _)| *each == key)?);
    graphs.push(found.clone());
    Some(found.1)
}
