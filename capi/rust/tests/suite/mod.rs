//! What holds for any libtrtxpy: these tests run on the fake and on the real one.
#![cfg(feature = "mock")]

macro_rules! kit {
    () => {
        match crate::kit() {
            Some(kit) => kit,
            None => return,
        }
    };
}

mod contexts;
mod graphs;
mod one_shot;
mod queues;
mod requests;
mod tensors;

use trtxpy::{Context, DType, Graph, GraphOptions, Options, Tensor};

use crate::common::{eventually, Kit};

impl Kit {
    fn context(&self) -> Context<'static> {
        self.runtime.context(&Options::default()).unwrap()
    }

    /// Whose requests take a while, in which a busy machine gets through what is asked meanwhile.
    fn slow(&self) -> Context<'static> {
        let backend = Some("mock:duration_s=0.5".to_owned());
        self.runtime.context(&Options { backend, ..Options::default() }).unwrap()
    }

    fn open(&self) -> usize {
        self.runtime.live_objects().unwrap()
    }

    /// As many objects as `before`: those that a request kept go when it is complete.
    fn settles(&self, before: usize) {
        eventually("what was dropped is destroyed", || self.open() == before);
    }

    fn graph<'ctx>(&self, context: &'ctx Context<'_>, dtype: DType, shape: &[i64]) -> Graph<'ctx> {
        context.graph_from_onnx(&(self.identity)(dtype, shape), None, &GraphOptions::default()).unwrap()
    }

    /// For any number of rows of four floats. One slot: the captures of a slow one take as long.
    fn narrow<'ctx>(&self, context: &'ctx Context<'_>) -> Graph<'ctx> {
        let options = GraphOptions { lanes: 1, slots: 1, ..GraphOptions::default() };
        context.graph_from_onnx(&(self.identity)(DType::Float32, &[-1, 4]), None, &options).unwrap()
    }

    /// Captured for one row: its requests never need Python.
    fn prepared<'ctx>(&self, context: &'ctx Context<'_>) -> Graph<'ctx> {
        let graph = self.narrow(context);
        graph.prepare(&[("x", &[1, 4])]).unwrap();
        graph
    }
}

fn floats<'ctx>(context: &'ctx Context<'_>, content: [f32; 4]) -> Tensor<'ctx> {
    context.tensor_from(&[1, 4], &content).unwrap()
}
